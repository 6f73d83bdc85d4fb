"""What the people of a Knights-and-Knaves puzzle say: statements, their compact form, and their solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar


LETTERS = "ABCDEFGH"  # the people in the compact form; lower case for a knave
COMPACT_CHARACTERS = LETTERS + LETTERS.lower() + "-&|>=():;?,"

Roles = tuple[bool, ...]  # of person 0, 1, ...; True is a knight


class Statement(ABC):
    """What somebody may say about the people 0, 1, ..."""

    @abstractmethod
    def holds(self, roles: Sequence[bool]) -> bool:
        """Whether it is true where `roles[i]` says whether person `i` is a knight."""

    @abstractmethod
    def sentence(self, names: Sequence[str]) -> str:
        """In English, without capital letter and full stop; no two statements have the same."""

    @abstractmethod
    def compact(self) -> str:
        """In the characters of the compact form; no two statements have the same."""


@dataclass(frozen=True)
class Is(Statement):
    """Somebody is a knight, `A`, or a knave, `a`."""

    person: int
    knight: bool

    def holds(self, roles: Sequence[bool]) -> bool:
        return roles[self.person] == self.knight

    def sentence(self, names: Sequence[str]) -> str:
        return f"{names[self.person]} is a {role_name(self.knight)}"

    def compact(self) -> str:
        return letter(self.person, self.knight)


@dataclass(frozen=True)
class Not(Statement):
    """The opposite of a statement: `-A`, `-(A&B)`."""

    part: Statement

    def holds(self, roles: Sequence[bool]) -> bool:
        return not self.part.holds(roles)

    def sentence(self, names: Sequence[str]) -> str:
        if isinstance(self.part, Is):
            return f"{names[self.part.person]} is not a {role_name(self.part.knight)}"
        return f"it is not true that ({self.part.sentence(names)})"

    def compact(self) -> str:
        return f"-{self.part.compact()}" if isinstance(self.part, Is) else f"-({self.part.compact()})"


@dataclass(frozen=True)
class Connective(Statement):
    """Two statements and the words between them; a part with a connective of its own stands in brackets."""

    first: Statement
    second: Statement
    words: ClassVar[str]
    symbol: ClassVar[str]

    def sentence(self, names: Sequence[str]) -> str:
        parts = (self.first, self.second)
        return self.words.format(*(self._bracketed(part, part.sentence(names)) for part in parts))

    def compact(self) -> str:
        return self.symbol.join(self._bracketed(part, part.compact()) for part in (self.first, self.second))

    @staticmethod
    def _bracketed(part: Statement, text: str) -> str:
        return f"({text})" if isinstance(part, Connective) else text


class And(Connective):
    words, symbol = "{} and {}", "&"

    def holds(self, roles: Sequence[bool]) -> bool:
        return self.first.holds(roles) and self.second.holds(roles)


class Or(Connective):
    words, symbol = "{} or {}", "|"

    def holds(self, roles: Sequence[bool]) -> bool:
        return self.first.holds(roles) or self.second.holds(roles)


class IfThen(Connective):
    words, symbol = "if {} then {}", ">"

    def holds(self, roles: Sequence[bool]) -> bool:
        return not self.first.holds(roles) or self.second.holds(roles)


class Iff(Connective):
    words, symbol = "{} if and only if {}", "="

    def holds(self, roles: Sequence[bool]) -> bool:
        return self.first.holds(roles) == self.second.holds(roles)


CONNECTIVES: tuple[type[Connective], ...] = (And, Or, IfThen, Iff)


def role_name(knight: bool) -> str:
    return "knight" if knight else "knave"


def letter(person: int, knight: bool) -> str:
    return LETTERS[person] if knight else LETTERS[person].lower()


def letters(roles: Roles) -> str:
    return "".join(letter(person, role) for person, role in enumerate(roles))


def guesses(num_people: int) -> Iterable[Roles]:
    """All 2^n assignments, from all knights to all knaves."""
    return product((True, False), repeat=num_people)


def spoken_roles(statements: Sequence[Statement], roles: Roles) -> Roles:
    """What the sentences would make of their speakers where `roles` were true. A solution is a fixed point of this."""
    return tuple(statement.holds(roles) for statement in statements)


def solutions(statements: Sequence[Statement]) -> list[Roles]:
    """All assignments in which exactly the knights' statements are true; `statements[i]` is said by person `i`."""
    return [
        roles
        for roles in guesses(len(statements))
        if all(statement.holds(roles) == role for statement, role in zip(statements, roles, strict=True))
    ]
