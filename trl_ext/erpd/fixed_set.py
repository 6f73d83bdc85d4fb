"""The fixed set of a round: rollouts sampled once, in batches of similar length, sharded over the processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import pad

from trl_ext.rollout_checkpoint import read_batches, read_metadata, write_batches


Row = dict[str, torch.Tensor]  # one rollout, without padding, on the CPU

PER_ROLLOUT = ("advantages", "rewards", "outcomes")

# Sequences are sorted by length within this many batches, so that batches differ in more than their length
BATCHES_SORTED_TOGETHER = 50


@dataclass
class FixedSet:
    """
    This process's share of a round's rollouts, as padded micro-batches on the CPU.

    What is measured on the set (log-probabilities, signals) joins the batches as one float per token. The
    micro-batches of all processes with the same number make one global batch. Which rollouts are in it stays the same
    in all passes; the order of the batches differs from pass to pass.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            `prompt_ids`, `prompt_mask` (left-padded), `completion_ids`, `completion_mask`, where there are any
            `tool_mask` and `sampling_per_token_logps` (right-padded), and `advantages`, `rewards` and
            `outcomes` of shape `(batch,)`: the reward from 0 (incorrect) to 1 (correct), NaN for a rollout that the
            losses of sequences leave out.
        num_tokens (`int`):
            Number of tokens that count, on all processes.
        is_informative (`bool`):
            Whether something can be learned from it. If not, its round is skipped.
    """

    batches: list[dict[str, Any]]
    num_tokens: int = 0
    is_informative: bool = True

    def micro_batch(self, index: int, device: torch.device) -> dict[str, Any]:
        return {name: value.to(device, non_blocking=True) for name, value in self.batches[index].items()}

    def order(self, seed: int) -> list[int]:
        """The order of the batches in one pass, the same on every process."""
        return torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(seed)).tolist()

    def masks(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Each micro-batch with its mask of the tokens that count."""
        for batch in self.batches:
            yield batch, batch["completion_mask"] * batch.get("tool_mask", 1)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Writes the share of one process as safetensors."""
        facts = {"num_tokens": str(self.num_tokens), "is_informative": str(self.is_informative)}
        write_batches(path, self.batches, {**metadata, **facts})

    @classmethod
    def load(cls, path: Path) -> "FixedSet":
        """Reads what `save` wrote."""
        facts = read_metadata(path)
        batches = read_batches(path, torch.device("cpu"))
        return cls(batches, int(facts["num_tokens"]), facts["is_informative"] == "True")


@dataclass
class RoundRollouts:
    """
    The rollouts of a round before they are distributed over the processes.

    Args:
        chunks (`list[list[Row]]`):
            This process's rollouts, generation by generation.
        rewards (`torch.Tensor` of shape `(rollouts,)`):
            Of all processes, in the order of sampling. NaN for a rollout without a reward.
        prompts (`torch.Tensor` of shape `(rollouts,)`):
            The number of each rollout's prompt, from 0.
    """

    chunks: list[list[Row]]
    rewards: torch.Tensor
    prompts: torch.Tensor


def rows_of(rollouts: dict[str, Any], rewards: torch.Tensor) -> list[Row]:
    """
    The rollouts of a generation batch of TRL one by one, without padding, on the CPU.

    Args:
        rollouts (`dict[str, Any]`):
            What `GRPOTrainer._generate_and_score_completions` returns.
        rewards (`torch.Tensor` of shape `(batch,)`):
            Their rewards.
    """
    tensors = {name: value.cpu() for name, value in rollouts.items() if isinstance(value, torch.Tensor)}
    per_token = ("completion_ids", "completion_mask", "tool_mask", "sampling_per_token_logps")
    rows = []
    for i, mask in enumerate(tensors["completion_mask"]):
        # A truncated completion may be masked out as a whole: one token of it is kept, so that no row is empty
        length = int(mask.nonzero().max()) + 1 if mask.any() else 1
        row = {name: tensors[name][i, :length] for name in per_token if name in tensors}
        row["prompt_ids"] = tensors["prompt_ids"][i][tensors["prompt_mask"][i].bool()]
        row["advantages"], row["rewards"] = tensors["advantages"][i].float(), rewards[i].cpu().float()
        rows.append({name: value.clone() for name, value in row.items()})  # not a view of the padded batch
    return rows


def share_out(
    chunks: Sequence[Sequence[Row]],
    accelerator: Accelerator,
    micro_batch_size: int,
    seed: int,
    collate: Callable[[list[Row]], dict[str, torch.Tensor]],
) -> FixedSet:
    """
    Makes the set from the rollouts of all processes. Each process keeps its share of every global batch.

    The result depends on the rollouts, their order, the seed and the size of the global batch, but not on the number
    of processes.

    Args:
        chunks (`Sequence[Sequence[Row]]`):
            This process's rollouts, generation by generation: the same number, of the same size, on every process.
    """
    processes, local, size = accelerator.num_processes, len(chunks[0]), accelerator.num_processes * micro_batch_size
    lengths = torch.tensor([[len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows] for rows in chunks])
    gathered = accelerator.gather(lengths[None].to(accelerator.device)).cpu()  # (process, chunk, rollout)
    batches = arrange(gathered.transpose(0, 1).flatten(), size, seed)  # indices in the order of sampling
    mine = batches.view(-1, processes, micro_batch_size)[:, accelerator.process_index].tolist()
    wanted = {index for batch in mine for index in batch}
    kept: dict[int, Row] = {}
    for number, rows in enumerate(chunks):  # chunk by chunk, so that no process ever holds all rollouts
        for i, row in enumerate(gather_object(list(rows))):
            if (index := number * processes * local + i) in wanted:
                kept[index] = row
    fixed_set = FixedSet([collate([kept[index] for index in batch]) for batch in mine])
    tokens = torch.tensor(sum(int(mask.sum()) for _, mask in fixed_set.masks()), device=accelerator.device)
    fixed_set.num_tokens = int(accelerator.reduce(tokens, reduction="sum"))
    return fixed_set


def arrange(lengths: torch.Tensor, batch_size: int, seed: int) -> torch.Tensor:
    """Batches of similar length: from `lengths` of shape `(n,)` to indices of shape `(batches, batch_size)`."""
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    pieces = shuffled.split(BATCHES_SORTED_TOGETHER * batch_size)
    ordered = [piece[lengths[piece].argsort(descending=True, stable=True)] for piece in pieces]
    return torch.cat(ordered).view(-1, batch_size)


def collate(rows: Sequence[Row], pad_token_id: int, pad_to_multiple_of: int | None) -> dict[str, torch.Tensor]:
    """One micro-batch as TRL has it: prompts are padded on the left, completions on the right."""

    def padded(name: str, value: float, side: str) -> torch.Tensor:
        tensors = [row[name] for row in rows]
        return pad(tensors, padding_value=value, padding_side=side, pad_to_multiple_of=pad_to_multiple_of)

    batch = {
        "prompt_ids": padded("prompt_ids", pad_token_id, "left"),
        "prompt_mask": pad(
            [torch.ones_like(row["prompt_ids"]) for row in rows],
            padding_value=0,
            padding_side="left",
            pad_to_multiple_of=pad_to_multiple_of,
        ),
        "completion_ids": padded("completion_ids", pad_token_id, "right"),
        "completion_mask": padded("completion_mask", 0, "right"),
    }
    # What only some rollouts have: without a mask all tokens count, without a log-probability it is unknown
    for name, absent, padding in (("tool_mask", 1, 1), ("sampling_per_token_logps", torch.nan, 0.0)):
        if any(name in row for row in rows):
            kind = next(row[name] for row in rows if name in row)
            rows = [{name: kind.new_full(row["completion_ids"].shape, absent), **row} for row in rows]
            batch[name] = padded(name, padding, "right")
    return batch | {name: torch.stack([row[name] for row in rows]) for name in PER_ROLLOUT if name in rows[0]}
