"""Settings of [`DRPOTrainer`]."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_ext.arguments import check_choice, check_policy_loss_args, check_values
from trl_ext.trust_regions import TRUST_REGIONS, check_trust_region


ANCHORS = ("sampler", "old_policy")


@dataclass
class DRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`DRPOTrainer`]: all of [`~trl.GRPOConfig`], and the trust region.

    Parameters:
        trust_region (`str`, *optional*, defaults to `"drpo"`):
            What keeps the policy near the one that sampled the tokens. `"drpo"`: the smooth regularizer on the shift
            of the token's probability. `"spo"`: the same on the ratio. `"dppo_tv"` and `"dppo_kl"`: DPPO's mask, by
            binary total variation or binary KL. `"ppo_clip"`: GRPO's own clip (`epsilon`, `epsilon_high`, `delta`).
        trust_region_radius (`float`, *optional*):
            Radius of the region: in absolute probability for `"drpo"` and `"dppo_tv"`, in |ratio - 1| for `"spo"`, in
            nats for `"dppo_kl"`. `None` takes the region's default: 0.5, 0.15, 0.2 and 0.05. With the 12.5 of the
            DRPO paper the region never binds, because a probability cannot shift by more than 1.
        trust_region_anchor (`str`, *optional*, defaults to `"sampler"`):
            What the region is around, where the rollout has the sampler's log-probabilities (vLLM, `rollout_func`).
            `"sampler"`: the policy that drew the tokens, as in the paper. `"old_policy"`: the training model before
            the rollout batch's first update, as in GRPO; TRL's importance sampling correction
            (`vllm_importance_sampling_mode`) then weights the loss by the old policy's ratio to vLLM's.
        dppo_ratio_cap (`float`, *optional*):
            Upper bound of the ratio as a weight of the gradient, for `"dppo_tv"` and `"dppo_kl"`. The authors' code
            uses 3 to 20; `None` leaves the ratio as it is, like the paper's objective.
    """

    trust_region: str = field(
        default="drpo",
        metadata={
            "help": "What keeps the policy near the one that sampled the tokens: "
            + "; ".join(f"'{name}' ({region.summary})" for name, region in TRUST_REGIONS.items())
            + ".",
            "choices": list(TRUST_REGIONS),
        },
    )
    trust_region_radius: float | None = field(
        default=None,
        metadata={
            "help": "Radius of the trust region. None takes the region's default: "
            + ", ".join(
                f"{region.radius} for '{name}' (in {region.unit})"
                for name, region in TRUST_REGIONS.items()
                if region.radius is not None
            )
            + "."
        },
    )
    trust_region_anchor: str = field(
        default="sampler",
        metadata={
            "help": "What the trust region is around, where the rollout has the sampler's log-probabilities: "
            "'sampler' (the policy that drew the tokens) or 'old_policy' (the training model before the rollout "
            "batch's first update, with TRL's importance sampling correction for vLLM's difference from it).",
            "choices": list(ANCHORS),
        },
    )
    dppo_ratio_cap: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound of the ratio as a weight of the gradient, for 'dppo_tv' and 'dppo_kl'. None leaves "
            "the ratio as it is."
        },
    )

    def __post_init__(self) -> None:
        check_values(self, DRPOConfig)
        super().__post_init__()
        check_drpo_args(self, type(self).__name__)


def check_drpo_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError`, which says how to fix it, for settings that DRPO cannot honour."""
    check_policy_loss_args(args, owner)
    check_trust_region(args)
    check_choice("trust_region_anchor", args.trust_region_anchor, ANCHORS)
    cap = args.dppo_ratio_cap
    if cap is not None and not cap >= 1:
        raise ValueError(f"dppo_ratio_cap={cap} would weaken on-policy tokens too: set it to 1 or more, or to None.")
