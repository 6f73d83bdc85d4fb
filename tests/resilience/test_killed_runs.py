"""Runs that are killed end where undisturbed runs end: a short version, and one until nothing is left to chance."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("killed_runs.py")


def kill(trainer, tmp_path, kills, seed):
    command = [sys.executable, SCRIPT, "--trainer", trainer, "--kills", kills, "--seed", seed, "--folder", tmp_path]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-60:])
    return map(int, re.search(r"killed (\d+) times, (\d+) of them with a half-written", result.stdout).groups())


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer",
    [pytest.param(t, marks=pytest.mark.supports(t, "killed with SIGKILL")) for t in ("drpo", "rlad", "tropd", "erpd")],
)
def test_a_run_that_is_killed_ends_where_the_undisturbed_run_ends(trainer, tmp_path):
    kills, _ = kill(trainer, tmp_path, kills=2, seed=0)
    assert kills >= 1


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("trainer", ["drpo", "rlad", "tropd", "erpd"])
def test_a_run_that_is_killed_twenty_times(trainer, tmp_path):
    kills, halves = kill(trainer, tmp_path, kills=20, seed=1)
    assert kills >= 5
    assert halves >= 1
