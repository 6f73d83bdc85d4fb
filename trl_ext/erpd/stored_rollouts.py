"""Rollouts that are stored in the training data, with their rewards, instead of sampled by the policy."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from trl import is_conversational
from trl.trainer.utils import nanstd

from trl_ext.erpd.fixed_set import RoundRollouts, Row
from trl_ext.erpd.host import Host


logger = get_logger(__name__)

COMPLETIONS, REWARDS, LOGPS = ("completions", "completion"), ("rewards", "reward"), "logprobs"


def has_stored_rollouts(dataset: Any) -> bool:
    """Whether the dataset has a column of completions and one of rewards beside the prompts."""
    columns = set(getattr(dataset, "column_names", None) or ())
    return bool(columns & set(COMPLETIONS)) and bool(columns & set(REWARDS))


def count_rollouts(dataset: Dataset) -> int:
    """The number of rollouts in a dataset that has some, or a `ValueError` for columns that do not fit together."""
    completions, rewards = (_column(dataset, names) for names in (COMPLETIONS, REWARDS))
    listed = completions == COMPLETIONS[0]
    if listed != (rewards == REWARDS[0]):
        raise ValueError(
            f"The columns {completions!r} and {rewards!r} do not fit together: name them 'completion' and 'reward' "
            "for one rollout per row, or 'completions' and 'rewards' for a list of rollouts per row."
        )
    if not listed:
        return len(dataset)
    total = 0
    for number, (texts, values) in enumerate(zip(dataset[completions], dataset[rewards], strict=True)):
        if len(texts) != len(values):
            raise ValueError(
                f"Row {number} has {len(texts)} completions and {len(values)} rewards: give one reward per completion "
                "(None for a completion without one)."
            )
        total += len(texts)
    return total


def read_stored_rollouts(host: Host) -> RoundRollouts:
    """
    This process's share of the rollouts, in the order of the dataset, and the rewards of all.

    Prompts are tokenized as they are when they are sampled. A completion gets an end token (of messages that of the
    chat template) unless it has one already, or was truncated: it has as many tokens as `max_completion_length` allows
    or, if there are `logprobs`, as many tokens as these. Rollouts beyond the last whole update are not used.
    """
    args, accelerator = host.trainer.args, host.trainer.accelerator
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    examples = _flatten(host.trainer.train_dataset)
    used = len(examples) // update * update
    prompts, numbers = _number_prompts([example["prompt"] for example in examples])
    rewards = torch.tensor([torch.nan if (r := example["reward"]) is None else float(r) for example in examples])
    advantages = group_advantages(rewards, numbers, args.scale_rewards)
    prompt_ids = [torch.tensor(ids) for ids in host.tokenize(prompts)]
    end = _end_token(prompts, host)
    local = used // accelerator.num_processes
    first = accelerator.process_index * local
    rows: list[Row] = []
    unmatched = cut = 0
    for i in range(first, first + local):
        ids, logps = _tokens(examples[i], end, host)
        cut += len(ids) > (args.max_completion_length or len(ids))
        ids, logps = ids[: args.max_completion_length], logps and logps[: args.max_completion_length]
        masked_out = args.mask_truncated_completions and not _ends(ids, host)
        if masked_out:
            ids, logps = ids[:1], None if logps is None else logps[:1]
        row = {"prompt_ids": prompt_ids[numbers[i]], "completion_ids": torch.tensor(ids)}
        row |= {"completion_mask": torch.full((len(ids),), int(not masked_out))}
        if LOGPS in examples[i]:
            unmatched += logps is None
            row["sampling_per_token_logps"] = torch.tensor([torch.nan] * len(ids) if logps is None else logps)
        rows.append(row | {"advantages": advantages[i], "rewards": rewards[i]})
    counts = torch.tensor([[unmatched, cut]], device=accelerator.device)  # of all processes, for the one that logs
    unmatched, cut = accelerator.gather(counts).sum(0).tolist()
    _warn_of_what_is_not_used(len(examples) - used, update, unmatched, used)
    if cut:
        logger.warning(
            f"{cut} of {used} stored completions have more than max_completion_length={args.max_completion_length} "
            "tokens and lose their end, but keep their reward: raise it, or remove these rows."
        )
    return RoundRollouts([rows], rewards[:used], numbers[:used])


def group_advantages(rewards: torch.Tensor, prompts: torch.Tensor, scale_rewards: str) -> torch.Tensor:
    r"""
    GRPO's advantages for groups of any size: \\( (r - \bar r) / (\sigma + 10^{-4}) \\) with the mean of the prompt's
    rewards and, as `scale_rewards` says, their standard deviation (`"group"`), that of all rewards (`"batch"`), or no
    division (`"none"`). 0 for a rollout without a reward, and for one that is alone.

    Args:
        rewards, prompts (`torch.Tensor` of shape `(rollouts,)`):
            As in [`~trl_ext.erpd.fixed_set.RoundRollouts`].
    """
    advantages = torch.zeros_like(rewards)
    sizes = prompts.bincount()
    for size in sizes.unique().tolist():
        # All groups of one size at a time, as GRPO does
        members = (sizes[prompts] == size).nonzero().squeeze(1)
        members = members[prompts[members].argsort(stable=True)]
        groups = rewards[members].view(-1, size)
        centred = groups - groups.nanmean(1, keepdim=True)
        if scale_rewards == "group" and size > 1:
            centred = centred / (nanstd(groups, dim=1).unsqueeze(1) + 1e-4)
        advantages[members] = centred.flatten()
    if scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return advantages.nan_to_num(nan=0.0)


def _column(dataset: Dataset, names: Sequence[str]) -> str:
    return next(name for name in names if name in dataset.column_names)


def _flatten(dataset: Dataset) -> list[dict[str, Any]]:
    """One dict per rollout: `prompt`, `completion`, `reward`, and `logprobs` if the dataset has them."""
    completions, rewards = _column(dataset, COMPLETIONS), _column(dataset, REWARDS)
    examples = []
    for row in dataset:
        logps = {LOGPS: row[LOGPS]} if row.get(LOGPS) is not None else {}
        if completions == COMPLETIONS[1]:
            examples.append({"prompt": row["prompt"], "completion": row[completions], "reward": row[rewards], **logps})
            continue
        for i, (completion, reward) in enumerate(zip(row[completions], row[rewards], strict=True)):
            own_logps = {LOGPS: logps[LOGPS][i]} if logps else {}
            examples.append({"prompt": row["prompt"], "completion": completion, "reward": reward, **own_logps})
    return examples


def _number_prompts(prompts: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """The different prompts in the order in which they come, and the number of each rollout's."""
    number_of: dict[str, int] = {}
    different: list[Any] = []
    numbers = []
    for prompt in prompts:
        key = repr(prompt)
        if key not in number_of:
            number_of[key] = len(different)
            different.append(prompt)
        numbers.append(number_of[key])
    return different, torch.tensor(numbers)


