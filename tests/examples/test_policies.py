"""The lessons of the embedded policies, and their cache."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedded import puzzle_policy
from embedded.arithmetic_policy import Recipe, prepare_policy
from embedded.knights_and_knaves import correct_compact_roles
from embedded.puzzle_policy import MAX_TOKENS, STUDENT, PuzzleRecipe, embedded_puzzles
from embedded.statements import COMPACT_CHARACTERS, Iff, IfThen, Is


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_a_policy_is_taught_once_and_taught_further(tmp_path):
    first = Recipe(num_steps=2, batch_size=4, hidden_size=16, num_layers=1)
    path = prepare_policy(first, tmp_path)
    made = Path(path, "model.safetensors").stat().st_mtime_ns
    idle = prepare_policy(replace(first, learning_rate=0.0, start=first), tmp_path)
    further = prepare_policy(replace(first, start=first), tmp_path)
    assert len({path, idle, further}) == 3
    assert Path(path, "model.safetensors").stat().st_mtime_ns == made
    before, after = weights(path), weights(further)
    assert all(torch.equal(before[name], values) for name, values in weights(idle).items())
    assert any(not torch.equal(before[name], values) for name, values in after.items())


def test_policies_of_other_tasks_have_their_own_vocabulary(tmp_path):
    small = {"num_steps": 1, "batch_size": 2, "hidden_size": 16, "num_layers": 1}
    paths = [prepare_policy(recipe, tmp_path) for recipe in (Recipe(**small), PuzzleRecipe(**small))]
    puzzles = embedded_puzzles()
    text = puzzles.train[0].compact_prompt + puzzles.train[0].compact_solution()
    sums, tokenizer = (AutoTokenizer.from_pretrained(path) for path in paths)
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert sums.unk_token_id in sums(text)["input_ids"]
    assert len(tokenizer) == len(COMPACT_CHARACTERS) + 3


def lessons(recipe, number=10):
    return [lesson for batch in islice(recipe.batches(), number) for lesson in zip(*batch, strict=True)]


def test_lessons_are_right_without_mistakes_and_the_same_each_time():
    answers = {p.compact_prompt: p.compact_answer for p in embedded_puzzles().train}
    taught = lessons(PuzzleRecipe())
    assert taught == lessons(PuzzleRecipe())
    assert set(correct_compact_roles([text for _, text in taught], [answers[prompt] for prompt, _ in taught])) == {1.0}


def test_lessons_of_a_careless_pupil():
    puzzles = {p.compact_prompt: p for p in embedded_puzzles().train}
    taught = lessons(STUDENT)
    wrong = sum(puzzles[prompt].compact_solution() != text for prompt, text in taught) / len(taught)
    assert 0.3 < wrong < 0.9
    assert max(len(text) for _, text in taught) + 1 <= MAX_TOKENS


def test_a_pupil_who_reads_if_as_if_and_only_if(monkeypatch):
    both = Is(0, True), Is(1, False)
    puzzles = [replace(p, statements=(IfThen(*both), Is(0, True))) for p in embedded_puzzles().train[:1]]
    monkeypatch.setattr(puzzle_policy, "embedded_puzzles", lambda: puzzle_policy.Splits(puzzles, []))
    misread = replace(puzzles[0], statements=(Iff(*both), Is(0, True)))
    [(prompt, solution), *_] = lessons(PuzzleRecipe(misread_rate=1.0), 1)
    assert (prompt, solution) == (puzzles[0].compact_prompt, misread.compact_solution())
    assert solution != puzzles[0].compact_solution()
