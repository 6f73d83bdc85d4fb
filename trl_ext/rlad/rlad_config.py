"""Settings of [`RLADTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from trl_ext.arguments import check_policy_loss_args, check_types


@dataclass
class RLADConfig(GRPOConfig):
    r"""
    Configuration class for the [`RLADTrainer`]: all of [`~trl.GRPOConfig`], the teacher, and how it is used.

    Parameters:
        teacher_model_name_or_path (`str`, *optional*):
            Hub name or path of the teacher, where `teacher_model` is not passed to the trainer. With
            `teacher_model_server_url`: the name of the served model, whose tokenizer is then checked.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher.
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            For the teacher's `from_pretrained`: `dtype` (default `"auto"`), `quantization_config`, ...
        teacher_model_server_url (`str`, *optional*):
            URL of a vLLM server that holds the teacher.
        teacher_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for that server at the start, and for each of its answers.
        distillation (`str`, *optional*, defaults to `"trrd"`):
            `"trrd"`: the teacher enters the ratio (RLAD). `"kdrl"`: GRPO plus a penalty on the distance to the
            teacher.
        teacher_mixture_alpha (`float`, *optional*, defaults to `0.5`):
            For `"trrd"`: the old student's exponent in the mixture of old student and teacher. 1 is GRPO, 0 is
            anchored to the teacher alone.
        teacher_log_ratio_clip (`float`, *optional*, defaults to `1.0`):
            For `"trrd"`: bound of the log-ratio of student to teacher, in nats. `None` for no bound.
        kdrl_coef (`float`, *optional*, defaults to `2e-3`):
            For `"kdrl"`: coefficient of the penalty at the first step.
        kdrl_coef_decay (`float`, *optional*, defaults to `0.0`):
            For `"kdrl"`: what the coefficient loses each optimizer step.
        kdrl_coef_min (`float`, *optional*, defaults to `0.0`):
            For `"kdrl"`: where that ends.
        kdrl_estimator (`str`, *optional*, defaults to `"k2"`):
            For `"kdrl"`: estimator of the KL divergence, `"k2"` or `"k3"`.
        kdrl_mask (`str`, *optional*, defaults to `"none"`):
            For `"kdrl"`: `"response"` drops the penalty on correct responses, `"group"` on groups that hold one.
        kdrl_correct_reward (`float`, *optional*, defaults to `1.0`):
            For `kdrl_mask`: a response is correct whose (weighted, summed) reward is at least this.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012 - TRL's form

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or path of the teacher, or of the model that the server serves."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the teacher's `from_pretrained`."}
    )
    teacher_model_server_url: str | None = field(
        default=None, metadata={"help": "URL of a vLLM server that holds the teacher."}
    )
    teacher_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the teacher server at the start and for each answer."}
    )
    distillation: str = field(
        default="trrd",
        metadata={
            "help": "'trrd': the teacher enters the policy ratio (RLAD). 'kdrl': GRPO plus a penalty on the distance "
            "to the teacher.",
            "choices": ["trrd", "kdrl"],
        },
    )
    teacher_mixture_alpha: float = field(
        default=0.5,
        metadata={"help": "For 'trrd': exponent of the old student in its mixture with the teacher; 1 is GRPO."},
    )
    teacher_log_ratio_clip: float | None = field(
        default=1.0,
        metadata={"help": "For 'trrd': bound of the log-ratio of student to teacher, in nats. None for no bound."},
    )
    kdrl_coef: float = field(
        default=2e-3, metadata={"help": "For 'kdrl': coefficient of the penalty at the first step."}
    )
    kdrl_coef_decay: float = field(
        default=0.0, metadata={"help": "For 'kdrl': what the coefficient loses each optimizer step."}
    )
    kdrl_coef_min: float = field(default=0.0, metadata={"help": "For 'kdrl': where the decay ends."})
    kdrl_estimator: str = field(
        default="k2", metadata={"help": "For 'kdrl': estimator of the KL divergence.", "choices": ["k2", "k3"]}
    )
    kdrl_mask: str = field(
        default="none",
        metadata={
            "help": "For 'kdrl': 'response' drops the penalty on correct responses, 'group' on groups that hold one.",
            "choices": ["none", "response", "group"],
        },
    )
    kdrl_correct_reward: float = field(
        default=1.0, metadata={"help": "For kdrl_mask: a response is correct whose reward is at least this."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self, RLADConfig)
        check_rlad_args(self, type(self).__name__)


def check_rlad_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError`, in one sentence with the mend, for settings that RLAD cannot honour."""
    check_policy_loss_args(args, owner)
    for name, choices in (
        ("distillation", ("trrd", "kdrl")),
        ("kdrl_estimator", ("k2", "k3")),
        ("kdrl_mask", ("none", "response", "group")),
    ):
        if getattr(args, name) not in choices:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is unknown: set it to one of {', '.join(map(repr, choices))}."
            )
    if not 0 <= args.teacher_mixture_alpha <= 1:
        raise ValueError(
            f"teacher_mixture_alpha={args.teacher_mixture_alpha} is no share of a mixture: set it between 0 (the "
            "teacher alone) and 1 (GRPO)."
        )
    if args.teacher_log_ratio_clip is not None and not args.teacher_log_ratio_clip > 0:
        raise ValueError(
            f"teacher_log_ratio_clip={args.teacher_log_ratio_clip} leaves nothing of the teacher: set a positive "
            "number of nats, or None for no bound."
        )
    for name in ("kdrl_coef", "kdrl_coef_decay", "kdrl_coef_min"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)} would push the student away: set it to 0 or more.")
