"""Makes the teacher that the arguments name."""

from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from trl_ext.adapters import check_base_teacher
from trl_ext.arguments import changed_settings
from trl_ext.teacher.adapter import AdapterTeacher
from trl_ext.teacher.base import Teacher
from trl_ext.teacher.model import ModelTeacher


logger = get_logger(__name__)

LOADING = ("teacher_model_init_kwargs", "teacher_model_revision")


def make_teacher(teacher: Any, student: Any, args: Any, trainer: str, peft_config: Any = None) -> Teacher:
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
        peft_config ([`~peft.PeftConfig`], *optional*):
            Of the adapter that the student is given, if it is given one.
    """
    teacher = teacher or args.teacher_model_server_url or args.teacher_model_name_or_path
    if teacher is None:
        raise ValueError(
            f"{trainer} needs a teacher: pass teacher_model=..., or set teacher_model_name_or_path or "
            "teacher_model_server_url."
        )
    init_kwargs = {"trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        init_kwargs["revision"] = args.teacher_model_revision
    served = isinstance(teacher, str) and teacher.startswith(("http://", "https://"))
    named = {"teacher_model_server_url": args.teacher_model_server_url}
    if not served:  # it names a server's tokenizer
        named["teacher_model_name_or_path"] = args.teacher_model_name_or_path
    for setting, name in named.items():
        if name is not None and teacher != name:
            logger.warning(f"{setting}={name!r} has no effect with teacher_model: leave one out.")
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
        _warn_of_unused_loading(args, "on a teacher that is loaded already", "pass its name instead")
        return ModelTeacher(teacher, {"trust_remote_code": args.trust_remote_code})
    if served:
        names = ("teacher_model_init_kwargs",)
        _warn_of_unused_loading(args, "on a teacher behind a URL", "load the teacher here", names)
        return _server_teacher(teacher, args, init_kwargs)
    has_adapter = not isinstance(student, str) and is_peft_model(student)
    is_adapter = has_adapter and teacher in student.peft_config
    if is_adapter or teacher == "base":
        if not (has_adapter or peft_config is not None):
            raise ValueError(
                "teacher_model='base' is the student without its adapter, but this student has none: pass "
                "peft_config, or another teacher."
            )
        if not is_adapter:
            for config in student.peft_config.values() if has_adapter else [peft_config]:
                check_base_teacher(config)
        _warn_of_unused_loading(args, "on a teacher that is the student's own model", "pass the name of another")
        return AdapterTeacher(student, teacher if is_adapter else None)
    adapters = ", ".join(map(repr, getattr(student, "peft_config", ())))
    init_kwargs |= args.teacher_model_init_kwargs or {}
    return ModelTeacher(
        teacher, init_kwargs, f", the name of one of the student's adapters ({adapters})" * bool(adapters)
    )


def _server_teacher(url: str, args: Any, init_kwargs: dict[str, Any]) -> Teacher:
    try:
        from trl_ext.teacher.server import ServerTeacher
    except ImportError as error:
        raise ImportError(f"A teacher server needs the requests library ({error}): pip install requests.") from error
    if args.temperature != 1.0:
        raise ValueError(
            f"The teacher server {url} scores at temperature 1 only (vLLM's prompt log-probabilities have no other) "
            f"and cannot judge samples at temperature={args.temperature}: set it to 1.0, or load the teacher here."
        )
    return ServerTeacher(url, args.teacher_model_name_or_path, args.teacher_server_timeout, init_kwargs)


def _warn_of_unused_loading(args: Any, where: str, instead: str, names: tuple[str, ...] = LOADING) -> None:
    if changed := changed_settings(args, names):
        settings = " and ".join(changed)
        logger.warning(f"{settings} has no effect {where}: remove it, or {instead}.")


def shares_weights(teacher: torch.nn.Module, student: Any) -> bool:
    """Whether a parameter of one is also the other's: PEFT adds an adapter to the very model that it is given."""
    if not isinstance(student, torch.nn.Module):
        return False
    students = {id(parameter) for parameter in student.parameters()}
    return any(id(parameter) in students for parameter in teacher.parameters())
