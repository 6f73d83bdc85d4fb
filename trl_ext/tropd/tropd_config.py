"""Settings of [`TrOPDTrainer`]."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from trl.experimental.gkd import GKDConfig

from trl_ext.arguments import check_types
from trl_ext.losses import GUIDANCE_SCHEDULES, OUTLIER_LOSSES
from trl_ext.teacher.settings import TeacherSettings
from trl_ext.tropd.objective import OBJECTIVES, unused_settings
from trl_ext.tropd.vllm_settings import VLLMSettings


CHOICES: dict[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "trust_region": ("sampled", "expected"),
    "outlier_loss": OUTLIER_LOSSES,
    "guidance": ("none", "dataset", "teacher"),
    "guidance_schedule": GUIDANCE_SCHEDULES,
    "guidance_prefix": ("random", "longest"),
    "vllm_mode": ("colocate", "server"),
}


@dataclass
class TrOPDConfig(VLLMSettings, TeacherSettings, GKDConfig):
    r"""
    Configuration class for the [`TrOPDTrainer`]: all of [`~trl.experimental.gkd.GKDConfig`], whose `lmbda` and
    `temperature` have another default here; the settings of generation with vLLM ([`VLLMSettings`]); who the
    teacher is ([`TeacherSettings`]); and those below.

    Parameters:
        objective (`str`, *optional*, defaults to `"tropd"`):
            `"tropd"`, or one of the baselines `"opd"` (K1 on every token), `"eopd"`, `"reopold"`.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of the prompts whose completion the student samples. The others take the dataset's completion (with
            `seq_kd` a sample of the teacher's) and minimise the forward KL divergence to the teacher on its top-k.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the samples and of all log-probabilities, the student's and the teacher's.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. Batch sizes count completions.
        trust_region (`str`, *optional*, defaults to `"sampled"`):
            For `"tropd"`. `"sampled"`: whether a token is trusted is drawn, as in the paper. `"expected"`: the
            probability takes the draw's place; same expectation, less variance.
        outlier_loss (`str`, *optional*, defaults to `"forward_kl"`):
            For `"tropd"`, what outliers contribute: `"forward_kl"` on the teacher's top-k, `"clip"` (K1 with a floored
            reward), `"forward_kl_and_clip"` (both, which is ours and not the paper's) or `"mask"` (nothing).
        outlier_top_k (`int`, *optional*, defaults to `64`):
            Number of the teacher's likeliest tokens in the forward KL divergence.
        outlier_clip_floor (`float`, *optional*, defaults to `-1.0`):
            For the outlier losses that clip: floor of the reward, in nats. The paper gives no value; this one is ours.
        outlier_clip_coef (`float`, *optional*, defaults to `1.0`):
            For the outlier losses that clip: coefficient of the clipped term. The paper's is 1.
        guidance (`str`, *optional*, defaults to `"none"`):
            Where rollouts get a prefix from: `"dataset"` (completions that the teacher wrote), `"teacher"` (sampled
            when needed) or nowhere.
        guidance_coef (`float`, *optional*, defaults to `1e-3`):
            Coefficient of the negative log-likelihood of a prefix.
        guidance_max_length (`int`, *optional*):
            Longest prefix at the first step, in tokens. Defaults to `max_new_tokens`.
        guidance_schedule (`str`, *optional*, defaults to `"cosine"`):
            How that falls to 0 over the run: `"cosine"` (the paper's), `"linear"`, or not: `"constant"`.
        guidance_prefix (`str`, *optional*, defaults to `"random"`):
            `"random"`: lengths uniform up to the longest that the schedule and the completion allow. `"longest"`: that
            one. The paper leaves it open; with `"longest"` the first rollouts are hardly the student's.
        guidance_share (`float`, *optional*, defaults to `1.0`):
            Share of the rollouts that are guided.
        eopd_top_k (`int`, *optional*, defaults to `16`):
            For `"eopd"`: number of the teacher's likeliest tokens in the forward KL divergence.
        eopd_entropy_threshold (`float`, *optional*, defaults to `0.8`):
            For `"eopd"`: entropy of the teacher, in nats, above which that is added.
        reopold_floor (`float`, *optional*, defaults to `-1.72`):
            For `"reopold"`: floor of the reward, in nats.
        reopold_switch_step (`int`, *optional*):
            For `"reopold"`: optimizer step from which only uncertain tokens count. Defaults to half of the run, which
            is our choice.
        reopold_top_entropy_share (`float`, *optional*, defaults to `0.2`):
            For `"reopold"`: share of each step's tokens that then count.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under ZeRO-3: whether to gather the weights for generation, as in [`~trl.GRPOConfig`].
    """

    objective: str = field(
        default="tropd",
        metadata={
            "help": "; ".join(f"{name!r}: {row.summary}" for name, row in OBJECTIVES.items()) + ".",
            "choices": list(CHOICES["objective"]),
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of the prompts whose completion the student samples; the others take the dataset's, or "
            "with seq_kd the teacher's."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the samples and of all log-probabilities."}
    )
    num_generations: int = field(
        default=1, metadata={"help": "Completions per prompt. Batch sizes count completions."}
    )
    trust_region: str = field(
        default="sampled",
        metadata={
            "help": "'sampled': whether a token is trusted is drawn. 'expected': its probability takes the draw's "
            "place.",
            "choices": list(CHOICES["trust_region"]),
        },
    )
    outlier_loss: str = field(
        default="forward_kl",
        metadata={
            "help": "What outliers contribute: 'forward_kl' on the teacher's top-k, 'clip' (K1, floored), "
            "'forward_kl_and_clip' or 'mask'.",
            "choices": list(CHOICES["outlier_loss"]),
        },
    )
    outlier_top_k: int = field(
        default=64, metadata={"help": "Number of the teacher's likeliest tokens in the forward KL divergence."}
    )
    outlier_clip_floor: float = field(
        default=-1.0, metadata={"help": "For the outlier losses that clip: floor of the reward, in nats."}
    )
    outlier_clip_coef: float = field(
        default=1.0, metadata={"help": "For the outlier losses that clip: coefficient of the clipped term."}
    )
    guidance: str = field(
        default="none",
        metadata={
            "help": "Where rollouts get a prefix from: 'none', 'dataset' (completions that the teacher wrote) or "
            "'teacher' (sampled when needed).",
            "choices": list(CHOICES["guidance"]),
        },
    )
    guidance_coef: float = field(
        default=1e-3, metadata={"help": "Coefficient of the negative log-likelihood of a prefix."}
    )
    guidance_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prefix at the first step, in tokens. Defaults to max_new_tokens."},
    )
    guidance_schedule: str = field(
        default="cosine",
        metadata={
            "help": "How the longest prefix falls to 0 over the run: 'cosine', 'linear', or not: 'constant'.",
            "choices": list(CHOICES["guidance_schedule"]),
        },
    )
    guidance_prefix: str = field(
        default="random",
        metadata={
            "help": "'random': lengths uniform up to the longest. 'longest': that one.",
            "choices": list(CHOICES["guidance_prefix"]),
        },
    )
    guidance_share: float = field(default=1.0, metadata={"help": "Share of the rollouts that are guided."})
    eopd_top_k: int = field(
        default=16, metadata={"help": "For 'eopd': number of the teacher's likeliest tokens in its forward KL."}
    )
    eopd_entropy_threshold: float = field(
        default=0.8, metadata={"help": "For 'eopd': entropy of the teacher, in nats, above which that is added."}
    )
    reopold_floor: float = field(default=-1.72, metadata={"help": "For 'reopold': floor of the reward, in nats."})
    reopold_switch_step: int | None = field(
        default=None,
        metadata={"help": "For 'reopold': step from which only uncertain tokens count. Defaults to half of the run."},
    )
    reopold_top_entropy_share: float = field(
        default=0.2, metadata={"help": "For 'reopold': share of each step's tokens that then count."}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Under ZeRO-3: whether to gather the weights for generation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self, TrOPDConfig)
        check_tropd_args(self)


def check_tropd_args(args: Any) -> None:
    """Raises a `ValueError`, in one sentence with the mend, for settings that TrOPD cannot honour."""
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is unknown: set it to one of {', '.join(map(repr, choices))}."
            )
    for name in ("outlier_top_k", "eopd_top_k", "num_generations", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} leaves nothing to compute: set it to 1 or more.")
    for name in ("guidance_share", "reopold_top_entropy_share", "lmbda"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{name}={getattr(args, name)} is no share: set it between 0 and 1.")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"temperature={args.temperature} is nothing to sample at: set it above 0.")
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"max_length={args.max_length} leaves nothing of a prompt: set it to 1 or more, or to None.")
    for name, trained in {"guidance_coef": "the prefixes", "outlier_clip_coef": "what the teacher prefers"}.items():
        if not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(f"{name}={getattr(args, name)} would unlearn {trained}: set it to 0 or more.")
    if args.guidance_max_length is not None and args.guidance_max_length < 0:
        raise ValueError(f"guidance_max_length={args.guidance_max_length} is no length: set it to 0 or more.")
    for name in ("outlier_clip_floor", "reopold_floor"):
        if not getattr(args, name) <= 0:
            raise ValueError(
                f"{name}={getattr(args, name)} would reward tokens that the teacher finds worse: set it to 0 nats or "
                "less."
            )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} goes by the length of rows, but completions "
            "are sampled anew: set it to 'random' or 'sequential'."
        )
    for name in ("packing", "padding_free", "assistant_only_loss"):
        if getattr(args, name):
            raise ValueError(
                f"TrOPDTrainer trains on completions that it samples itself, for which {name}=True means nothing: "
                f"leave {name} out."
            )
    if args.label_smoothing_factor > 0 or args.loss_type != "nll":
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} and loss_type={args.loss_type!r} are of a "
            "likelihood loss, which TrOPDTrainer has not: leave them at 0 and 'nll', and choose an objective."
        )


def settings_without_effect(args: Any) -> tuple[str, ...]:
    """Names of the settings that the values of others leave without an effect."""
    names = {
        "average_tokens_across_devices",
        "beta",
        "completion_only_loss",
        "dataset_num_proc",
        "dataset_text_field",
        "eval_packing",
        "packing_strategy",
        "shuffle_dataset",
        "truncation_mode",
    } | unused_settings(args)
    if args.pad_to_multiple_of is not None:  # the default, "auto", becomes None
        names.add("pad_to_multiple_of")
    if args.lmbda == 1:
        names.add("seq_kd")
    prefixes = {"guidance_": args.guidance != "none", "vllm_": args.use_vllm}
    for prefix, in_use in prefixes.items():
        if not in_use:
            names |= {setting.name for setting in fields(args) if setting.name.startswith(prefix)}
    return tuple(sorted(names))
