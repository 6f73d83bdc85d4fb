"""Small student and teacher for two-person Knights-and-Knaves puzzles in the compact form (see `knights_and_knaves`).

The student is the teacher after some worked solutions of a careless pupil.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from embedded.arithmetic_policy import PolicyRecipe
from embedded.knights_and_knaves import Splits, split_puzzles
from embedded.statements import COMPACT_CHARACTERS, Iff, IfThen, Roles, Statement


MAX_TOKENS = 28  # of a completion: four guesses, the answer and the end are 27


@cache
def embedded_puzzles() -> Splits:
    """Those to learn from, and those held out."""
    return split_puzzles(num_train=3000, num_held_out=400, num_people=(2,))


@dataclass(frozen=True)
class PuzzleRecipe(PolicyRecipe):
    """A policy for these puzzles."""

    num_steps: int = 1900
    batch_size: int = 32
    learning_rate: float = 1e-3
    slip_rate: float = 0.0  # of taking what is true for false, or the other way round
    misread_rate: float = 0.0  # of reading "if" as "if and only if"

    task = "puzzles"
    characters = COMPACT_CHARACTERS

    def batches(self) -> Iterator[tuple[list[str], list[str]]]:
        puzzles = embedded_puzzles().train
        generator = random.Random(self.seed)

        def by_mistake(rate: float) -> bool:
            return rate > 0 and generator.random() < rate

        def judge(statements: Sequence[Statement], roles: Roles) -> Roles:
            read = [
                Iff(said.first, said.second) if isinstance(said, IfThen) and by_mistake(self.misread_rate) else said
                for said in statements
            ]
            return tuple(said.holds(roles) != by_mistake(self.slip_rate) for said in read)

        while True:
            batch = generator.choices(puzzles, k=self.batch_size)
            yield [puzzle.compact_prompt for puzzle in batch], [puzzle.compact_solution(judge) for puzzle in batch]


TEACHER = PuzzleRecipe()
STUDENT = PuzzleRecipe(num_steps=100, slip_rate=0.15, misread_rate=0.6, start=TEACHER)
