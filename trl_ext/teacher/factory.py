"""Makes the teacher that the arguments name."""

from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from trl_ext.teacher.adapter import AdapterTeacher
from trl_ext.teacher.base import Teacher
from trl_ext.teacher.model import ModelTeacher


logger = get_logger(__name__)


def make_teacher(teacher: Any, student: Any, args: Any, trainer: str) -> Teacher:
    """
    The [`Teacher`] that the arguments name. Nothing is loaded yet.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] or `None`):
            A loaded model, a hub name or path, the name of an adapter of the student, `"base"` for the student
            without its adapter, or a URL. `None`: the one that `args` names.
        student (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is trained.
        args ([`~trl.GRPOConfig`] with [`TeacherSettings`]):
            Configuration.
        trainer (`str`):
            Name of the trainer, for messages.
    """
    teacher = teacher or args.teacher_model_server_url or args.teacher_model_name_or_path
    if teacher is None:
        raise ValueError(
            f"{trainer} needs a teacher: pass teacher_model=..., or set teacher_model_name_or_path or "
            "teacher_model_server_url."
        )
    named = args.teacher_model_name_or_path
    if named is not None and teacher != named and not (isinstance(teacher, str) and teacher.startswith("http")):
        logger.warning(f"teacher_model_name_or_path={named!r} has no effect with teacher_model: leave one out.")
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
    if args.teacher_model_revision is not None:
        init_kwargs["revision"] = args.teacher_model_revision
    if not isinstance(teacher, str):
        if getattr(teacher, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(
                f"The teacher must be a causal language model, its name or a URL, got {type(teacher).__name__}: "
                "load it with AutoModelForCausalLM.from_pretrained()."
            )
        if shares_weights(teacher, student):
            raise ValueError(
                "The teacher is the student itself, or shares its weights, which would be frozen: pass another model "
                "or the name of one, or teacher_model='base' for the student without its adapter."
            )
        if args.teacher_model_init_kwargs is not None or args.teacher_model_revision is not None:
            logger.warning(
                "teacher_model_init_kwargs and teacher_model_revision have no effect on a teacher that is loaded "
                "already: remove them, or pass the teacher's name instead of the loaded model."
            )
        return ModelTeacher(teacher, init_kwargs)
    if teacher.startswith(("http://", "https://")):
        try:
            from trl_ext.teacher.server import ServerTeacher
        except ImportError as error:
            raise ImportError(
                f"A teacher server needs the requests library ({error}): pip install requests."
            ) from error
        return ServerTeacher(teacher, args.teacher_model_name_or_path, args.teacher_server_timeout)
    if not isinstance(student, str) and is_peft_model(student) and teacher in student.peft_config:
        return AdapterTeacher(student, teacher)
    if teacher == "base":
        return AdapterTeacher(student, None)
    adapters = ", ".join(map(repr, getattr(student, "peft_config", ())))
    return ModelTeacher(
        teacher, init_kwargs, f", the name of one of the student's adapters ({adapters})" * bool(adapters)
    )


def shares_weights(teacher: torch.nn.Module, student: Any) -> bool:
    """Whether a parameter of one is also the other's: PEFT adds an adapter to the very model that it is given."""
    if not isinstance(student, torch.nn.Module):
        return False
    students = {id(parameter) for parameter in student.parameters()}
    return any(id(parameter) in students for parameter in teacher.parameters())
