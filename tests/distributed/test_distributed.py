"""Two processes on CPU (DDP, ZeRO-2, ZeRO-3) train what one process trains."""

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from launch import assert_same_training, needs_deepspeed, run_script


SCRIPT = Path(__file__).with_name("train_once.py")
run = partial(run_script, SCRIPT)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def one_process(path, tmp_path_factory):
    """Runs of one process, each made once."""
    runs = {}

    def of(loss_type, *flags):
        key = (loss_type, flags)
        if key not in runs:
            out = tmp_path_factory.mktemp("one") / "run"
            runs[key] = run(path, out, 1, "--batch", 8, "--loss_type", loss_type, *flags)
        return runs[key]

    return of


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_processes_give_the_gradients_of_one(path, tmp_path, one_process, loss_type):
    two = run(path, tmp_path / "two", 2, "--batch", 4, "--loss_type", loss_type)
    assert_same_training(two, one_process(loss_type))


def test_accumulation_gives_the_gradients_of_one_batch(path, tmp_path, one_process):
    accumulated = run(path, tmp_path / "two", 1, "--batch", 4, "--accumulation", 2)
    assert_same_training(accumulated, one_process("dapo"))


def test_resume_on_two_processes_is_exact(path, tmp_path):
    whole = run(path, tmp_path / "whole", 2, "--batch", 4, "--save")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert len(list(checkpoint.glob("rollouts_*.safetensors"))) == 2
    resumed = run(path, tmp_path / "resumed", 2, "--batch", 4, "--resume_from", checkpoint)
    for name, expected in whole[0].items():
        assert torch.equal(resumed[0][name], expected), name


def test_scores_on_one_process_alone_are_an_error_and_no_deadlock(path, tmp_path):
    with pytest.raises(AssertionError, match="return them from rollout_func on all, or None on all"):
        run(path, tmp_path / "two", 2, "--batch", 4, "--unscored_rank", 1)


def test_a_lost_rollout_file_is_no_deadlock(path, tmp_path):
    run(path, tmp_path / "whole", 2, "--batch", 4, "--save")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "rollouts_1.safetensors").unlink()
    run(path, tmp_path / "resumed", 2, "--batch", 4, "--resume_from", checkpoint)


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_zero_sharding_gives_the_gradients_of_one(path, tmp_path, one_process, zero_stage, lora):
    flags = ["--lora"] if lora else []
    sharded = run(path, tmp_path / "two", 2, "--batch", 4, *flags, zero_stage=zero_stage)
    assert_same_training(sharded, one_process("dapo", *flags))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=48, vocab_size=64)


@pytest.fixture(scope="module")
def distilled_by_one(path, teacher, tmp_path_factory):
    return run(path, tmp_path_factory.mktemp("one") / "run", 1, "--batch", 8, "--teacher", teacher)


def test_two_processes_distil_as_one(path, teacher, tmp_path, distilled_by_one):
    two = run(path, tmp_path / "two", 2, "--batch", 4, "--teacher", teacher)
    assert all("teacher/log_ratio" in log for log in two[1])
    assert_same_training(two, distilled_by_one)


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_shards_the_teacher_too(path, teacher, tmp_path, distilled_by_one, zero_stage):
    sharded = run(path, tmp_path / "two", 2, "--batch", 4, "--teacher", teacher, zero_stage=zero_stage)
    assert_same_training(sharded, distilled_by_one)
