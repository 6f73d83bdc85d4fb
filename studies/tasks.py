"""The embedded tasks: problems to train, to choose settings and to report on; rewards; and the policies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

from datasets import Dataset

from embedded import arithmetic, knights_and_knaves, puzzle_policy
from embedded.arithmetic_policy import PUPIL, PolicyRecipe, Recipe


@dataclass(frozen=True)
class Problems:
    """Disjoint datasets with the columns `prompt` and `answer`."""

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
    """Two-digit sums. Those for validation are not in the embedded task's splits."""
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


@dataclass(frozen=True)
class TwoLengths(PolicyRecipe):
    """A policy for sums of two and of three digits, half of each."""

    num_steps: int = 900
    styles: tuple[str, str] = ("columns", "columns")  # of two digits, of three
    slip_rate: float = 0.2
    forgotten_carry_rate: float = 0.6

    task = "sums-2-3"
    characters = arithmetic.CHARACTERS

    def batches(self) -> Iterator[tuple[list[str], list[str]]]:
        problems = [arithmetic.split_problems(digits).train for digits in (2, 3)]
        generator = random.Random(self.seed)
        mistakes = arithmetic.Mistakes(self.slip_rate, self.forgotten_carry_rate, generator)
        while True:
            batch = [(generator.choice(problems[i % 2]), self.styles[i % 2]) for i in range(self.batch_size)]
            yield [p.prompt for p, _ in batch], [p.worked_solution(style, mistakes) for p, style in batch]


@cache
def sums_of_two_and_three_digits() -> Problems:
    """Half of each, alternating. The sum of a held-out problem says whether it is for validation, as b+a's does."""
    two, three = (arithmetic.split_problems(digits) for digits in (2, 3))

    def in_turns(*parts: list[arithmetic.Problem]) -> Dataset:
        return arithmetic.as_dataset([problem for group in zip(*parts, strict=False) for problem in group])

    def held_out(split: arithmetic.Splits, for_validation: bool) -> list[arithmetic.Problem]:
        return [p for p in split.held_out if ((p.first + p.second) % 3 == 0) == for_validation]

    return Problems(
        in_turns(two.train, three.train),
        in_turns(held_out(two, True)[:300], held_out(three, True)[:300]),
        in_turns(held_out(two, False)[:500], held_out(three, False)[:500]),
    )


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
            ),  # writes differently from the pupil
            "equal": Recipe(seed=1),  # makes the pupil's mistakes as often as the pupil
            "worse": Recipe(seed=1, slip_rate=0.4),  # and slips more often
        },
        samples=4,
    ),
    "puzzles": Task(
        puzzles,
        after_last_comma,
        max_tokens=puzzle_policy.MAX_TOKENS,
        policies={
            "pupil": puzzle_policy.STUDENT,
            "teacher": puzzle_policy.TEACHER,
            "equal": replace(puzzle_policy.STUDENT, seed=1),
            "worse": replace(puzzle_policy.STUDENT, seed=1, slip_rate=0.3, misread_rate=0.9),
        },
        samples=8,
    ),
    "sums_2_3": Task(
        sums_of_two_and_three_digits,
        after_last_comma,
        max_tokens=3 * arithmetic.TOKENS_PER_DIGIT,
        policies={
            "pupil": TwoLengths(),
            # Writes sums of two digits as the pupil does, without mistakes, and those of three in a way of its own
            "partly": TwoLengths(styles=("columns", "places"), slip_rate=0.0, forgotten_carry_rate=0.0),
        },
        samples=4,
    ),
}
