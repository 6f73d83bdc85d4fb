"""Settings of the teacher."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TeacherSettings:
    """
    To be mixed into a configuration whose trainer has a teacher.

    Parameters:
        teacher_model_name_or_path (`str`, *optional*):
            Hub name or path of the teacher, where `teacher_model` is not passed to the trainer. With
            `teacher_model_server_url`: the name of the served model, whose tokenizer is then checked.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher.
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            For the teacher's `from_pretrained`: `dtype` (default `"auto"`), `quantization_config`, ...
        teacher_model_server_url (`str`, *optional*):
            URL of a vLLM server that serves the teacher.
        teacher_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for that server at the start, and for each of its answers.
    """

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
        default=None, metadata={"help": "URL of a vLLM server that serves the teacher."}
    )
    teacher_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the teacher server at the start and for each answer."}
    )
