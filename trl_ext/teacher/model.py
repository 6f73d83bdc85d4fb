"""A teacher that is a model of its own: loaded already, or to be loaded from a hub name or path."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import is_peft_available
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id

from trl_ext.next_token import NextTokens, next_tokens
from trl_ext.teacher.base import Score, Teacher, as_set, text_tokenizer


if is_peft_available():
    from peft.tuners.tuners_utils import BaseTunerLayer


logger = get_logger(__name__)


class ModelTeacher(Teacher):
    """
    A model of its own: loaded already, or to be loaded from a hub name or path.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The teacher.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained`: `dtype` (default `"auto"`, the checkpoint's own), `revision`, `quantization_config`,
            `trust_remote_code` (default `False`), ...
    """

    def __init__(self, model: Any, init_kwargs: dict[str, Any] | None = None) -> None:
        init_kwargs = dict(init_kwargs or {})
        if "torch_dtype" in init_kwargs:  # its former name
            init_kwargs["dtype"] = init_kwargs.pop("torch_dtype")
        self.init_kwargs = {"dtype": "auto", "trust_remote_code": False, **init_kwargs}
        self.source = model
        self.name = model if isinstance(model, str) else get_config_model_id(model.config) or "the teacher model"
        self.model: Any = None  # prepared
        self._redirect = _ForwardRedirection()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        loading = {
            name: self.init_kwargs[name] for name in ("revision", "trust_remote_code") if name in self.init_kwargs
        }
        if isinstance(self.source, str):
            with suppress(OSError):  # a model without a generation config ends where its tokenizer does
                self.eos_token_ids = as_set(GenerationConfig.from_pretrained(self.source, **loading).eos_token_id)
            return AutoTokenizer.from_pretrained(self.source, **loading)
        self.eos_token_ids = as_set(self.source.generation_config.eos_token_id)
        try:
            return AutoTokenizer.from_pretrained(self.name, **loading)
        except (OSError, ValueError):  # a model made on the spot has no tokenizer to compare with
            logger.warning(
                f"The tokenizer of {self.name} could not be loaded, so that nothing checks that it is the student's: "
                "pass the teacher as a name or path to have it checked."
            )
            return None

    def prepare(self, trainer: Any) -> None:
        args, accelerator, model = trainer.args, trainer.accelerator, self.source
        if isinstance(model, str):
            if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                self.init_kwargs["device_map"] = None  # as TRL does for its reference model
            model = create_model_from_path(model, **self.init_kwargs)
        if is_peft_model(model) and (
            model.active_peft_config.is_prompt_learning or isinstance(model.get_output_embeddings(), BaseTunerLayer)
        ):
            raise ValueError(
                f"The teacher {self.name} has an adapter on its LM head or a learned prompt, which scoring would pass "
                "over: merge it with model.merge_and_unload(), or serve it with vLLM."
            )
        student_size = len(text_tokenizer(trainer.processing_class))
        teacher_size = model.config.get_text_config().vocab_size
        if teacher_size < student_size:
            raise ValueError(
                f"The teacher {self.name} has a vocabulary of {teacher_size} and cannot score the student's, of "
                f"{student_size}: choose a teacher of the student's model family."
            )
        model.requires_grad_(False)
        model.eval()
        add_fused_lm_head(
            model.get_base_model() if is_peft_model(model) else model,
            temperature=args.temperature,
            cast_lm_head_to_fp32=getattr(args, "cast_lm_head_to_fp32", False),
        )
        if trainer.is_deepspeed_enabled:
            model = prepare_deepspeed(model, accelerator)
        elif trainer.is_fsdp_enabled:
            model = prepare_fsdp(model, accelerator)
        else:
            model = accelerator.prepare_model(model, evaluation_mode=True)
        self.model, self.vocab_size = model, teacher_size
        self.accelerator, self.temperature = accelerator, args.temperature

    @contextmanager
    def scoring(self) -> Iterator[Any]:
        """The model, as the trainer prepared it, ready to score."""
        with torch.no_grad():
            yield self.model

    def sampled_logps(self, batch: dict[str, Any], score: Score) -> torch.Tensor:
        with self.scoring() as model:
            return score(model)

    def next_tokens(self, batch: dict[str, Any], k: int, batch_size: int, vocab_size: int | None = None) -> NextTokens:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        # A token of the student's padding, which the teacher has not even a number for, is impossible to it
        unknown = batch["completion_ids"] >= self.vocab_size
        ids = ids.clamp(max=self.vocab_size - 1)
        parts = []
        with self.scoring() as model, self.accelerator.autocast():
            unwrapped = self.accelerator.unwrap_model(model)
            unwrapped = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
            for rows in torch.arange(len(ids), device=ids.device).split(batch_size):
                arguments = (unwrapped, ids[rows], mask[rows], length, k, self.temperature, vocab_size)
                parts.append(self._redirect(model, unwrapped, next_tokens, *arguments))
        scores = NextTokens(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return scores._replace(logps=scores.logps.masked_fill(unknown, float("-inf")))
