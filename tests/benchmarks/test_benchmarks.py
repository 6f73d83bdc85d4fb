"""The benchmarks run small and print their tables."""

import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow  # trains for long


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("trainer", ["drpo", "rlad"])
def test_benchmark_step(run_script, trainer):
    flags = ["--turns", 1, "--rollout_batches", 1, "--layers", 1, "--hidden_size", 128, "--vocabulary", 256]
    out, _ = run_script("benchmarks/step.py", "--trainer", trainer, *flags, "--length", 16)
    assert f"{trainer}, s" in out
    assert "| old |" in out
    assert "| sampler |" in out


def test_benchmark_distillation():
    """In a process of its own, because the peak memory of this one may be that of an earlier test."""
    flags = ["--turns", 1, "--steps", 1, "--loss_tokens", 64, "--loss_vocabulary", 500, "--loss_width", 16]
    flags += ["--hidden_size", 128, "--layers", 1, "--vocabulary", 500, "--batch_size", 2, "--length", 8]
    command = [sys.executable, ROOT / "benchmarks" / "distillation.py", *flags]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("| loss |") == result.stdout.count("| step |") == 1
