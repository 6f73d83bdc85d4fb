"""The embedded tasks: problems to train, to choose settings and to report on; rewards; and the policies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

from datasets import Dataset

from embedded import arithmetic, knights_and_knaves, puzzle_policy
from embedded.arithmetic_policy import PUPIL, PolicyRecipe, Recipe


@dataclass(frozen=True)
class Problems:
    """Disjoint data sets with the columns `prompt` and `answer`."""

    train: Dataset
    validation: Dataset  # settings are chosen on these
    test: Dataset  # and reported on these


@dataclass(frozen=True)
class Task:
    problems: Callable[[], Problems]
    is_right: Callable[[str, str], bool]  # completion, answer
    max_tokens: int  # of a completion
    policies: dict[str, PolicyRecipe]
    samples: int  # of each problem, where a policy is measured; 2800 in all have a standard error below 0.01
    defaults: dict[str, Any] = field(default_factory=dict)

    def reward(self, completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        return [float(self.is_right(text, gold)) for text, gold in zip(completions, answer, strict=True)]


def after_last_comma(completion: str, answer: str) -> bool:
    return completion.rsplit(",", 1)[-1] == answer


@cache
def sums() -> Problems:
    """Two-digit sums. Validation takes those that the embedded task's splits leave over."""
    splits = arithmetic.split_problems()
    used = {frozenset((p.first, p.second)) for split in splits for p in split}
    left = [arithmetic.Problem(a, b) for a, b in product(range(10, 100), repeat=2) if frozenset((a, b)) not in used]
    random.Random(0).shuffle(left)
    return Problems(*(arithmetic.as_dataset(split) for split in (splits.train, left[:700], splits.held_out)))


@cache
def puzzles() -> Problems:
    """Knights and Knaves, two people, compact form."""
    splits = puzzle_policy.embedded_puzzles()
    validation = knights_and_knaves.generate_puzzles(
        400, (2,), 1, "0, validation", exclude=[*splits.train, *splits.held_out]
    )

    def as_dataset(puzzles: Sequence[knights_and_knaves.Puzzle]) -> Dataset:
        return Dataset.from_list([{"prompt": p.compact_prompt, "answer": p.compact_answer} for p in puzzles])

    return Problems(as_dataset(splits.train), as_dataset(validation), as_dataset(splits.held_out))


TASKS = {
    "sums": Task(
        sums,
        after_last_comma,
        max_tokens=2 * arithmetic.TOKENS_PER_DIGIT,
        policies={
            "pupil": PUPIL,
            "teacher": Recipe(slip_rate=0.0, forgotten_carry_rate=0.0),  # writes as the pupil does
            "mixed": Recipe(style="mixed", slip_rate=0.05, forgotten_carry_rate=0.9),  # writes either way
            "places": Recipe(
                style="places", slip_rate=0.0, forgotten_carry_rate=0.0
            ),  # writes otherwise than the pupil
        },
        samples=4,
    ),
    "puzzles": Task(
        puzzles,
        after_last_comma,
        max_tokens=puzzle_policy.MAX_TOKENS,
        policies={"pupil": puzzle_policy.STUDENT, "teacher": puzzle_policy.TEACHER},
        samples=8,
    ),
}
