r"""Knights-and-Knaves puzzles for the examples: a generator, an exact solver, prompts, and a verifiable reward.

Every inhabitant of an island is a knight, who always tells the truth, or a knave, who always lies, and says one
sentence. Who is which? Two to eight people; every puzzle has exactly one solution. Nothing is downloaded.

    splits = split_puzzles(num_people=(3, 4, 5, 6, 7))
    train_dataset = as_dataset(splits.train, tokenizer)  # for a GRPOTrainer with `reward_funcs=correct_roles`

The form is that in which Logic-RL (arXiv 2502.14768) and others train language models on these puzzles, with solutions
such as `(1) Zoey is a knave\n(2) Oliver is a knight`: `correct_roles` reads theirs too.

For models of a few hundred thousand parameters the same puzzles have a compact form. `A:b;B:B>a?` (A says that B is a
knave; B, that if B is a knight then A is a knave) is to be continued as `AB>ab,Ab>AB,aB>aB,aB`: guess after guess,
each with the roles that its truth would give the speakers, until the two agree; then the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset

from embedded.statements import (
    CONNECTIVES,
    LETTERS,
    Is,
    Not,
    Roles,
    Statement,
    guesses,
    letters,
    role_name,
    solutions,
    spoken_roles,
)


INSTRUCTION = """\
You solve logic puzzles. First reason step by step within <think> </think>, then answer within <answer> </answer>. \
The answer names every inhabitant once, with the role, in this form:
<think> your reasoning </think>
<answer>
(1) Zoey is a knave
(2) Oliver is a knight
</answer>
In what people say, "or" includes the case of both, and "if ... then" is false only where the first part is true and \
the second is not."""

# fmt: off
NAMES = (
    "Abigail", "Aiden", "Alexander", "Amelia", "Aria", "Aurora", "Avery", "Benjamin", "Charlotte", "Chloe", "Daniel",
    "David", "Elizabeth", "Ella", "Emily", "Ethan", "Evelyn", "Grace", "Harper", "Henry", "Isabella", "Jack", "Jacob",
    "James", "Joseph", "Liam", "Lily", "Logan", "Lucas", "Luke", "Mason", "Matthew", "Mia", "Michael", "Noah",
    "Oliver", "Olivia", "Owen", "Penelope", "Riley", "Samuel", "Scarlett", "Sebastian", "Sofia", "Victoria",
    "William", "Zoey",
)
# fmt: on

# How a sentence is introduced; {Claim} starts with a capital letter
PHRASINGS = (
    '{name} said, "{Claim}."',
    "{name} said that {claim}.",
    "{name} told you that {claim}.",
    '{name} remarked, "{Claim}."',
    '{name} stated: "{Claim}."',
    "{name} claimed that {claim}.",
    '{name} was heard saying, "{Claim}."',
    'As {name} put it, "{Claim}."',
    '"{Claim}," {name} declared.',
    '"{Claim}," according to {name}.',
)

MAX_DRAWS = 1000  # without a new puzzle, before giving up


@dataclass(frozen=True)
class Puzzle:
    """One puzzle. Its prompt is made by `as_prompt`, in the compact form it is `compact_prompt`."""

    statements: tuple[Statement, ...]  # of person 0, 1, ...
    roles: Roles  # the only solution
    names: tuple[str, ...]
    phrasings: tuple[str, ...]

    @property
    def text(self) -> str:
        claims = [statement.sentence(self.names) for statement in self.statements]
        sentences = [
            phrasing.format(name=name, claim=claim, Claim=claim[0].upper() + claim[1:])
            for phrasing, name, claim in zip(self.phrasings, self.names, claims, strict=True)
        ]
        return (
            "An island is inhabited only by knights, who always tell the truth, and knaves, who always lie. "
            f"You meet {len(self.names)} inhabitants: {', '.join(self.names[:-1])} and {self.names[-1]}. "
            f"{' '.join(sentences)} Who is a knight, and who is a knave?"
        )

    @property
    def solution(self) -> str:
        """`(1) Zoey is a knave` and so on, one person per line."""
        people = enumerate(zip(self.names, self.roles, strict=True), start=1)
        return "\n".join(f"({number}) {name} is a {role_name(role)}" for number, (name, role) in people)

    @property
    def compact_prompt(self) -> str:
        """As `A:b;B:B>a?`."""
        spoken = [f"{LETTERS[person]}:{said.compact()}" for person, said in enumerate(self.statements)]
        return ";".join(spoken) + "?"

    @property
    def compact_answer(self) -> str:
        """As `aB`: A is a knave, B is a knight."""
        return letters(self.roles)

    def compact_solution(self, judge: Callable[[Sequence[Statement], Roles], Roles] = spoken_roles) -> str:
        """
        The worked solution, as `AB>ab,Ab>AB,aB>aB,aB`: guesses up to the correct one, then the answer.

        With a `judge` that makes mistakes, in place of `spoken_roles`: up to the first guess that it takes for
        correct, or the last.
        """
        steps = []
        for roles in guesses(len(self.roles)):
            spoken = judge(self.statements, roles)
            steps.append(f"{letters(roles)}>{letters(spoken)}")
            if spoken == roles:
                break
        return ",".join([*steps, letters(roles)])

    def pattern(self) -> tuple[str, ...]:
        """
        What is left without the names, the phrasings and the order of the people.

        Puzzles that are the same up to renaming have the same pattern. Different ones may have it too, which is rare
        and only costs a puzzle: people whose statements still look the same after `num_people` rounds of labelling
        each person by what is said count as the same.
        """
        labels = ["" for _ in self.statements]
        for _ in self.statements:
            lines = [
                f"{label}:" + statement.sentence([f"{other}{'*' * (i == j)}" for j, other in enumerate(labels)])
                for i, (label, statement) in enumerate(zip(labels, self.statements, strict=True))
            ]
            ranks = {line: str(rank) for rank, line in enumerate(sorted(set(lines)))}
            labels = [ranks[line] for line in lines]
        return tuple(sorted(lines))


def _draw_puzzle(generator: random.Random, num_people: int, depth: int) -> Puzzle:
    """Its only solution is drawn first, so that no assignment is the solution much more often than another."""
    roles = tuple(generator.random() < 0.5 for _ in range(num_people))
    while True:
        statements = tuple(_draw_statement(generator, person, roles, depth) for person in range(num_people))
        if solutions(statements) == [roles]:
            return Puzzle(
                statements=statements,
                roles=roles,
                names=tuple(generator.sample(NAMES, num_people)),
                phrasings=tuple(generator.choices(PHRASINGS, k=num_people)),
            )


def _draw_statement(generator: random.Random, speaker: int, roles: Roles, depth: int) -> Statement:
    """What `speaker` may say in the solution `roles`: always something about somebody else."""
    others = [person for person in range(len(roles)) if person != speaker]
    while True:
        statement = _draw_part(generator, generator.choice(others), len(roles), depth)
        if statement.holds(roles) == roles[speaker]:
            return statement


def _draw_part(generator: random.Random, person: int, num_people: int, depth: int) -> Statement:
    statement: Statement
    if depth == 0 or generator.random() < 1 / 3:
        statement = Is(person, generator.random() < 0.5)
    else:
        another = generator.choice([other for other in range(num_people) if other != person])
        parts = [_draw_part(generator, about, num_people, depth - 1) for about in (person, another)]
        generator.shuffle(parts)
        statement = generator.choice(CONNECTIVES)(*parts)
    negated = generator.random() < 0.25 and (isinstance(statement, Is) or depth > 1)
    return Not(statement) if negated else statement


def generate_puzzles(
    number: int, num_people: Sequence[int] = (3,), depth: int = 1, seed: int | str = 0, exclude: Iterable[Puzzle] = ()
) -> list[Puzzle]:
    """
    Different puzzles of the sizes `num_people`, in turn. The same arguments give the same puzzles, on every machine.

    They differ from each other and from those in `exclude` by more than names, phrasings and the order of the people.
    `depth` is how deep connectives may nest in what somebody says: 1, as in the literature, for at most two parts such
    as `Zoey is not a knight` and a connective; with 2 these parts may themselves be of depth 1, and so on.
    """
    if not num_people or not all(2 <= size <= len(LETTERS) for size in num_people):
        raise ValueError(f"`num_people` must hold numbers from 2 to {len(LETTERS)}, not {num_people!r}.")
    if depth < 1:  # without connectives, the opposite of every solution is a solution
        raise ValueError(f"`depth` must be at least 1, not {depth}.")
    generator = random.Random(seed)
    seen = {puzzle.pattern() for puzzle in exclude}
    puzzles: list[Puzzle] = []
    while len(puzzles) < number:
        size = num_people[len(puzzles) % len(num_people)]
        for _ in range(MAX_DRAWS):
            puzzle = _draw_puzzle(generator, size, depth)
            pattern = puzzle.pattern()
            if pattern not in seen:
                break
        else:
            raise ValueError(
                f"There are hardly more different puzzles of {size} people at depth {depth} than the "
                f"{sum(len(p.roles) == size for p in puzzles)} found: ask for fewer, or for more people or depth."
            )
        seen.add(pattern)
        puzzles.append(puzzle)
    return puzzles


class Splits(NamedTuple):
    """Lists of puzzles of which no two are the same up to renaming."""

    train: list[Puzzle]
    held_out: list[Puzzle]  # for reports only


def split_puzzles(
    num_train: int = 5000,
    num_held_out: int = 400,
    num_people: Sequence[int] = (3,),
    held_out_people: Sequence[int] | None = None,  # None: as `num_people`
    depth: int = 1,
    seed: int = 0,
) -> Splits:
    """The held-out puzzles do not depend on how many are for training, nor of which sizes these are."""
    held_out = generate_puzzles(num_held_out, held_out_people or num_people, depth, f"{seed}, held out")
    return Splits(generate_puzzles(num_train, num_people, depth, f"{seed}, train", held_out), held_out)


def as_prompt(puzzle: Puzzle, conversational: bool) -> Any:
    """The instruction and the puzzle, as messages or as plain text."""
    if conversational:
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": puzzle.text}]
    return f"{INSTRUCTION}\n\nPuzzle: {puzzle.text}\n\nSolution:\n"


def as_dataset(puzzles: Sequence[Puzzle], tokenizer: Any = None, compact: bool = False) -> Dataset:
    """
    The columns `prompt`, `solution` and `num_people`.

    Prompts are messages where the `tokenizer` has a chat template, else plain text. With `compact`, prompts and
    solutions are those of the compact form, the solution being the answer alone.
    """
    conversational = bool(getattr(tokenizer, "chat_template", None))
    return Dataset.from_list(
        [
            {
                "prompt": puzzle.compact_prompt if compact else as_prompt(puzzle, conversational),
                "solution": puzzle.compact_answer if compact else puzzle.solution,
                "num_people": len(puzzle.roles),
            }
            for puzzle in puzzles
        ]
    )


def correct_roles(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """
    Verifiable reward: 1.0 where the answer names every inhabitant exactly once, with the correct role, else 0.0.

    The answer is what follows the last `<answer>` after the thinking, up to `</answer>` or the end (a stop string may
    have been cut off). Without that tag there is no reward; `<think>` is not required. Case, numbering, order,
    markdown and other text do not matter, and `Zoey: knave` is read like `Zoey is a knave`. But a second mention of
    anybody or of a role, and words that make the answer a hedge (`not`, `or`, `if` and the like), lose the reward.
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"] or "" for completion in completions
    ]
    return [float(_is_right(text, gold)) for text, gold in zip(texts, solution, strict=True)]


