"""Settings of [`RLADTrainer`]."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_ext.arguments import check_choice, check_policy_loss_args, check_values
from trl_ext.losses import DISTILLATIONS
from trl_ext.teacher.settings import TeacherSettings
from trl_ext.trust_regions import TRUST_REGIONS, check_trust_region


CHOICES = {
    "distillation": tuple(DISTILLATIONS),
    "kdrl_estimator": ("k2", "k3"),
    "kdrl_mask": ("none", "response", "group"),
}
# Read only where the teacher enters in that place
MIXTURE_SETTINGS = (
    "teacher_mixture_alpha",
    "teacher_mixture_alpha_end",
    "teacher_log_ratio_clip",
)
PENALTY_SETTINGS = (
    "kdrl_coef",
    "kdrl_coef_decay",
    "kdrl_coef_min",
    "kdrl_estimator",
    "kdrl_mask",
    "kdrl_correct_reward",
)


@dataclass
class RLADConfig(TeacherSettings, GRPOConfig):
    r"""
    Configuration class for the [`RLADTrainer`]: all of [`~trl.GRPOConfig`], the settings of the teacher
    ([`TeacherSettings`]), and how it is used.

    Parameters:
        distillation (`str`, *optional*, defaults to `"trrd"`):
            `"trrd"`: the teacher enters the ratio (RLAD). `"kdrl"`: GRPO plus a penalty on the distance to the
            teacher. `"trrd_and_kdrl"`: both.
        trust_region (`str`, *optional*, defaults to `"ppo_clip"`):
            What bounds the ratio: `"ppo_clip"` (the paper's, with `epsilon`, `epsilon_high` and `delta`), or one of
            DRPO's `"drpo"`, `"spo"`, `"dppo_tv"` and `"dppo_kl"`.
        trust_region_radius (`float`, *optional*):
            Radius of one of DRPO's regions; `None` takes the default that [`DRPOConfig`] lists.
        teacher_mixture_alpha (`float`, *optional*, defaults to `0.5`):
            For TRRD: the old student's exponent in the mixture of old student and teacher. 1 is GRPO, 0 is
            anchored to the teacher alone.
        teacher_mixture_alpha_end (`float`, *optional*, defaults to `1.0`):
            For TRRD: what `teacher_mixture_alpha` becomes, linearly, by the last step. `None`, or the value of
            `teacher_mixture_alpha`: it is constant, as in the paper.
        teacher_log_ratio_clip (`float`, *optional*, defaults to `1.0`):
            For TRRD: bound of the log-ratio of student to teacher, in nats. `None` for no bound.
        kdrl_coef (`float`, *optional*, defaults to `5e-3`):
            For KDRL: coefficient of the penalty at the first step.
        kdrl_coef_decay (`float`, *optional*, defaults to `0.0`):
            For KDRL: decrease of the coefficient per optimizer step.
        kdrl_coef_min (`float`, *optional*, defaults to `0.0`):
            For KDRL: lower bound of the coefficient.
        kdrl_estimator (`str`, *optional*, defaults to `"k2"`):
            For KDRL: estimator of the KL divergence, `"k2"` or `"k3"`.
        kdrl_mask (`str`, *optional*, defaults to `"none"`):
            For KDRL: `"response"` drops the penalty on correct responses, `"group"` on groups that hold one.
        kdrl_correct_reward (`float`, *optional*, defaults to `1.0`):
            For `kdrl_mask`: a response is correct whose (weighted, summed) reward is at least this.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012 - TRL's form

    distillation: str = field(
        default="trrd",
        metadata={
            "help": "'trrd': the teacher enters the policy ratio (RLAD). 'kdrl': GRPO plus a penalty on the distance "
            "to the teacher. 'trrd_and_kdrl': both.",
            "choices": list(CHOICES["distillation"]),
        },
    )
    trust_region: str = field(
        default="ppo_clip",
        metadata={
            "help": "What bounds the policy ratio: the paper's clip, or one of DRPO's regions.",
            "choices": list(TRUST_REGIONS),
        },
    )
    trust_region_radius: float | None = field(
        default=None, metadata={"help": "Radius of the trust region. None takes the region's default."}
    )
    teacher_mixture_alpha: float = field(
        default=0.5,
        metadata={"help": "For TRRD: exponent of the old student in its mixture with the teacher; 1 is GRPO."},
    )
    teacher_mixture_alpha_end: float | None = field(
        default=1.0,
        metadata={
            "help": "For TRRD: what teacher_mixture_alpha becomes, linearly, by the last step. In the paper it is "
            "constant: set this to the value of teacher_mixture_alpha."
        },
    )
    teacher_log_ratio_clip: float | None = field(
        default=1.0,
        metadata={"help": "For TRRD: bound of the log-ratio of student to teacher, in nats. None for no bound."},
    )
    kdrl_coef: float = field(
        default=5e-3, metadata={"help": "For KDRL: coefficient of the penalty at the first step."}
    )
    kdrl_coef_decay: float = field(
        default=0.0, metadata={"help": "For KDRL: decrease of the coefficient per optimizer step."}
    )
    kdrl_coef_min: float = field(default=0.0, metadata={"help": "For KDRL: lower bound of the coefficient."})
    kdrl_estimator: str = field(
        default="k2",
        metadata={"help": "For KDRL: estimator of the KL divergence.", "choices": list(CHOICES["kdrl_estimator"])},
    )
    kdrl_mask: str = field(
        default="none",
        metadata={
            "help": "For KDRL: 'response' drops the penalty on correct responses, 'group' on groups that hold one.",
            "choices": list(CHOICES["kdrl_mask"]),
        },
    )
    kdrl_correct_reward: float = field(
        default=1.0, metadata={"help": "For kdrl_mask: a response is correct whose reward is at least this."}
    )

    def __post_init__(self) -> None:
        check_values(self, RLADConfig)
        super().__post_init__()
        check_rlad_args(self, type(self).__name__)


def check_rlad_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError`, which says how to fix it, for settings that RLAD cannot honour."""
    check_policy_loss_args(args, owner)
    check_trust_region(args)
    for name, choices in CHOICES.items():
        check_choice(name, getattr(args, name), choices)
    for name in ("teacher_mixture_alpha", "teacher_mixture_alpha_end"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be from 0 (the teacher alone) to 1 (GRPO): set it between them.")
    clip = args.teacher_log_ratio_clip
    if clip is not None and not clip > 0:
        raise ValueError(
            f"teacher_log_ratio_clip={clip} must be positive: set it above 0, in nats, or to None for no bound."
        )
    for name in ("kdrl_coef", "kdrl_coef_decay", "kdrl_coef_min"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{name}={value} would push the student away from its teacher, or is not finite: set it to 0 or more."
            )


def settings_without_effect(args: GRPOConfig) -> tuple[str, ...]:
    """Names of RLAD's settings that are not read with `args.distillation` and `args.kdrl_mask`."""
    terms, names = DISTILLATIONS[args.distillation], tuple[str, ...]()
    if not terms.mixture:
        names += MIXTURE_SETTINGS
    if not terms.penalty:
        names += PENALTY_SETTINGS
    elif args.kdrl_mask == "none":
        names += ("kdrl_correct_reward",)
    return names
