"""ERPD on two processes (DDP, ZeRO-1, 2 and 3) trains what it trains on one, and restores the base on each."""

from pathlib import Path

import pytest
import tiny
import torch
from launch import needs_deepspeed, run_script


SCRIPT = Path(__file__).with_name("train_erpd.py")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def one_process(path, tmp_path_factory):
    """Runs of one process, each made once."""
    runs = {}

    def of(*flags):
        if flags not in runs:
            runs[flags] = run_script(SCRIPT, path, tmp_path_factory.mktemp("one") / "run", 1, "--batch", 8, *flags)
        return runs[flags]

    return of


def assert_same_training(ours, theirs):
    assert set(ours[0]) == set(theirs[0])
    for name, expected in theirs[0].items():
        torch.testing.assert_close(
            ours[0][name], expected, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    updates = [log for log in theirs[1] if "grad_norm" in log]
    assert len(updates) == 2 * (1 + 1 + 2) * 4
    assert all(log["grad_norm"] > 0.01 for log in updates)  # else there would be nothing to compare
    for ours_log, theirs_log in zip(ours[1], theirs[1], strict=True):
        # None: no rollout of the update was right, or wrong
        known = {name: value for name, value in theirs_log.items() if value is not None}
        assert {name for name, value in ours_log.items() if value is not None} == set(known)
        assert {name: ours_log[name] for name in known} == pytest.approx(known, rel=5e-3, abs=5e-5)


@pytest.mark.parametrize("extraction_loss", ["sapo", "ce", "mse"])
def test_two_processes_train_as_one(path, tmp_path, one_process, extraction_loss):
    flags = ["--extraction_loss", extraction_loss]
    two = run_script(SCRIPT, path, tmp_path / "two", 2, "--batch", 4, *flags)
    assert_same_training(two, one_process(*flags))


@needs_deepspeed
@pytest.mark.parametrize(
    ("zero_stage", "lora"), [(1, False), (2, False), (3, False), (2, True), (3, True)], ids=lambda v: str(v)
)
def test_zero_trains_as_one(path, tmp_path, one_process, zero_stage, lora):
    flags = ["--lora"] if lora else []
    sharded = run_script(SCRIPT, path, tmp_path / "two", 2, "--batch", 4, *flags, zero_stage=zero_stage)
    assert_same_training(sharded, one_process(*flags))


def assert_resumes(path, tmp_path, step, zero_stage=None):
    whole = run_script(SCRIPT, path, tmp_path / "whole", 2, "--batch", 4, "--save", zero_stage=zero_stage)
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert len(list(checkpoint.glob("fixed_set_*.safetensors"))) == 2
    assert len(list(checkpoint.glob("base_policy*.safetensors"))) == (1 if zero_stage is None else 2)
    flags = ["--batch", 4, "--resume_from", checkpoint]
    resumed = run_script(SCRIPT, path, tmp_path / "resumed", 2, *flags, zero_stage=zero_stage)
    for name, expected in whole[0].items():
        assert torch.equal(resumed[0][name], expected), name


def test_resume_on_two_processes_is_exact(path, tmp_path):
    assert_resumes(path, tmp_path, step=8)  # after extraction and unlearning, before their boundary


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_resume_under_zero_is_exact(path, tmp_path, zero_stage):
    assert_resumes(path, tmp_path, step=10, zero_stage=zero_stage)  # in stage 2
