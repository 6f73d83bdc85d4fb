"""A teacher that is a model of its own: loaded already, or to be loaded from a hub name or path."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import transformers
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils import find_adapter_config_file, is_peft_available
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id

from trl_ext.next_token import NextTokens, next_tokens
from trl_ext.teacher.base import Score, Teacher, as_set, text_tokenizer


if is_peft_available():
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer


logger = get_logger(__name__)

WITH_LM_HEAD = {
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}


class ModelTeacher(Teacher):
    """
    A model of its own: loaded already, or to be loaded from a hub name or path (of a model, or of an adapter).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The teacher.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained`: `dtype` (default `"auto"`, the checkpoint's own), `revision`, `quantization_config`,
            `trust_remote_code` (default `False`), ...
        alternatives (`str`, *optional*, defaults to `""`):
            For the message where nothing can be loaded: what else the name could have meant.
    """

    reads_images = True  # an adapter on the student as much as the student

    def __init__(self, model: Any, init_kwargs: dict[str, Any] | None = None, alternatives: str = "") -> None:
        init_kwargs = dict(init_kwargs or {})
        if "torch_dtype" in init_kwargs:  # its former name
            init_kwargs["dtype"] = init_kwargs.pop("torch_dtype")
        self.init_kwargs = {"dtype": "auto", "trust_remote_code": False, **init_kwargs}
        self.source = model
        self.alternatives = alternatives
        self.name = model if isinstance(model, str) else get_config_model_id(model.config) or type(model).__name__
        self.model: Any = None  # prepared
        self._redirect = _ForwardRedirection()
        if not isinstance(model, str):
            self._check_head(model)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        loading: dict[str, Any] = {"trust_remote_code": self.init_kwargs["trust_remote_code"]}
        if "revision" in self.init_kwargs:
            loading["revision"] = self.init_kwargs["revision"]
        places = [self.name]
        if isinstance(self.source, str):
            places = self._check_source(loading)
            for name in places:
                with suppress(OSError):  # a model without a generation config ends where its tokenizer does
                    self.eos_token_ids = as_set(GenerationConfig.from_pretrained(name, **loading).eos_token_id)
                    break
        else:
            self.eos_token_ids = as_set(self.source.generation_config.eos_token_id)
            if not get_config_model_id(self.source.config):  # it was not loaded from anywhere
                places = []
        for name in places:
            with suppress(OSError, ValueError):
                tokenizer = AutoTokenizer.from_pretrained(name, **loading)
                # For a folder without a tokenizer transformers makes up one that knows nothing but special tokens
                if len(tokenizer) > len(tokenizer.all_special_tokens):
                    return tokenizer
            loading.pop("revision", None)  # the adapter's, not the base model's
        logger.warning(
            f"The teacher {self.name} has no tokenizer that could be loaded, so that nothing checks that it is the "
            "student's: save it beside the teacher with tokenizer.save_pretrained(), or make sure that they agree."
        )
        return None

    def _check_source(self, loading: dict[str, Any]) -> list[str]:
        """Refuses models without an LM head; returns where files may be: the source and, for an adapter, its base."""
        names = [self.source]
        try:
            if adapter := self._adapter_config():
                names.append(adapter.base_model_name_or_path)
                loading = {**loading, "revision": adapter.revision}
            config = AutoConfig.from_pretrained(names[-1], **loading)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The teacher {self.name!r} could not be loaded ({str(error).splitlines()[0]}): pass a hub name, the "
                f"path of a folder with a model or an adapter{self.alternatives}, or a URL that begins with http."
            ) from error
        architecture = (config.architectures or ["unknown"])[0]
        if hasattr(transformers, architecture) and architecture not in WITH_LM_HEAD:
            self._refuse_architecture(architecture)
        return names

    def _adapter_config(self) -> Any:
        revision = self.init_kwargs.get("revision")
        if not is_peft_available() or find_adapter_config_file(self.source, revision=revision) is None:
            return None
        return PeftConfig.from_pretrained(self.source, revision=revision)

    def _check_head(self, model: Any) -> None:
        if model.get_output_embeddings() is None:
            self._refuse_architecture(type(model).__name__)

    def _refuse_architecture(self, architecture: str) -> None:
        raise ValueError(
            f"The teacher {self.name} is a {architecture}, which has no LM head and cannot score tokens: choose a "
            "causal language model."
        )

    def _load(self) -> Any:
        adapter = self._adapter_config()
        if adapter is None:
            return create_model_from_path(self.source, **self.init_kwargs)
        settings = dict(self.init_kwargs)
        revision = settings.pop("revision", None)
        if adapter.revision is not None:
            settings["revision"] = adapter.revision
        base = create_model_from_path(adapter.base_model_name_or_path, **settings)
        return PeftModel.from_pretrained(base, self.source, revision=revision or "main")

    def prepare(self, trainer: Any) -> None:
        args, accelerator, model = trainer.args, trainer.accelerator, self.source
        if isinstance(model, str):
            if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                self.init_kwargs["device_map"] = None  # as TRL does for its reference model
            model = self._load()
            self._check_head(model)
        if is_peft_model(model):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"The teacher {self.name} has a learned prompt, which scoring would ignore: use a teacher with "
                    "another adapter, or serve it with vLLM."
                )
            if isinstance(model.get_output_embeddings(), BaseTunerLayer):
                raise ValueError(
                    f"The teacher {self.name} has an adapter on its LM head, which scoring would ignore: merge it "
                    "with model.merge_and_unload(), or serve it with vLLM."
                )
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        student_size = len(text_tokenizer(trainer.processing_class))
        teacher_size = model.config.get_text_config().vocab_size
        if teacher_size < student_size:
            raise ValueError(
                f"The teacher {self.name} has a vocabulary of {teacher_size} and cannot score the student's, of "
                f"{student_size}: choose a teacher of the student's model family."
            )
        self.reads_images = reads_images(model.get_base_model() if is_peft_model(model) else model)
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
        if "pixel_values" in batch and not self.reads_images:  # it would take their places for words
            raise ValueError(
                f"The prompts have images, but the teacher {self.name} reads text only: choose one that reads images."
            )
        batch, unknown = self._known_tokens(batch)
        with self.scoring() as model:
            return score(model, batch).masked_fill(unknown, float("-inf"))

    def next_tokens(self, batch: dict[str, Any], k: int, batch_size: int, vocab_size: int | None = None) -> NextTokens:
        batch, unknown = self._known_tokens(batch)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        parts = []
        with self.scoring() as model, self.accelerator.autocast():
            outer = self.accelerator.unwrap_model(model)
            inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            # Below PEFT's forward, which knows nothing of these arguments, but through that of what wraps it
            scorer = partial(next_tokens, inner.get_base_model() if is_peft_model(inner) else inner)
            for rows in torch.arange(len(ids), device=ids.device).split(batch_size):
                arguments = (ids[rows], mask[rows], length, k, self.temperature, vocab_size)
                parts.append(self._redirect(model, outer, scorer, *arguments))
        scores = NextTokens(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return scores._replace(logps=scores.logps.masked_fill(unknown, float("-inf")))

    def _known_tokens(self, batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """
        The batch without tokens beyond the teacher's vocabulary, and where they were, of shape `(batch, time)`: the
        student may sample an id of its padded vocabulary that the teacher's does not have, and that it cannot produce.
        """
        unknown = batch["completion_ids"] >= self.vocab_size
        known = {name: batch[name].clamp(max=self.vocab_size - 1) for name in ("prompt_ids", "completion_ids")}
        return {**batch, **known}, unknown


def reads_images(model: Any) -> bool:
    """Whether its forward takes images. Some text models take any keyword, and ignore it."""
    return "pixel_values" in inspect.signature(type(model).forward).parameters
