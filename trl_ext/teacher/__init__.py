"""
A frozen teacher of any kind: a model (loaded, or from a name or path), an adapter on the student, or a server.

All distillation trainers use it through one interface, [`Teacher`]: `check_tokenizer` before anything is loaded,
`prepare` once the trainer exists, then `sampled_logps` or `next_tokens`, once per rollout batch. What the trainers
share is in [`TeacherMixin`], the settings are in [`TeacherSettings`].
"""

from trl_ext.teacher.base import Teacher, text_tokenizer
from trl_ext.teacher.factory import make_teacher
from trl_ext.teacher.mixin import TeacherMixin
from trl_ext.teacher.settings import TeacherSettings


__all__ = ["Teacher", "TeacherMixin", "TeacherSettings", "make_teacher", "text_tokenizer"]