def _end_token(prompts: list[Any], host: Host) -> int:
    """With which the policy ends a completion of such prompts. A chat template may end a turn with one of its own."""
    if is_conversational({"prompt": prompts[0]}):
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        if ends := [token for token in host.tokenize([turns])[0] if token in host.end_tokens]:
            return ends[-1]
    return host.tokenizer.eos_token_id


def _tokens(example: dict[str, Any], end: int, host: Host) -> tuple[list[int], list[float] | None]:
    """A completion's tokens and their log-probabilities under the sampler; `None` if these do not match the tokens."""
    tokenizer: Any = host.tokenizer
    limit = host.trainer.args.max_completion_length
    text = example["completion"]
    if not isinstance(text, str):
        if len(text) != 1 or text[0]["role"] != "assistant" or not isinstance(text[0]["content"], str):
            raise ValueError(
                f"A stored completion must be text, or one message of the assistant, but there is {text!r}: store "
                "each turn as a rollout of its own, with the earlier turns in its prompt."
            )
        text = text[0]["content"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    logps = example.get(LOGPS)
    truncated = len(logps) == len(ids) if logps is not None else limit is not None and len(ids) >= limit
    if not ids or not (truncated or _ends(ids, host)):
        ids = [*ids, end]
    if logps is not None and len(logps) != len(ids):
        logps = None
    if logps is not None:
        logps = [torch.nan if logp is None else logp for logp in logps]
    return ids, logps


def _ends(ids: list[int], host: Host) -> bool:
    return bool(ids) and ids[-1] in host.end_tokens


def _warn_of_what_is_not_used(left_over: int, update: int, unmatched: int, local: int) -> None:
    if left_over:
        logger.warning(
            f"The last {left_over} stored rollouts are not used, because an update takes {update}: store a multiple "
            "of that, or lower per_device_train_batch_size or gradient_accumulation_steps."
        )
    if unmatched:
        logger.warning(
            f"The logprobs of {unmatched} of {local} stored rollouts are not used, because their number is not that "
            "of the completion's tokens: store the text as it was sampled, including special tokens."
        )
