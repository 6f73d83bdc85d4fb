"""The puzzle that the Logic-RL paper shows, and statements of two or three people."""

from embedded.knights_and_knaves import Puzzle
from embedded.statements import Iff, Is, Not


A, B, C = (Is(person, True) for person in range(3))
a, b, c = (Is(person, False) for person in range(3))

# The example of the Logic-RL paper
ZOEY = Puzzle(
    statements=(Not(B), Iff(B, a)),
    roles=(False, True),
    names=("Zoey", "Oliver"),
    phrasings=('{name} remarked, "{Claim}."', "{name} told you that {claim}."),
)
SOLUTION = "(1) Zoey is a knave\n(2) Oliver is a knight"
