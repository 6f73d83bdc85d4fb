"""Runs that are killed end where undisturbed runs end: a short version, and one until nothing is left to chance."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("killed_runs.py")
TRAINERS = ("drpo", "rlad", "tropd", "erpd")


@pytest.fixture(scope="module")
def killed(request, tmp_path_factory):
    """Kills the selected tests' trainers in one launch for each number of kills; returns the kills and the halves."""
    items = [item for item in request.session.items if item.path == request.path]
    launches = {}

    def counts(trainer, kills, seed):
        if kills not in launches:
            folder = tmp_path_factory.mktemp("killed")
            marked = [item for item in items if bool(item.get_closest_marker("release")) == (kills > 2)]
            trainers = dict.fromkeys(item.callspec.params["trainer"] for item in marked)
            flags = ["--trainers", *trainers, "--kills", kills, "--seed", seed, "--folder", folder]
            command = [sys.executable, SCRIPT, *flags]
            launches[kills] = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=3600)
        result = launches[kills]
        found = re.search(rf"{trainer}: killed (\d+) times, (\d+) of them with a half-written", result.stdout)
        assert found, "\n".join(result.stderr.splitlines()[-60:])
        return map(int, found.groups())

    return counts


@pytest.mark.parametrize(
    "trainer", [pytest.param(t, marks=pytest.mark.supports(t, "killed with SIGKILL")) for t in TRAINERS]
)
def test_a_run_that_is_killed_ends_where_the_undisturbed_run_ends(trainer, killed):
    kills, _ = killed(trainer, kills=2, seed=0)
    assert kills >= 1


@pytest.mark.release
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_is_killed_twenty_times(trainer, killed):
    kills, halves = killed(trainer, kills=20, seed=1)
    assert kills >= 5
    assert halves >= 1
