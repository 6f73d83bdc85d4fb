"""The prompts of the puzzles, and which answers are rewarded."""

import itertools
from types import SimpleNamespace

import pytest
from zoey import SOLUTION, ZOEY

from embedded.knights_and_knaves import (
    INSTRUCTION,
    Puzzle,
    as_dataset,
    correct_compact_roles,
    correct_roles,
    generate_puzzles,
)


def test_dataset():
    puzzles = [ZOEY, *generate_puzzles(1, num_people=(4,))]
    plain = as_dataset(puzzles)
    assert plain.column_names == ["prompt", "solution", "num_people"]
    assert plain["num_people"][:] == [2, 4]
    assert plain[0]["solution"] == SOLUTION
    assert plain[0]["prompt"] == f"{INSTRUCTION}\n\nPuzzle: {ZOEY.text}\n\nSolution:\n"
    assert as_dataset(puzzles, SimpleNamespace(chat_template=None))[0] == plain[0]
    conversational = as_dataset(puzzles, SimpleNamespace(chat_template="{{ messages }}"))
    assert conversational[0]["prompt"] == [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": ZOEY.text},
    ]
    assert conversational["solution"][:] == plain["solution"][:]
    compact = as_dataset(puzzles, compact=True)
    assert compact[0] == {"prompt": "A:-B;B:B=a?", "solution": "aB", "num_people": 2}


RIGHT = {
    "as asked": f"<think> If Zoey is a knight, ... </think>\n<answer>\n{SOLUTION}\n</answer>",
    "the thinking was opened by the prompt": f"Oliver is a knave? No. </think> <answer>{SOLUTION}</answer>",
    "no thinking": f"<answer>{SOLUTION}</answer>",
    "stop string cut off": f"<answer>{SOLUTION}",
    "case": "<ANSWER>ZOEY IS A KNAVE, oliver is a Knight</ANSWER>",
    "order": "<answer>(1) Oliver is a knight (2) Zoey is a knave</answer>",
    "markdown": "<answer>\n1. **Zoey** is a **knave**.\n2. _Oliver_: `knight`\n</answer>",
    "colon": "<answer>Zoey: knave; Oliver = a knight</answer>",
    "brackets": "<answer>Zoey (knave), Oliver (knight)</answer>",
    "other text": "<answer>So: Zoey is a knave, and Oliver is a knight. Done!</answer> Zoey is a knight.",
    "only the last answer counts": f"<answer>Zoey is a knight</answer> Wait. <answer>{SOLUTION}</answer>",
    "tags in the thinking": f"<think><answer>?</answer></think><answer>{SOLUTION}</answer>",
}
WRONG = {
    "wrong": "<answer>(1) Zoey is a knight\n(2) Oliver is a knight</answer>",
    "swapped": "<answer>(1) Zoey is a knight\n(2) Oliver is a knave</answer>",
    "partial": "<answer>(1) Zoey is a knave</answer>",
    "both roles": "<answer>Zoey is a knave, Oliver is a knight, Oliver is a knave</answer>",
    "both roles, the right one last": "<answer>Zoey is a knight, Zoey is a knave, Oliver is a knight</answer>",
    "both roles of one name": "<answer>Zoey is a knave and a knight, Oliver is a knight</answer>",
    "slash": "<answer>Zoey is a knave/knight, Oliver is a knight/knave</answer>",
    "alternative": "<answer>Zoey is a knave or Oliver is a knight</answer>",
    "condition": "<answer>Zoey is a knave if Oliver is a knight</answer>",
    "negation": "<answer>Zoey is not a knave, Oliver is not a knight</answer>",
    "negation after": "<answer>Zoey is a knave, Oliver is a knight; that isn't so</answer>",
    "somebody else": "<answer>Zoey is a knave, Oliver is a knight, Mia is a knight</answer>",
    "twice": f"<answer>{SOLUTION}\n{SOLUTION}</answer>",
    "roles without names": "<answer>(1) knave (2) knight</answer>",
    "names after roles": "<answer>knave: Zoey, knight: Oliver</answer>",
    "similar names": "<answer>Zoeyy is a knave, Oliver is a knight</answer>",
    "no tags": SOLUTION,
    "only in the thinking": f"<think><answer>{SOLUTION}</answer></think> I am done.",
    "the last answer is wrong": f"<answer>{SOLUTION}</answer><answer>Zoey is a knight, Oliver is a knave</answer>",
    "cut off": "<answer>(1) Zoey is a knave\n(2) Oliver is a kni",
    "garbled": "<answer>Zoey Oliver knave knight is a is a</answer>",
    "lines": "<answer>Zoey\nknave\nOliver\nknight</answer>",
    "nothing": "",
    "empty answer": "<answer></answer>",
}


@pytest.mark.parametrize(
    ("completion", "reward"),
    [*((text, 1.0) for text in RIGHT.values()), *((text, 0.0) for text in WRONG.values())],
    ids=[*RIGHT, *WRONG],
)
def test_reward(completion, reward):
    messages = [{"role": "assistant", "content": completion}]
    assert correct_roles(completions=[completion, messages], solution=[SOLUTION] * 2, prompts=[""] * 2) == [reward] * 2


def test_reward_of_every_possible_answer():
    for puzzle in generate_puzzles(6, num_people=(2, 3, 4)):
        rewarded = []
        for roles in itertools.product((True, False), repeat=len(puzzle.roles)):
            answer = Puzzle(puzzle.statements, roles, puzzle.names, puzzle.phrasings).solution
            rewarded += [roles] * int(correct_roles([f"<answer>{answer}</answer>"], [puzzle.solution])[0])
        assert rewarded == [puzzle.roles]


def test_reward_of_names_within_names():
    solution = "(1) Jack is a knave\n(2) Jackson is a knight"
    assert correct_roles([f"<answer>{solution}</answer>", "<answer>Jackson is a knight</answer>"], [solution] * 2) == [
        1,
        0,
    ]


def test_reward_without_content_and_without_a_solution():
    assert correct_roles([[{"role": "assistant", "content": None}]], [SOLUTION]) == [0.0]
    with pytest.raises(ValueError, match="must have lines such as"):
        correct_roles(["<answer></answer>"], ["42"])


def test_compact_reward():
    completions = ["AB>ab,Ab>AB,aB>aB,aB", "aB", "aB>aB,AB", "aB,", "AB>ab,aB ", "", "aBaB"]
    assert correct_compact_roles(completions, solution=["aB"] * 7, prompts=[""] * 7) == [1, 1, 0, 0, 0, 0, 0]
