"""The embedded tasks as the examples take them: policies made on the spot, problems, reward and measures."""

from functools import partial

from transformers import AutoTokenizer

from common.training import Task, prepare_embedded
from embedded import puzzle_policy
from embedded.arithmetic import as_dataset, correct_answer, held_out_accuracy, split_problems
from embedded.arithmetic_policy import HINTED_PUPIL, PUPIL, PolicyRecipe, prepare_policy
from embedded.knights_and_knaves import as_dataset as puzzles_as_dataset
from embedded.knights_and_knaves import correct_compact_roles


def sums(num_held_out: int, student: PolicyRecipe = PUPIL, teacher: PolicyRecipe | None = None) -> Task:
    """Two-digit sums with written-out steps; measured is the accuracy on the held-out problems."""
    prepare_embedded()
    path = prepare_policy(student)
    problems = split_problems()
    held_out = problems.held_out[:num_held_out]
    return Task(
        model=path,
        tokenizer=AutoTokenizer.from_pretrained(path, padding_side="left"),
        train=as_dataset(problems.train),
        held_out=as_dataset(held_out) if held_out else None,
        reward=correct_answer,
        teacher=prepare_policy(teacher) if teacher else None,
        measure=partial(held_out_accuracy, problems=held_out),
    )


def hinted_sums(num_held_out: int) -> Task:
    """
    The same sums with the worked carries as a hint, for a policy that can use it, and its accuracy without the hint.
    """
    task = sums(num_held_out, HINTED_PUPIL)
    task.train = as_dataset(split_problems().train, hints=True)
    return task


def puzzles(num_held_out: int) -> Task:
    """Knights-and-Knaves puzzles of two people in the compact form; measured by TRL's evaluation."""
    prepare_embedded()
    path, data = prepare_policy(puzzle_policy.STUDENT), puzzle_policy.embedded_puzzles()
    return Task(
        model=path,
        tokenizer=AutoTokenizer.from_pretrained(path, padding_side="left"),
        train=puzzles_as_dataset(data.train, compact=True),
        held_out=puzzles_as_dataset(data.held_out[:num_held_out], compact=True) if num_held_out else None,
        reward=correct_compact_roles,
        teacher=prepare_policy(puzzle_policy.TEACHER),
    )
