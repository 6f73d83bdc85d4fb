"""How the tests here start a script: as a user does, or in this process, which has imported torch and TRL already."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from embedded import tasks
from embedded.arithmetic_policy import PUPIL, Recipe, cache_name, prepare_policy


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """
    Where the embedded policies are kept. The pupil is taught once for all tests, whichever worker runs them, in a few
    seconds: it solves some sums and not others, and no test asks how many.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "policies"
    with FileLock(f"{folder}.lock"):
        if not (pupil := folder / cache_name(PUPIL)).exists():
            os.rename(prepare_policy(Recipe(num_steps=120, batch_size=32, learning_rate=4e-3), folder), pupil)
    return folder


@pytest.fixture
def launch(cache, tmp_path):
    """Starts a script in a process of its own, or in those of `launcher`; returns what it printed."""

    def start(script, *flags, launcher=()):
        result = subprocess.run(
            [sys.executable, *launcher, str(ROOT / script), *map(str, flags)],
            cwd=tmp_path,
            env={**os.environ, "TRL_EXT_CACHE": str(cache)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-40:])
        assert_quiet(result.stdout + result.stderr)
        return result.stdout

    return start


@pytest.fixture
def run(cache, run_script, monkeypatch):
    """Runs a script as `__main__` of this process; returns what it printed."""
    monkeypatch.setenv("TRL_EXT_CACHE", str(cache))

    def start(script, *flags):
        printed, warned = run_script(script, *flags)
        assert_quiet(printed + warned)
        return printed

    return start


@pytest.fixture
def brief_lessons(monkeypatch):
    """A script that runs in this process teaches its policies for 4 steps."""

    def teach(recipe):
        start = recipe.start and replace(recipe.start, num_steps=4)
        return prepare_policy(replace(recipe, num_steps=4, start=start))

    monkeypatch.setattr(tasks, "prepare_policy", teach)


@pytest.fixture
def own_problems(tmp_path):
    """A file in GSM8K's format: a question, and a worked answer that ends with `#### number`."""
    generator = random.Random(0)
    rows = []
    for _ in range(24):
        a, b = generator.randrange(2, 50), generator.randrange(1000, 2000)
        question = f"Ann has {a} boxes of {b} pens each. How many pens are there?"
        rows.append({"question": question, "answer": f"{a} * {b} = <<{a}*{b}={a * b}>>{a * b}\n#### {a * b:,}"})
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def assert_quiet(text):
    for noise in ("is deprecated", "pin_memory", "Experimental", "{'loss'"):
        assert noise not in text
