"""From the rows of a dataset to token ids: prompts, and the completions that belong to them."""

import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import pad

from trl_ext.dataset_columns import known_columns


IGNORED = -100  # the label of everything but completion tokens


@dataclass
class PromptCollator:
    """
    Batches with the keys of GKD's own collator ([`~trl.experimental.utils.DataCollatorForChatML`]), all left-padded
    tensors of shape `(batch, length)`: `prompts`, `prompt_attention_mask`, and `input_ids`, `attention_mask`, `labels`
    (-100 everywhere but on the completion) of prompt and completion together.

    A row has `messages`, of which the last is the completion if it is the assistant's; or a `prompt` and optionally a
    `completion`, both as text or both as messages. `tools` (a list, or JSON text) and `chat_template_kwargs` go to the
    chat template. Prompt and completion are tokenized separately, because completions are sampled after a prompt that
    was tokenized alone: no token spans the boundary.

    A `teacher_prompt` (text or messages) is what the teacher sees in place of the prompt. The batch then has
    `teacher_prompts` and `teacher_prompt_attention_mask`, which are never cut.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        max_length (`int`, *optional*):
            Maximum length of prompt and completion together, in tokens. A longer row loses the end of its completion;
            a prompt that is longer by itself loses its beginning. A prompt is never cut to make room for a completion.
        completions (`bool`, defaults to `True`):
            Whether completions are needed.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    completions: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [self._cut(*self._tokens(row)) for row in rows]
        batch = {
            "prompts": self._pad([prompt for prompt, _ in pairs], self.tokenizer.pad_token_id),
            "prompt_attention_mask": self._pad([[1] * len(prompt) for prompt, _ in pairs], 0),
            "input_ids": self._pad([prompt + completion for prompt, completion in pairs], self.tokenizer.pad_token_id),
            "attention_mask": self._pad([[1] * len(prompt + completion) for prompt, completion in pairs], 0),
            "labels": self._pad([[IGNORED] * len(prompt) + completion for prompt, completion in pairs], IGNORED),
        }
        if any(row.get("teacher_prompt") for row in rows):
            prompts = [self._teacher_prompt(row) or prompt for row, (prompt, _) in zip(rows, pairs, strict=True)]
            batch["teacher_prompts"] = self._pad(prompts, self.tokenizer.pad_token_id)
            batch["teacher_prompt_attention_mask"] = self._pad([[1] * len(prompt) for prompt in prompts], 0)
        return batch

    def _teacher_prompt(self, row: dict[str, Any]) -> list[int] | None:
        prompt = row.get("teacher_prompt")
        if not prompt:
            return None
        others = {name: value for name, value in row.items() if name in ("tools", "chat_template_kwargs")}
        return self._tokens({"prompt": prompt, **others})[0]

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
        if self.tokenizer.eos_token_id in completion_ids:  # many templates write a newline after it
            completion_ids = completion_ids[: completion_ids.index(self.tokenizer.eos_token_id) + 1]
        return prompt_ids, completion_ids

    def _render(self, row: dict[str, Any], prompt: list[dict], completion: list[dict] | None) -> tuple[str, str]:
        options = {"tools": _tools(row), **(row.get("chat_template_kwargs") or {})}
        prompt_text = apply_chat_template({"prompt": prompt}, self.tokenizer, **options)["prompt"]
        if not completion or not self.completions:
            return prompt_text, ""
        both = apply_chat_template({"prompt": prompt, "completion": completion}, self.tokenizer, **options)
        if both["prompt"] != prompt_text:
            warnings.warn(  # shown once; a logger of accelerate's has no state in a data loader's process
                "The chat template renders the prompt differently when a completion follows it: the completions of "
                "the dataset do not begin exactly where those that the student samples begin. Use a template that "
                "renders the prompt alike in both cases, or set chat_template_kwargs (e.g. enable_thinking=False).",
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


def _tools(row: dict[str, Any]) -> Any:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) if tools else None
    except ValueError as error:
        raise ValueError(
            f"A row's 'tools' are text that is not JSON ({error}): write them with json.dumps(), or as a list."
        ) from error


def split_row(row: dict[str, Any]) -> tuple[Any, Any]:
    """Prompt and completion of a row, as they are in the dataset; `None` for a completion that is missing."""
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
            f"{', '.join(map(repr, row))}: rename the column that holds the prompts, with dataset.rename_column()."
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


def unpad_teacher_prompts(batch: dict[str, torch.Tensor]) -> list[list[int]] | None:
    """The token ids of what the teacher sees in place of the prompts; `None` where that is the prompts."""
    if "teacher_prompts" not in batch:
        return None
    prompts, masks = batch["teacher_prompts"].cpu(), batch["teacher_prompt_attention_mask"].cpu().bool()
    return [prompt[mask].tolist() for prompt, mask in zip(prompts, masks, strict=True)]


def check_columns(trainer: str, dataset: Any, name: str, needs_completions: str | None) -> None:
    """
    Raises a `ValueError` for a dataset whose columns are known and lack what is needed.

    Args:
        trainer (`str`):
            Name of the trainer, for messages.
        name (`str`):
            Name of the argument that the dataset was passed as.
        needs_completions (`str`, *optional*):
            The setting that needs completions, if one does.
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
    fix = "set lmbda=1.0" if needs_completions.startswith("lmbda") else "set another guidance"
    if not {"messages", "completion"} & set(columns):
        found = ", ".join(map(repr, columns))
        raise ValueError(
            f"{needs_completions} needs completions, but `{name}` has only {found}: add a 'completion' column, or "
            f"{fix}."
        )
    if split_row(next(iter(dataset)))[1] is None:
        raise ValueError(
            f"{needs_completions} needs completions, but the first row of `{name}` has none: end its messages with "
            f"one from the assistant, fill its 'completion', or {fix}."
        )
