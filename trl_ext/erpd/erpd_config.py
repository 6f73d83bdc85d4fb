"""Settings of [`ERPDTrainer`]."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from trl import GRPOConfig

from trl_ext.arguments import changed_settings, check_policy_loss_args
from trl_ext.drpo.drpo_config import DEFAULT_RADIUS
from trl_ext.erpd.schedule import LearningRate, Phase
from trl_ext.losses.signal import SIGNALS


EXTRACTION_LOSSES = ("sapo", "ce", "mse")
CHOICES: dict[str, tuple[str, ...]] = {
    "extraction_loss": EXTRACTION_LOSSES,
    "signal": tuple(SIGNALS),
    "signal_normalization": ("standardize", "scale", "none"),
    "trust_region": ("ppo_clip", "drpo"),
    "distillation_anchor": ("base", "pass"),
}


@dataclass
class ERPDConfig(GRPOConfig):
    r"""
    Configuration class for the [`ERPDTrainer`]: all of [`~trl.GRPOConfig`], and the two stages.

    GRPO's own settings of the update (`learning_rate`, `lr_scheduler_type`, `warmup_steps`, `beta`, `epsilon`,
    `loss_type`, ...) are those of stage 2, which makes the policy that remains. `num_generations` is the number of
    rollouts a prompt; the paper has 16.

    Parameters:
        rounds (`int`, *optional*, defaults to `1`):
            How often the two stages run, each time from the result of the last.
        prompts_per_round (`int`, *optional*):
            Prompts of the fixed set of a round. `None`: 1000 as in the paper, or as many as the data set has, rounded
            down to whole batches.
        extraction_loss (`str` or `list[str]`, *optional*, defaults to `"ce"`):
            Stage 1's objective, `"sapo"`, `"ce"` or `"mse"`; several make several teachers.
        extraction_passes (`int`, *optional*, defaults to `16`):
            Passes over the set in stage 1, for each policy that is trained there.
        extraction_learning_rate (`float`, *optional*):
            Learning rate of stage 1. `None`: `learning_rate`.
        extraction_warmup_steps (`float`, *optional*, defaults to `0`):
            Warm-up of stage 1, in updates, or below 1 as a share of them.
        extraction_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Course of the learning rate over stage 1.
        extraction_beta (`float`, *optional*, defaults to `0.5`):
            \\( \beta_r \\), the scale of the implicit reward of `"ce"` and `"mse"`, in 1 / nats.
        signal (`str` or `list[str]`, *optional*, defaults to `"teacher"`):
            What is distilled: `"teacher"`, `"unlearned_reference"` or `"unlearned_teacher"`. One for all teachers, or
            one each.
        signal_weights (`list[float]`, *optional*):
            Weight of each teacher's signal. `None`: all 1, divided by their number.
        signal_normalization (`str`, *optional*, defaults to `"standardize"`):
            Over the tokens of the set: `"standardize"` (mean 0, standard deviation 1), `"scale"` (only the latter) or
            `"none"`.
        signal_clip (`float`, *optional*, defaults to `5.0`):
            Bound of the normalised signal. `None` for no bound.
        distillation_passes (`int`, *optional*, defaults to `4`):
            Passes over the set in stage 2.
        distillation_anchor (`str`, *optional*, defaults to `"base"`):
            What stage 2's trust region is around: `"base"`, the base policy throughout; `"pass"`, the policy at the
            start of each pass over the set, which costs a pass of scoring each.
        trust_region (`str`, *optional*, defaults to `"ppo_clip"`):
            Of stage 2: `"ppo_clip"` (`epsilon`, `epsilon_high`, `delta`) or `"drpo"` (`trust_region_radius`).
        trust_region_radius (`float`, *optional*):
            For `"drpo"`, in absolute probability. `None`: 0.15.
        outcome_advantage_weight (`float`, *optional*, defaults to `0.0`):
            What of GRPO's outcome advantage is added to the signal in stage 2.
        keep_teachers (`bool`, *optional*, defaults to `False`):
            Whether the policies of stage 1 are saved, to `output_dir/round-1/teacher_ce` and so on.
    """

    rounds: int = field(default=1, metadata={"help": "How often the two stages run, each time from the last result."})
    prompts_per_round: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of a round's fixed set. None: 1000, or all of a smaller data set, in whole batches."
        },
    )
    extraction_loss: str | list[str] = field(
        default="ce", metadata={"help": "Stage 1's objective: 'sapo', 'ce' or 'mse'. Several make several teachers."}
    )
    extraction_passes: int = field(
        default=16, metadata={"help": "Passes over the set in stage 1, for each policy trained there."}
    )
    extraction_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of stage 1. None: learning_rate, which is stage 2's."}
    )
    extraction_warmup_steps: float = field(
        default=0, metadata={"help": "Warm-up of stage 1, in updates, or below 1 as a share of them."}
    )
    extraction_lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Course of the learning rate over stage 1."}
    )
    extraction_beta: float = field(
        default=0.5, metadata={"help": "Scale of the implicit reward of 'ce' and 'mse', in 1 / nats."}
    )
    signal: str | list[str] = field(
        default="teacher",
        metadata={
            "help": "What is distilled: 'teacher', 'unlearned_reference' or 'unlearned_teacher'. One for all "
            "teachers, or one each."
        },
    )
    signal_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each teacher's signal. None: all alike, with the sum 1."}
    )
    signal_normalization: str = field(
        default="standardize",
        metadata={
            "help": "Over the tokens of the set: 'standardize' (mean 0, standard deviation 1), 'scale' (only the "
            "latter) or 'none'.",
            "choices": list(CHOICES["signal_normalization"]),
        },
    )
    signal_clip: float | None = field(
        default=5.0, metadata={"help": "Bound of the normalised signal. None for no bound."}
    )
    distillation_passes: int = field(default=4, metadata={"help": "Passes over the set in stage 2."})
    distillation_anchor: str = field(
        default="base",
        metadata={
            "help": "What stage 2's trust region is around: 'base', the base policy, or 'pass', the policy at the "
            "start of each pass over the set.",
            "choices": list(CHOICES["distillation_anchor"]),
        },
    )
    trust_region: str = field(
        default="ppo_clip",
        metadata={
            "help": "Of stage 2: 'ppo_clip' (epsilon, epsilon_high, delta) or 'drpo' (trust_region_radius).",
            "choices": list(CHOICES["trust_region"]),
        },
    )
    trust_region_radius: float | None = field(
        default=None, metadata={"help": "For trust_region='drpo', in absolute probability. None: 0.15."}
    )
    outcome_advantage_weight: float = field(
        default=0.0, metadata={"help": "What of GRPO's outcome advantage is added to the signal in stage 2."}
    )
    keep_teachers: bool = field(default=False, metadata={"help": "Whether the policies of stage 1 are saved."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_erpd_args(self, type(self).__name__)


class Teacher(NamedTuple):
    """One teacher of stage 1, and what stage 2 takes of it."""

    loss: str
    signal: str
    weight: float


def teachers_of(args: GRPOConfig) -> list[Teacher]:
    """The teachers that the settings ask for."""
    losses, signals = _as_list(args.extraction_loss), _as_list(args.signal)
    signals = signals * len(losses) if len(signals) == 1 else signals
    weights = [1 / len(losses)] * len(losses) if args.signal_weights is None else args.signal_weights
    return [Teacher(*settings) for settings in zip(losses, signals, weights, strict=True)]


def phases_of(args: GRPOConfig) -> list[Phase]:
    """All phases of a run: in each round the policies that the signals need, then the distilled one."""
    height = args.learning_rate if args.extraction_learning_rate is None else args.extraction_learning_rate
    extraction = LearningRate(height, args.extraction_lr_scheduler_type, args.extraction_warmup_steps)
    distillation = LearningRate(args.learning_rate, _value(args.lr_scheduler_type), args.warmup_steps or 0)
    phases = []
    for number in range(1, args.rounds + 1):
        for index, teacher in enumerate(teachers_of(args)):
            for policy in ("teacher", "unlearned"):
                if policy in SIGNALS[teacher.signal]:
                    phases.append(Phase(number, policy, index, teacher.loss, args.extraction_passes, extraction))
        phases.append(Phase(number, "distilled", 0, "distillation", args.distillation_passes, distillation))
    return phases


def resolve_prompts_per_round(args: GRPOConfig, num_prompts: int) -> int:
    """The size of the set: whole optimizer steps and whole generations, or a `ValueError` that says what to set."""
    update = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    unit = math.lcm(update, args.generation_batch_size) // args.num_generations
    wanted, smaller = args.prompts_per_round, "per_device_train_batch_size, gradient_accumulation_steps or "
    smaller += "steps_per_generation"
    if num_prompts < unit:
        raise ValueError(
            f"The data set's {num_prompts} prompts with {args.num_generations} rollouts each are less than one batch, "
            f"which takes {unit} prompts: give more prompts, or lower {smaller}."
        )
    if wanted is None:
        return max(min(1000, num_prompts) // unit, 1) * unit
    if wanted > num_prompts:
        raise ValueError(
            f"prompts_per_round={wanted} is more than the data set has: set it to {num_prompts // unit * unit} or "
            "less."
        )
    if wanted < unit:
        raise ValueError(
            f"prompts_per_round={wanted} with {args.num_generations} rollouts each is less than one batch: set it to "
            f"{unit}, or lower {smaller}."
        )
    if wanted % unit:
        raise ValueError(
            f"prompts_per_round={wanted} does not make whole batches of {unit} prompts with {args.num_generations} "
            f"rollouts each: set it to {wanted // unit * unit}."
        )
    return wanted


def check_erpd_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError`, in one sentence with the mend, for settings that ERPD cannot honour."""
    check_policy_loss_args(args, owner)
    for name, choices in CHOICES.items():
        for value in _as_list(getattr(args, name)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown: set it to one of {', '.join(map(repr, choices))}.")
    losses, signals, weights = _as_list(args.extraction_loss), _as_list(args.signal), args.signal_weights
    if not losses:
        raise ValueError("extraction_loss is empty, so that there is no teacher: set it to 'ce', for example.")
    if len(set(losses)) < len(losses):
        raise ValueError(f"extraction_loss={losses} names a loss twice, and twice the same teacher: name each once.")
    if len(signals) not in (1, len(losses)):
        raise ValueError(f"There are {len(losses)} teachers and {len(signals)} signals: give one signal, or one each.")
    if weights is not None and len(weights) != len(losses):
        raise ValueError(f"There are {len(losses)} teachers and {len(weights)} signal_weights: give one each.")
    if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
        raise ValueError(f"signal_weights={weights} leave nothing to distil: give finite numbers, not all 0.")
    for name in ("rounds", "extraction_passes", "distillation_passes"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} leaves nothing to train: set it to 1 or more.")
    for name in ("learning_rate", "extraction_learning_rate", "extraction_beta", "signal_clip", "trust_region_radius"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a positive number: set it to one.")
    if not math.isfinite(args.outcome_advantage_weight) or not args.extraction_warmup_steps >= 0:
        raise ValueError(
            f"outcome_advantage_weight={args.outcome_advantage_weight} must be finite and extraction_warmup_steps="
            f"{args.extraction_warmup_steps} at least 0: set them so."
        )
    if args.trust_region_radius is not None and args.trust_region != "drpo":
        raise ValueError(
            f"trust_region_radius={args.trust_region_radius} has no meaning for trust_region={args.trust_region!r}: "
            "remove it and set epsilon, or set trust_region to 'drpo'."
        )
    _check_trl_args(args, owner)


def _check_trl_args(args: GRPOConfig, owner: str) -> None:
    """Settings of GRPO and transformers that have no place in a run of two stages."""
    if changed := changed_settings(args, ("max_steps", "num_train_epochs")):
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise ValueError(
            f"{settings} would end {owner}'s run within a stage, because rounds, passes and the set say how long it "
            "is: remove it, and set prompts_per_round, extraction_passes, distillation_passes or rounds."
        )
    if args.num_iterations != 1:
        raise ValueError(
            f"num_iterations={args.num_iterations} has no meaning where a fixed set is passed over: set it to 1, and "
            "extraction_passes and distillation_passes to the passes you want."
        )
    for name in ("extraction_lr_scheduler_type", "lr_scheduler_type"):
        if _value(getattr(args, name)) in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"{name}={_value(getattr(args, name))!r} goes by evaluations and cannot start anew with each stage: "
                "set it to 'constant', 'linear' or 'cosine', for example."
            )
    refused = {
        "off_policy_mask_threshold": (None, "judges a sequence by its one advantage, and here each token has its own"),
        "sync_ref_model": (False, "moves the reference, which is the base policy of each round"),
        "load_best_model_at_end": (
            False,
            "would load a checkpoint of whatever stage in place of the distilled policy",
        ),
        "ignore_data_skip": (False, "would make a resumed run begin its pass over the set again"),
    }
    for name, (value, reason) in refused.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name}={getattr(args, name)} {reason}: set it to {value}.")
    if str(_value(args.optim)).startswith("schedule_free"):
        raise ValueError(
            f"optim={_value(args.optim)!r} keeps its averages outside of its state, which each stage starts without: "
            "set it to 'adamw_torch_fused', for example."
        )


def default_radius(args: GRPOConfig) -> float:
    """The radius in use with `trust_region="drpo"`."""
    return DEFAULT_RADIUS["drpo"] if args.trust_region_radius is None else args.trust_region_radius


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _value(setting) -> str:
    """The string of a setting that may be an enumeration's member."""
    return getattr(setting, "value", setting)
