"""Rollouts that begin with the teacher's words, ever fewer of them: Eq. 8 of TrOPD (arXiv 2606.01249)."""

import math

import torch


def longest_prefix(step: int, max_steps: int, max_length: int, schedule: str) -> int:
    r"""
    The longest prefix at an optimizer step, in tokens: with `"cosine"` (the paper's)
    \\( L(s) = L_\mathrm{max} (1 + \cos(\pi s / S)) / 2 \\), with `"linear"` \\( L_\mathrm{max} (1 - s / S) \\), with
    `"constant"` \\( L_\mathrm{max} \\); rounded down.

    Args:
        step (`int`):
            \\( s \\), the number of optimizer steps taken.
        max_steps (`int`):
            \\( S \\), that of the whole run.
        max_length (`int`):
            \\( L_\mathrm{max} \\).
        schedule (`str`):
            `"cosine"`, `"linear"` or `"constant"`.
    """
    progress = min(step / max_steps, 1.0)
    if schedule == "cosine":
        return int(max_length * (1 + math.cos(math.pi * progress)) / 2)
    return int(max_length * (1 - progress)) if schedule == "linear" else max_length


def prefix_lengths(
    available: list[int], longest: int, share: float, uniform: bool, generator: torch.Generator
) -> list[int]:
    """
    How many tokens of each rollout come from the teacher.

    Args:
        available (`list[int]`):
            How many it has written.
        longest (`int`):
            How many there may be now.
        share (`float`):
            Share of the rollouts that are guided.
        uniform (`bool`):
            Whether a length is drawn from 0 to the most that is possible, or is that.
        generator (`torch.Generator`):
            Of the draws.
    """
    draws = torch.rand(len(available), 2, generator=generator).tolist()
    lengths = []
    for most, (guided, length) in zip(available, draws, strict=True):
        most = min(most, longest) if guided < share else 0
        lengths.append(int(length * (most + 1)) if uniform else most)
    return lengths