_HEDGES = r"\b(?:not|or|nor|either|neither|if|unless|maybe|perhaps)\b|n\Wt\b"
_BETWEEN = r"(?:[^\w\n.,;]|\b(?:is|an?)\b)+"  # name and role


def _is_right(text: str, solution: str) -> bool:
    gold = dict(re.findall(r"\(\d+\)\s*(.+?) is a (knight|knave)", solution.lower()))
    if not gold:
        raise ValueError(f"A solution must have lines such as '(1) Zoey is a knave', unlike {solution!r}.")
    *before, answer = text.lower().rsplit("</think>", 1)[-1].split("<answer>")
    answer = answer.split("</answer>", 1)[0].replace("_", " ")
    name = rf"\b({'|'.join(map(re.escape, gold))})\b"
    role = r"\b(knight|knave)s?\b"
    return (
        bool(before)
        and dict(re.findall(name + _BETWEEN + role, answer)) == gold
        and len(re.findall(name, answer)) == len(re.findall(role, answer)) == len(gold)
        and not re.search(_HEDGES, answer)
    )


def correct_compact_roles(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    """Verifiable reward of the compact form: 1.0 where what follows the last comma is the solution, else 0.0."""
    return [float(text.rsplit(",", 1)[-1] == gold) for text, gold in zip(completions, solution, strict=True)]
