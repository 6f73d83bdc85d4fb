"""The rollouts of one optimizer step: who writes which tokens, and the tensors made of them."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import pad

from trl_ext.losses.token_loss import Metrics


@dataclass
class Rollout:
    """
    One completion of one prompt, as token ids.

    Attributes:
        prompt (`list[int]`):
            The prompt.
        completion (`list[int]`):
            The completion.
        guided (`int`):
            How many tokens at the beginning of the completion the teacher wrote, as guidance.
        off_policy (`bool`):
            Whether the student wrote none of the completion (`lmbda` below 1).
        sampler_logps (`list[float]`, *optional*):
            Log-probabilities (nats) of the tokens that the student sampled, by the engine that sampled them.
    """

    prompt: list[int]
    completion: list[int]
    guided: int = 0
    off_policy: bool = False
    sampler_logps: list[float] | None = None


def roll_out(
    trainer: Any,
    rows: list[tuple[list[int], list[int]]],
    teacher_prompts: list[list[int]],
    generator: torch.Generator,
) -> list[Rollout]:
    """
    Samples a completion for each row, or takes the one of the dataset.

    All processes take part in each generation, whatever they draw, because ZeRO-3 gathers weights from all of them.

    Args:
        trainer ([`TrOPDTrainer`]):
            For its settings and its sampler.
        rows (`list[tuple[list[int], list[int]]]`):
            Prompts, and the dataset's completions (empty where there is none).
        teacher_prompts (`list[list[int]]`):
            What the teacher continues, where it samples.
        generator (`torch.Generator`):
            Of all draws but those of the models.
    """
    args, sampler, training = trainer.args, trainer.sampler, trainer.model.training
    lmbda = args.lmbda if training else 1.0
    longest = trainer.longest_prefix() if training else 0
    off_policy = (torch.rand(len(rows), generator=generator) >= lmbda).tolist()

    written = [completion for _, completion in rows]
    if (lmbda < 1 and args.seq_kd) or (longest and args.guidance == "teacher"):
        length = args.max_new_tokens if lmbda < 1 and args.seq_kd else min(longest, args.max_new_tokens)
        sampled = sampler.from_teacher(teacher_prompts, length)
        if args.seq_kd:
            written = [theirs if off else own for off, theirs, own in zip(off_policy, sampled, written, strict=True)]
        if args.guidance == "teacher":
            written = [own if off else theirs for off, theirs, own in zip(off_policy, sampled, written, strict=True)]

    # The student writes at least the last token, so a prefix never contains the end of a completion
    available = [0 if off else len(sampler.without_end(own)) for off, own in zip(off_policy, written, strict=True)]
    available = [min(length, args.max_new_tokens - 1) for length in available]
    lengths = prefix_lengths(available, longest, args.guidance_share, args.guidance_prefix == "random", generator)
    starts = [prompt + own[:length] for (prompt, _), own, length in zip(rows, written, lengths, strict=True)]
    continued: list[list[int]] = [[] for _ in rows]
    logps_of: list[list[float] | None] = [None for _ in rows]
    if lmbda > 0:
        wanted = [i for i, off in enumerate(off_policy) if not off] or [0]  # this process must take part
        if args.use_vllm:  # a server needs the same number of prompts from every process
            wanted = list(range(len(rows)))
        most = args.max_new_tokens - min(lengths[i] for i in wanted)
        completions, logps = sampler.from_student([starts[i] for i in wanted], most)
        for i, completion, values in zip(wanted, completions, logps or [None] * len(wanted), strict=True):
            continued[i], logps_of[i] = completion, values

    rollouts = []
    for i, (prompt, _) in enumerate(rows):
        if off_policy[i]:
            rollouts.append(Rollout(prompt, written[i], off_policy=True))
        else:
            completion = (written[i][: lengths[i]] + continued[i])[: args.max_new_tokens]
            rollouts.append(Rollout(prompt, completion, guided=lengths[i], sampler_logps=logps_of[i]))
    return rollouts


def prefix_lengths(
    available: list[int], longest: int, share: float, uniform: bool, generator: torch.Generator
) -> list[int]:
    """
    How many tokens of each rollout come from the teacher.

    Args:
        available (`list[int]`):
            How many tokens the teacher wrote for each rollout.
        longest (`int`):
            The most that the schedule allows, see [`~trl_ext.losses.longest_prefix`].
        share (`float`):
            Share of the rollouts that are guided.
        uniform (`bool`):
            Whether each length is drawn uniformly from 0 to the longest possible, or is the longest possible.
        generator (`torch.Generator`):
            Of the draws.
    """
    draws = torch.rand(len(available), 2, generator=generator).tolist()
    lengths = []
    for most, (guided, length) in zip(available, draws, strict=True):
        most = min(most, longest) if guided < share else 0
        lengths.append(int(length * (most + 1)) if uniform else most)
    return lengths


def collate(
    rollouts: list[Rollout], pad_token_id: int, generator: torch.Generator, with_sampler_logps: bool
) -> dict[str, torch.Tensor]:
    """
    The batch that is scored and trained on: prompts padded left, completions right, on the CPU.

    `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask` of shape `(batch, length)`; `guided_mask` and
    `off_policy_mask` like the latter, 1 on those tokens; `draws`, uniform in [0, 1), like the latter; `positions`, the
    indices of the completion tokens in the flattened `completion_mask`, known here without a device synchronisation.
    With `with_sampler_logps` also `sampler_logps`, NaN where no engine has sampled, be it everywhere, because all
    processes must have the same metrics.
    """
    longest = max(1, *(len(rollout.completion) for rollout in rollouts))

    def masks(counts: list[int]) -> torch.Tensor:
        return (torch.arange(longest) < torch.tensor(counts)[:, None]).long()

    completion_mask = masks([len(rollout.completion) for rollout in rollouts])
    completions = [r.completion + [pad_token_id] * (longest - len(r.completion)) for r in rollouts]
    draws = torch.zeros(completion_mask.shape)
    for row, rollout in zip(draws, rollouts, strict=True):  # row by row, so that they do not depend on the batch
        row[: len(rollout.completion)] = torch.rand(len(rollout.completion), generator=generator)
    batch = {
        "prompt_ids": _left_padded([rollout.prompt for rollout in rollouts], pad_token_id),
        "prompt_mask": _left_padded([[1] * len(rollout.prompt) for rollout in rollouts], 0),
        "completion_ids": torch.tensor(completions),
        "completion_mask": completion_mask,
        "guided_mask": masks([rollout.guided for rollout in rollouts]),
        "off_policy_mask": masks([len(rollout.completion) * rollout.off_policy for rollout in rollouts]),
        "draws": draws,
        "positions": completion_mask.flatten().nonzero().squeeze(1),
    }
    if with_sampler_logps:
        batch["sampler_logps"] = torch.full(completion_mask.shape, torch.nan)
        for row, rollout in zip(batch["sampler_logps"], rollouts, strict=True):
            values = (rollout.sampler_logps or [])[: len(rollout.completion) - rollout.guided]
            row[rollout.guided : rollout.guided + len(values)] = torch.tensor(values)
    return batch


def rollout_metrics(batch: dict[str, torch.Tensor], eos_token_ids: list[int]) -> Metrics:
    """Lengths of the completions of a batch of [`collate`], and which of them were cut short; of shape `(batch,)`."""
    mask = batch["completion_mask"]
    lengths = mask.sum(1).float()
    ended = torch.isin(batch["completion_ids"], mask.new_tensor(eos_token_ids)) & mask.bool()
    return {
        "completions/mean_length": lengths,
        "completions/min_length": lengths,
        "completions/max_length": lengths,
        "completions/clipped_ratio": (~ended.any(1)).float(),
    }


def left_padded(rows: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each of shape `(rows, longest)`."""
    return _left_padded(rows, pad_token_id), _left_padded([[1] * len(row) for row in rows], 0)


def _left_padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad([torch.tensor(row, dtype=torch.long) for row in rows], padding_value=value, padding_side="left")
