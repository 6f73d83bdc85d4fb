"""Rollouts in a .jsonl file, from which ERPD can be trained: one JSON object per rollout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


class RolloutWriter:
    """
    A reward function that writes the rollouts before the first update to a file: `prompt`, `completion` and `reward`.

    Args:
        reward (`Callable`):
            The reward function that is called.
        path (`str`):
            The file, which is overwritten unless the run is resumed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Writes the completions with their special tokens, so that they can be read back token by token.
        resumes (`bool`):
            Whether the run continues with rollouts that are already in the file.
    """

    def __init__(
        self, reward: Callable[..., list[Any]], path: str, tokenizer: PreTrainedTokenizerBase, resumes: bool
    ) -> None:
        self.__name__ = reward.__name__
        self.reward, self.path, self.tokenizer = reward, Path(path), tokenizer
        self.model: Any = None  # the policy, once there is a trainer
        if PartialState().is_main_process and not resumes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[Any]:
        rewards = self.reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        # Not those of held-out prompts, and not those of a later round, which another policy samples
        if self.model is not None and self.model.training and kwargs["trainer_state"].global_step == 0:
            self._write(prompts, completions, completion_ids, rewards)
        return rewards

    def _write(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], rewards: list[Any]
    ) -> None:
        texts = self.tokenizer.batch_decode(completion_ids)
        rows = [
            {
                "prompt": prompt,
                "completion": text if isinstance(completion, str) else [{"role": "assistant", "content": text}],
                "reward": reward,
            }
            for prompt, completion, text, reward in zip(prompts, completions, texts, rewards, strict=True)
        ]
        rows = gather_object(rows)  # in the order in which one process would have sampled them
        if PartialState().is_main_process:
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rollouts(path: str) -> Dataset:
    """The rollouts of a .jsonl file, in its order."""
    with open(path) as file:
        return Dataset.from_list([json.loads(line) for line in file if line.strip()])
