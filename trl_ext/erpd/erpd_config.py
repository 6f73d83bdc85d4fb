"""Settings of [`ERPDTrainer`]."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_ext.arguments import check_values
from trl_ext.erpd.checks import CHOICES, check_erpd_args
from trl_ext.trust_regions import TRUST_REGIONS


@dataclass
class ERPDConfig(GRPOConfig):
    r"""
    Configuration class for the [`ERPDTrainer`]: all of [`~trl.GRPOConfig`], and the two stages.

    GRPO's own settings of the update (`learning_rate`, `lr_scheduler_type`, `warmup_steps`, `beta`, `loss_type`, ...)
    apply to stage 2, whose policy is the result; `epsilon` only with `distillation_epsilon=None`. `num_generations` is
    the number of rollouts per prompt; the paper uses 16.

    Parameters:
        rounds (`int`, *optional*, defaults to `1`):
            How often the two stages run, each time from the result of the previous round.
        prompts_per_round (`int`, *optional*):
            Number of prompts in the fixed set of a round. `None`: 1000 as in the paper, or all of a smaller dataset,
            rounded down to whole batches.
        extraction_loss (`str` or `list[str]`, *optional*, defaults to `"mse"`):
            Objective of stage 1: `"sapo"`, `"ce"` or `"mse"`. A list trains one teacher for each.
        extraction_passes (`int`, *optional*, defaults to `6`):
            Passes over the set in stage 1, for each policy that is trained there.
        extraction_learning_rate (`float`, *optional*):
            Learning rate of stage 1. `None`: `learning_rate`.
        extraction_warmup_steps (`float`, *optional*, defaults to `0`):
            Warm-up of stage 1: a number of updates, or a share of them if below 1.
        extraction_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule of stage 1.
        extraction_beta (`float`, *optional*, defaults to `0.5`):
            \\( \beta_r \\), the scale of the implicit reward of `"ce"` and `"mse"`, in 1 / nats.
        extraction_skips_agreeing_prompts (`bool`, *optional*, defaults to `False`):
            Whether `"ce"` and `"mse"` leave out the prompts whose rollouts all have the same reward, which still count
            in the mean over sequences. `"sapo"` always does, because their advantage is 0.
        signal (`str` or `list[str]`, *optional*, defaults to `"unlearned_reference"`):
            What is distilled: `"teacher"`, `"unlearned_reference"` or `"unlearned_teacher"`. One for all teachers, or
            one per teacher.
        signal_weights (`list[float]`, *optional*):
            Weight of each teacher's signal. `None`: equal weights that sum to 1.
        signal_normalization (`str`, *optional*, defaults to `"standardize"`):
            How the signal is normalized over the tokens of the set: `"standardize"` (to mean 0 and standard deviation
            1), `"scale"` (to standard deviation 1 only) or `"none"`.
        signal_clip (`float`, *optional*, defaults to `2.0`):
            Bound of the normalized signal. `None`: no bound.
        distillation_passes (`int`, *optional*, defaults to `8`):
            Passes over the set in stage 2.
        distillation_learning_rate_decay (`float`, *optional*, defaults to `0.5`):
            Factor of stage 2's learning rate from one round to the next, above 0. 1: the same rate in every round.
        distillation_epsilon (`float`, *optional*, defaults to `0.3`):
            Clip range of stage 2 below ratio 1, with `trust_region="ppo_clip"`. `None`: `epsilon`, as in GRPO.
        distillation_epsilon_high (`float`, *optional*, defaults to `1.0`):
            The same above ratio 1; `epsilon_high`, where it is set, is used instead. `None`: as below.
        distillation_anchor (`str`, *optional*, defaults to `"base"`):
            Center of the trust region of stage 2: `"base"`, the base policy throughout; `"pass"`, the policy at the
            start of each pass over the set, which takes one more pass of scoring each time.
        trust_region (`str`, *optional*, defaults to `"ppo_clip"`):
            Trust region of stage 2: `"ppo_clip"` (`distillation_epsilon`, `distillation_epsilon_high`, `delta`),
            or one of [`DRPOConfig`]'s `"drpo"`, `"spo"`, `"dppo_tv"` and `"dppo_kl"` (`trust_region_radius`).
        trust_region_radius (`float`, *optional*):
            For all regions but `"ppo_clip"`, in the region's own unit. `None`: the default in [`DRPOConfig`].
        outcome_advantage_weight (`float`, *optional*, defaults to `0.5`):
            Weight of GRPO's outcome advantage, which is added to the signal in stage 2. 0: the signal alone.
        keep_teachers (`bool`, *optional*, defaults to `False`):
            Whether the policies of stage 1 are saved, to `output_dir/round-1/teacher_ce` and so on.
    """

    rounds: int = field(
        default=1, metadata={"help": "How often the two stages run, each time from the previous result."}
    )
    prompts_per_round: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of a round's fixed set. None: 1000, or all of a smaller dataset, in whole batches."
        },
    )
    extraction_loss: str | list[str] = field(
        default_factory=lambda: ["mse"],
        metadata={"help": "Stage 1's objective: 'sapo', 'ce' or 'mse'. A list trains one teacher for each."},
    )
    extraction_passes: int = field(
        default=6, metadata={"help": "Passes over the set in stage 1, for each policy trained there."}
    )
    extraction_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of stage 1. None: learning_rate, which is stage 2's."}
    )
    extraction_warmup_steps: float = field(
        default=0, metadata={"help": "Warm-up of stage 1: a number of updates, or a share of them if below 1."}
    )
    extraction_lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning rate schedule of stage 1."}
    )
    extraction_beta: float = field(
        default=0.5, metadata={"help": "Scale of the implicit reward of 'ce' and 'mse', in 1 / nats."}
    )
    extraction_skips_agreeing_prompts: bool = field(
        default=False,
        metadata={"help": "Whether 'ce' and 'mse' leave out the prompts whose rollouts all have the same reward."},
    )
    signal: str | list[str] = field(
        default_factory=lambda: ["unlearned_reference"],
        metadata={
            "help": "What is distilled: 'teacher', 'unlearned_reference' or 'unlearned_teacher'. One for all "
            "teachers, or one per teacher."
        },
    )
    signal_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each teacher's signal. None: equal weights that sum to 1."}
    )
    signal_normalization: str = field(
        default="standardize",
        metadata={
            "help": "How the signal is normalized over the tokens of the set: 'standardize' (to mean 0 and standard "
            "deviation 1), 'scale' (to standard deviation 1 only) or 'none'.",
            "choices": list(CHOICES["signal_normalization"]),
        },
    )
    signal_clip: float | None = field(
        default=2.0, metadata={"help": "Bound of the normalized signal. None: no bound."}
    )
    distillation_passes: int = field(default=8, metadata={"help": "Passes over the set in stage 2."})
    distillation_learning_rate_decay: float = field(
        default=0.5, metadata={"help": "Factor of stage 2's learning rate from one round to the next."}
    )
    distillation_epsilon: float | None = field(
        default=0.3,
        metadata={"help": "Clip range of stage 2 below ratio 1, with trust_region='ppo_clip'. None: epsilon."},
    )
    distillation_epsilon_high: float | None = field(
        default=1.0,
        metadata={"help": "The same above ratio 1; epsilon_high, where set, is used instead. None: as below."},
    )
    distillation_anchor: str = field(
        default="base",
        metadata={
            "help": "Center of the trust region of stage 2: 'base', the base policy, or 'pass', the policy at the "
            "start of each pass over the set.",
            "choices": list(CHOICES["distillation_anchor"]),
        },
    )
    trust_region: str = field(
        default="ppo_clip",
        metadata={
            "help": "Of stage 2: 'ppo_clip' (distillation_epsilon, distillation_epsilon_high, delta), or another "
            "region with its trust_region_radius.",
            "choices": list(TRUST_REGIONS),
        },
    )
    trust_region_radius: float | None = field(
        default=None,
        metadata={"help": "Radius of stage 2's trust region, in the region's own unit. None: the region's default."},
    )
    outcome_advantage_weight: float = field(
        default=0.5, metadata={"help": "Weight of GRPO's outcome advantage, which is added to the signal in stage 2."}
    )
    keep_teachers: bool = field(default=False, metadata={"help": "Whether the policies of stage 1 are saved."})

    def __post_init__(self) -> None:
        check_values(self, ERPDConfig)
        super().__post_init__()
        check_erpd_args(self, type(self).__name__)
