"""What trainers with a teacher share, whichever trainer of TRL they extend."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id, pad

from trl_ext.teacher.base import Teacher


logger = get_logger(__name__)


class TeacherMixin:
    """
    To be mixed in before one of TRL's trainers.

    Before anything is loaded, set `teacher` and call `check_teacher_tokenizer`; once the trainer is initialized,
    `prepare_teacher`; for each batch of scores, `without_foreign_ends`, and `stop_at_nan` once per rollout batch.
    """

    accelerator: Any
    teacher: Teacher
    _foreign_ends: list[int]
    _all_ends: list[int]  # of the student and of the teacher

    def check_teacher_tokenizer(
        self, model: Any, args: Any, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
    ) -> PreTrainedTokenizerBase | ProcessorMixin:
        """The student's tokenizer or processor, loaded as TRL would where it is `None`, and the teacher's too."""
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if processing_class is None:
            revision = (args.model_init_kwargs or {}).get("revision")
            processing_class = AutoProcessor.from_pretrained(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )
        self.teacher.check_tokenizer(processing_class, name or "model")
        return processing_class

    def prepare_teacher(self, eos_token_ids: Iterable[int]) -> None:
        """Loads and wraps the teacher. `eos_token_ids` end the student's completions."""
        self.teacher.prepare(self)
        self._foreign_ends = self.teacher.foreign_ends(eos_token_ids)
        self._all_ends = sorted({*eos_token_ids, *(self.teacher.eos_token_ids or ())})

    def teacher_batch(self, batch: dict[str, Any], prompts: list[list[int]] | None) -> dict[str, Any]:
        """
        A rollout batch as the teacher sees it: with `prompts`, token ids of each row, in place of the student's, where
        there are any.
        """
        if prompts is None:
            return batch
        if "pixel_values" in batch:
            raise ValueError(
                "A teacher_prompt cannot be used with prompts that have images, whose places in it would be unknown: "
                "remove the column, or the images."
            )
        if not all(prompts):
            raise ValueError("A row's teacher_prompt has no tokens: fill it, or set it to None for the prompt itself.")
        device, length = batch["prompt_ids"].device, max(map(len, prompts)) + batch["completion_ids"].shape[1]
        if self.teacher.max_length is not None and length > self.teacher.max_length:
            logger.warning_once(
                f"A teacher_prompt and its completion have up to {length} tokens, but the teacher {self.teacher.name} "
                f"was made for {self.teacher.max_length}: shorten the column teacher_prompt."
            )
        # Padding is masked, so that any token will do: 0 is in every vocabulary
        ids, mask = (
            pad([torch.tensor(row, device=device) for row in rows], padding_value=0, padding_side="left")
            for rows in (prompts, [[1] * len(prompt) for prompt in prompts])
        )
        return {**batch, "prompt_ids": ids, "prompt_mask": mask}

    def without_foreign_ends(self, logps: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """
        The teacher's log-probabilities, NaN at end tokens of the student's that are not the teacher's.

        Both of shape `(batch, time)`.
        """
        if not self._foreign_ends:
            return logps
        foreign = torch.isin(completion_ids, completion_ids.new_tensor(self._foreign_ends))
        return logps.masked_fill(foreign, float("nan"))

    def without_ends(self, top_k_logps: torch.Tensor, top_k_ids: torch.Tensor) -> torch.Tensor:
        """
        The log-probabilities of the teacher's likeliest tokens, -inf for all end tokens where the two models end
        differently: one end is as good as another, but what is not among these tokens counts together, so that no loss
        tells the student to end as the teacher does, which would not end its completions.

        Both of shape `(batch, time, k)`.
        """
        if not self._foreign_ends:
            return top_k_logps
        return top_k_logps.masked_fill(torch.isin(top_k_ids, top_k_ids.new_tensor(self._all_ends)), float("-inf"))

    def stop_at_nan(self, scores: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Raises a `FloatingPointError` on all processes if the teacher returned NaN on one.

        Args:
            scores (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
                What the teacher returned for a rollout batch, in one or several parts: log-probabilities and mask of
                the tokens that they are for, both of shape `(batch, time)`.
        """
        if not self.teacher.scores_every_token:
            return  # a server may have no score for a token, and checks its own answers
        counts = [torch.stack([(logps.isnan() & mask.bool()).sum(), mask.bool().sum()]) for logps, mask in scores]
        nan, tokens = self.accelerator.gather(torch.stack(counts).sum(0)[None]).sum(0).tolist()
        if nan:
            raise FloatingPointError(
                f"The teacher {self.teacher.name} returned NaN for {nan} of {tokens} tokens, so that nothing can be "
                "learned from it: check its weights, or load it with teacher_model_init_kwargs={'dtype': 'float32'}."
            )

    @property
    def teacher_scores_all(self) -> bool:
        """Whether every token has a score of the teacher's."""
        return self.teacher.scores_every_token and not self._foreign_ends

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.teacher.left_out():
            super()._save(output_dir, state_dict)  # type: ignore[misc]
