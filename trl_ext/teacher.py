"""
A frozen teacher, whatever it is: a model (loaded, or from a name or path), an adapter on the student, or a server.

All distillation trainers use it through one interface, [`Teacher`]: `check_tokenizer` before anything is loaded,
`prepare` when the trainer is there, then `sampled_logps` or `next_tokens`, once a rollout batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import is_peft_available
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

from trl_ext.next_token import NextTokens, next_tokens


if is_peft_available():
    from peft.tuners.tuners_utils import BaseTunerLayer


logger = get_logger(__name__)

Score = Callable[[torch.nn.Module], torch.Tensor]  # the trainer's own scoring of one batch by a given model


class Teacher(ABC):
    """
    What every teacher can do. Nothing it returns has a gradient.

    Attributes:
        name (`str`):
            For messages: the name or path of the model, of the adapter, or the URL.
        eos_token_ids (`set[int]` or `None`):
            The tokens with which the teacher ends a completion; `None` where they are not known.
        scores_every_token (`bool`):
            Whether `sampled_logps` never holds NaN.
        is_local (`bool`):
            Whether it is a model in this process, which can sample and whose entropies are known.
    """

    name: str
    eos_token_ids: set[int] | None = None
    scores_every_token = True
    is_local = True

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The teacher's own tokenizer, `None` where there is none or it is the student's."""

    @abstractmethod
    def prepare(self, trainer: Any) -> None:
        """Loads, freezes and wraps what scores, the way TRL prepares a reference model. `trainer` is initialised."""

    @abstractmethod
    def sampled_logps(self, batch: dict[str, Any], score: Score) -> torch.Tensor:
        """
        Log-probabilities (nats) of the completion's tokens at the trainer's temperature, of shape `(batch, time)`; NaN
        where the teacher could not score.

        Args:
            batch (`dict[str, Any]`):
                `prompt_ids`, `prompt_mask` (left-padded), `completion_ids`, `completion_mask` (right-padded).
            score (`Callable`):
                The trainer's scoring of this batch by a model with a fused LM head, in micro-batches.
        """

    @abstractmethod
    def next_tokens(self, batch: dict[str, Any], k: int, batch_size: int, vocab_size: int | None = None) -> NextTokens:
        """
        `sampled_logps`, and more of the distribution at each position of the completion, in the same forward pass.

        Args:
            batch (`dict[str, Any]`):
                As for `sampled_logps`.
            k (`int`):
                Number of the likeliest tokens to return.
            batch_size (`int`):
                Number of sequences to score at a time.
            vocab_size (`int`, *optional*):
                Size of the student's vocabulary, where the teacher's may be padded further.
        """

    def check_tokenizer(self, student: PreTrainedTokenizerBase | ProcessorMixin, student_name: str) -> None:
        """Raises a `ValueError` that names both models and the first difference, if there is one. Sets the ends."""
        teacher = self.tokenizer()
        if teacher is None:
            return
        check_same_tokens(text_tokenizer(student), text_tokenizer(teacher), student_name, self.name)
        self.eos_token_ids = (self.eos_token_ids or set()) | as_set(text_tokenizer(teacher).eos_token_id)

    def left_out(self) -> AbstractContextManager[None]:
        """While this is active the student is saved without the teacher. Only an adapter on it has to do anything."""
        return nullcontext()

    def foreign_ends(self, student_eos_token_ids: Iterable[int]) -> list[int]:
        """Tokens that end the student's completions but not the teacher's, which therefore has no opinion of them."""
        return sorted(set(student_eos_token_ids) - self.eos_token_ids) if self.eos_token_ids else []


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


