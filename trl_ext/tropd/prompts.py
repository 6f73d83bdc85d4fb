"""From a dataset's rows to token ids: prompts, and the completions that belong to them."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import pad

from trl_ext.dataset_columns import known_columns


IGNORED = -100  # the label of what is no completion


@dataclass
class PromptCollator:
    """
    Batches with the keys of GKD's own collator ([`~trl.experimental.utils.DataCollatorForChatML`]), all left-padded
    tensors of shape `(batch, length)`: `prompts`, `prompt_attention_mask`, and `input_ids`, `attention_mask`, `labels`
    (-100 on what is no completion) of prompt and completion together.

    A row has `messages`, whose last, if it is the assistant's, is the completion; or a `prompt` and perhaps a
    `completion`, as text or as messages. Prompt and completion are tokenized apart, since the prompt is alone when
    completions are sampled: no token lies across their border.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        max_length (`int`, *optional*):
            Longest prompt and completion together, in tokens. What exceeds it is cut from the end of the completion,
            and from the beginning of a prompt that alone is longer: never does a completion cost its prompt a token.
        completions (`bool`, defaults to `True`):
            Whether completions are needed.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    completions: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [self._cut(*self._tokens(row)) for row in rows]
        return {
            "prompts": self._pad([prompt for prompt, _ in pairs], self.tokenizer.pad_token_id),
            "prompt_attention_mask": self._pad([[1] * len(prompt) for prompt, _ in pairs], 0),
            "input_ids": self._pad([prompt + completion for prompt, completion in pairs], self.tokenizer.pad_token_id),
            "attention_mask": self._pad([[1] * len(prompt + completion) for prompt, completion in pairs], 0),
            "labels": self._pad([[IGNORED] * len(prompt) + completion for prompt, completion in pairs], IGNORED),
        }

    def _tokens(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        prompt, completion = split_row(row)
        special = not is_conversational({"prompt": prompt})  # a template writes its special tokens itself
        if not special:
            prompt, completion = self._render(row, prompt, completion)
        elif completion and self.tokenizer.eos_token and not completion.endswith(self.tokenizer.eos_token):
            completion += self.tokenizer.eos_token
        prompt_ids = self.tokenizer(text=prompt, add_special_tokens=special)["input_ids"]
        if not prompt_ids:
            raise ValueError("A row's prompt has no tokens: remove empty prompts, e.g. with dataset.filter().")
        if not self.completions or not completion:
            return prompt_ids, []
        completion_ids = self.tokenizer(text=completion, add_special_tokens=False)["input_ids"]
        if self.tokenizer.eos_token_id in completion_ids:  # templates write a line's end after it
            completion_ids = completion_ids[: completion_ids.index(self.tokenizer.eos_token_id) + 1]
        return prompt_ids, completion_ids

    def _render(self, row: dict[str, Any], prompt: list[dict], completion: list[dict] | None) -> tuple[str, str]:
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        prompt_text = apply_chat_template({"prompt": prompt}, self.tokenizer, **options)["prompt"]
        if not completion or not self.completions:
            return prompt_text, ""
        both = apply_chat_template({"prompt": prompt, "completion": completion}, self.tokenizer, **options)
        if both["prompt"] != prompt_text:
            warnings.warn(  # shown once; a logger of accelerate's has no state in a data loader's process
                "The chat template renders the prompt otherwise when a completion follows it: the dataset's "
                "completions do not begin exactly where those that the student samples begin.",
                stacklevel=2,
            )
        return prompt_text, both["completion"]

    def _cut(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
        if self.max_length is None:
            return prompt, completion
        prompt = prompt[-self.max_length :]
        return prompt, completion[: self.max_length - len(prompt)]

    @staticmethod
    def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad([torch.tensor(row, dtype=torch.long) for row in rows], padding_value=value, padding_side="left")


def split_row(row: dict[str, Any]) -> tuple[Any, Any]:
    """Prompt and completion of a dataset's row, each as it stands there; `None` for a completion that is not there."""
    messages = row.get("messages")
    if messages == [] or (messages is None and row.get("prompt") in ("", [])):
        raise ValueError("A row's prompt is empty: remove such rows, e.g. with dataset.filter().")
    if messages is not None:
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            return messages[:-1], messages[-1:]
        return messages, None
    if row.get("prompt") is None:
        raise ValueError(
            f"TrOPDTrainer needs 'messages' or a 'prompt' in every row, but one has only "
            f"{', '.join(map(repr, row))}: rename yours, e.g. with dataset.rename_column()."
        )
    prompt, completion = row["prompt"], row.get("completion") or None
    if completion is not None and isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(
            f"A row's prompt is {'text' if isinstance(prompt, str) else 'messages'} and its completion is not: give "
            "both as text or both as messages."
        )
    return prompt, completion


def unpad(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """The token ids of each row's prompt and completion, from a batch of this collator's or of GKD's."""
    prompts, masks = batch["prompts"].cpu(), batch["prompt_attention_mask"].cpu().bool()
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    rows = zip(prompts, masks, ids, labels, strict=True)
    return [(prompt[mask].tolist(), row[label != IGNORED].tolist()) for prompt, mask, row, label in rows]


def check_columns(trainer: str, dataset: Any, name: str, needs_completions: str | None) -> None:
    """
    Raises a `ValueError` for a dataset whose columns are known and are not what is needed.

    Args:
        needs_completions (`str`, *optional*):
            The setting that needs completions.
    """
    columns = known_columns(trainer, dataset, name, ("messages", "prompt"))
    if not columns:
        return
    if {"image", "images"} & set(columns):
        raise ValueError(
            f"{trainer} reads text only, as GKDTrainer does, but `{name}` has images: remove them, e.g. with "
            "dataset.remove_columns(), or distil with RLADTrainer."
        )
    if not needs_completions:
        return
    mend = "set lmbda=1.0" if needs_completions.startswith("lmbda") else "set another guidance"
    if not {"messages", "completion"} & set(columns):
        found = ", ".join(map(repr, columns))
        raise ValueError(
            f"{needs_completions} needs completions, but `{name}` has only {found}: add a 'completion' column, or "
            f"{mend}."
        )
    if split_row(next(iter(dataset)))[1] is None:
        raise ValueError(
            f"{needs_completions} needs completions, but the first row of `{name}` has none: end its messages with "
            f"the assistant's, fill its 'completion', or {mend}."
        )
