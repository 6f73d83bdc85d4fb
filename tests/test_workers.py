"""The whole suite starts one worker per core, and a worker starts none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
TESTS = """
import os
import pytest


@pytest.mark.parametrize("i", range(3))
def test_number(i, pytestconfig):
    with open(pytestconfig.rootpath / "processes", "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\\n")
"""


def test_workers_start_no_workers(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "support").mkdir(parents=True)
    for file in ("conftest.py", "support/many_runs.py"):
        shutil.copy(ROOT / "tests" / file, tmp_path / "tests" / file)
    for name in ("test_one.py", "test_two.py", "test_three.py"):
        (tmp_path / "tests" / name).write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert "9 passed" in result.stdout, result.stdout + result.stderr
    workers, parents = zip(*map(str.split, (tmp_path / "processes").read_text().splitlines()), strict=True)
    assert len(set(parents)) == 1
    assert len(set(workers)) <= 8