class AdapterTeacher(ModelTeacher):
    """
    An adapter on the student's own base model: no second copy of that in memory.

    Args:
        student ([`~peft.PeftModel`]):
            The student, with the teacher's adapter loaded beside its own.
        adapter_name (`str`):
            Name of the teacher's adapter.
    """

    def __init__(self, student: Any, adapter_name: str) -> None:
        if adapter_name in student.active_adapters:
            raise ValueError(
                f"The adapter {adapter_name!r} cannot be the teacher, because it is the one that is trained: activate "
                "the student's with model.set_adapter(), or name another adapter as the teacher."
            )
        self.name, self.adapter_name = adapter_name, adapter_name
        self._redirect = _ForwardRedirection()

    def tokenizer(self) -> None:
        return None  # it is the student's model

    def prepare(self, trainer: Any) -> None:
        self.model, self.accelerator, self.temperature = trainer.model, trainer.accelerator, trainer.args.temperature
        self.vocab_size = trainer.model.config.get_text_config().vocab_size
        self.checkpointing = trainer.args.gradient_checkpointing_kwargs
        self.model.set_requires_grad(self.adapter_name, requires_grad=False)

    @contextmanager
    def scoring(self) -> Iterator[Any]:
        peft_model = self.accelerator.unwrap_model(self.model)
        was_training = peft_model.training
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.checkpointing),
            use_adapter(peft_model, self.adapter_name),
        ):
            peft_model.eval()  # no dropout
            try:
                yield self.model
            finally:
                peft_model.train(was_training)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        model = self.accelerator.unwrap_model(self.model)
        kept = [name for name in model.peft_config if name != self.adapter_name]
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=kept)
        try:
            yield
        finally:
            del model.save_pretrained  # the class's own is there again


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def as_set(token_ids: int | list[int] | None) -> set[int]:
    return set() if token_ids is None else {token_ids} if isinstance(token_ids, int) else set(token_ids)


def check_same_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_name: str, teacher_name: str
) -> None:
    """
    Raises a `ValueError` at the first token id that means something else to the teacher.

    The student's padding token does not count, because it is never scored, and the teacher may know more tokens.
    """
    tokens_of_teacher = {token_id: token for token, token_id in teacher.get_vocab().items()}
    for token, token_id in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        padding = token_id == student.pad_token_id and token_id != student.eos_token_id
        if tokens_of_teacher.get(token_id) != token and not padding:
            theirs = tokens_of_teacher.get(token_id)
            raise ValueError(
                f"The student {student_name} and the teacher {teacher_name} have different tokenizers, the first "
                f"difference being token {token_id}, which is {token!r} for the student and "
                f"{'unknown' if theirs is None else repr(theirs)} to the teacher: choose a teacher with the student's "
                "tokenizer."
            )


def make_teacher(teacher: Any, student: Any, args: Any, trainer: str) -> Teacher:
    """
    The [`Teacher`] that was asked for, nothing loaded yet.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] or `None`):
            A loaded model, a hub name or path, the name of an adapter of the student, or a URL. `None`: what `args`
            name.
        student (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is trained.
        args ([`~trl.GRPOConfig`] with the `teacher_*` settings of [`RLADConfig`]):
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
        logger.warning(f"teacher_model_name_or_path={named!r} has no effect beside teacher_model: leave one out.")
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
    if args.teacher_model_revision is not None:
        init_kwargs["revision"] = args.teacher_model_revision
    if not isinstance(teacher, str):
        if teacher is student:
            raise ValueError(
                "The teacher is the student itself: pass another model, or the name of one, as the teacher."
            )
        if args.teacher_model_init_kwargs is not None or args.teacher_model_revision is not None:
            logger.warning(
                "teacher_model_init_kwargs and _revision have no effect on a teacher that is loaded already."
            )
        return ModelTeacher(teacher, init_kwargs)
    if teacher.startswith(("http://", "https://")):
        try:
            from trl_ext.teacher_server import ServerTeacher
        except ImportError as error:
            raise ImportError(
                f"A teacher server needs the requests library ({error}): pip install requests."
            ) from error
        return ServerTeacher(teacher, args.teacher_model_name_or_path, args.teacher_server_timeout)
    if not isinstance(student, str) and is_peft_model(student) and teacher in student.peft_config:
        return AdapterTeacher(student, teacher)
    return ModelTeacher(teacher, init_kwargs)
