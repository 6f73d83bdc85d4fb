"""The interface of every teacher, and the comparison of its tokenizer with the student's."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_ext.next_token import NextTokens


# The trainer's own scoring of a batch's completions by a given model
Score = Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor]


class Teacher(ABC):
    """
    The interface of every teacher. Nothing that it returns has a gradient.

    Attributes:
        name (`str`):
            For messages: the name or path of the model, of the adapter, or the URL.
        eos_token_ids (`set[int]` or `None`):
            The tokens at which the teacher stops; `None` where they are not known.
        format_ends (`collections.abc.Set[int]`):
            Those with which its own completions end: its tokenizer's end token, where that is known.
        scores_every_token (`bool`):
            Whether `sampled_logps` never holds NaN.
        is_local (`bool`):
            Whether it is a model in this process, which can also sample and return entropies.
        max_length (`int` or `None`):
            The most tokens of prompt and completion together that it was made for; `None` where that is not known.
    """

    name: str
    eos_token_ids: set[int] | None = None
    format_ends: AbstractSet[int] = frozenset()
    max_length: int | None = None
    scores_every_token = True
    is_local = True

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The teacher's own tokenizer, `None` where there is none or it is the student's."""

    @abstractmethod
    def prepare(self, trainer: Any) -> None:
        """Loads, freezes and wraps what scores, the way TRL prepares a reference model. `trainer` is initialized."""

    @abstractmethod
    def sampled_logps(self, batch: dict[str, Any], score: Score) -> torch.Tensor:
        """
        Log-probabilities (nats) of the completion's tokens at the trainer's temperature, of shape `(batch, time)`; NaN
        where the teacher could not score.

        Args:
            batch (`dict[str, Any]`):
                `prompt_ids`, `prompt_mask` (left-padded), `completion_ids`, `completion_mask` (right-padded).
            score (`Callable`):
                The trainer's scoring of a batch by a model with a fused LM head, in micro-batches.
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
        self.format_ends = as_set(text_tokenizer(teacher).eos_token_id)
        self.eos_token_ids = (self.eos_token_ids or set()) | self.format_ends

    def left_out(self) -> AbstractContextManager[None]:
        """While this is active the student is saved without the teacher. Only an adapter on it has to do anything."""
        return nullcontext()

    def foreign_ends(self, student_eos_token_ids: Iterable[int]) -> list[int]:
        """
        Tokens that end the student's completions but not the teacher's, so that its score of them means nothing.

        A chat model often stops at two tokens (Qwen's at `<|im_end|>` and `<|endoftext|>`) and writes only the first.
        """
        student = set(student_eos_token_ids)
        if not self.eos_token_ids or student == self.eos_token_ids:
            return []
        return sorted(student - (self.format_ends or self.eos_token_ids))


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
