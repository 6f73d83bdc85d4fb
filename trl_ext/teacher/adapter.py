"""A teacher that is an adapter on the student's own base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from trl_ext.adapters import adapters_kept
from trl_ext.teacher.model import ModelTeacher


class AdapterTeacher(ModelTeacher):
    """
    An adapter on the student's own base model, or that model without any: no second copy of it in memory.

    Args:
        student ([`~peft.PeftModel`]):
            The student, with the teacher's adapter loaded beside its own.
        adapter_name (`str` or `None`):
            Name of the teacher's adapter; `None` for the base model.
    """

    def __init__(self, student: Any, adapter_name: str | None) -> None:
        if adapter_name is not None and adapter_name in student.active_adapters:
            raise ValueError(
                f"The adapter {adapter_name!r} cannot be the teacher, because it is the one that is trained: activate "
                "the student's with model.set_adapter(), or name another adapter as the teacher."
            )
        self.name, self.adapter_name = adapter_name or "base", adapter_name
        self._redirect = _ForwardRedirection()

    def tokenizer(self) -> None:
        return None  # it is the student's model

    def prepare(self, trainer: Any) -> None:
        self.trainer, self.accelerator, self.temperature = trainer, trainer.accelerator, trainer.args.temperature
        config = trainer.model.config.get_text_config()
        self.vocab_size, self.max_length = config.vocab_size, getattr(config, "max_position_embeddings", None)
        self.checkpointing = trainer.args.gradient_checkpointing_kwargs
        if self.adapter_name is not None:
            trainer.model.set_requires_grad(self.adapter_name, requires_grad=False)

    @property
    def model(self) -> Any:
        return self.trainer.model  # which the trainer may still wrap when training begins

    @contextmanager
    def scoring(self) -> Iterator[Any]:
        model = self.model
        peft_model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        was_training = peft_model.training
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(peft_model, self.checkpointing),
            adapters_kept(peft_model),
            use_adapter(peft_model, self.adapter_name),
        ):
            peft_model.eval()  # no dropout
            try:
                yield model
            finally:
                peft_model.train(was_training)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        if self.adapter_name is None:
            yield
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        kept = [name for name in model.peft_config if name != self.adapter_name]
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=kept)
        try:
            yield
        finally:
            del model.save_pretrained  # the class's own is there again
