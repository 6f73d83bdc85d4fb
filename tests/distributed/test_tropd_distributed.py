"""TrOPD on two processes (DDP, ZeRO-2, ZeRO-3) trains what it trains on one."""

from pathlib import Path

import pytest
import tiny
from launch import assert_same_training, needs_deepspeed, run_script


SCRIPT = Path(__file__).with_name("train_tropd_once.py")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    student = tiny.save_policy(tmp_path_factory.mktemp("student"))
    return student, tiny.save_policy(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=48, vocab_size=64)


def run(paths, out, processes, *flags, zero_stage=None):
    student, teacher = paths
    return run_script(SCRIPT, student, out, processes, "--teacher", teacher, *flags, zero_stage=zero_stage)


@pytest.fixture(scope="module")
def one_process(paths, tmp_path_factory):
    """Runs of one process, each made once."""
    runs = {}

    def of(*flags):
        if flags not in runs:
            runs[flags] = run(paths, tmp_path_factory.mktemp("one") / "run", 1, "--batch", 8, *flags)
        return runs[flags]

    return of


@pytest.mark.parametrize("layout", [("--batch", 4), ("--batch", 1, "--accumulation", 4)], ids=str)
def test_two_processes_give_the_gradients_of_one(paths, tmp_path, one_process, layout):
    two = run(paths, tmp_path / "two", 2, *layout)
    assert all(log["guidance/share"] > 0 for log in two[1][:2])
    assert_same_training(two, one_process())


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_zero_sharding_gives_the_gradients_of_one(paths, tmp_path, one_process, zero_stage, lora):
    flags = ["--lora"] if lora else []
    sharded = run(paths, tmp_path / "two", 2, "--batch", 4, *flags, zero_stage=zero_stage)
    assert_same_training(sharded, one_process(*flags))


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", [None, 3])
def test_both_models_sample_while_they_are_sharded(paths, tmp_path, zero_stage):
    _, logs = run(paths, tmp_path / "two", 2, "--batch", 2, "--samples", zero_stage=zero_stage)
    training = [log for log in logs if "loss" in log]
    assert len(training) == 4
    assert training[0]["guidance/share"] > 0
    assert [log for log in logs if "eval_teacher/kl" in log]


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", [None, 2, 3])
def test_an_adapter_on_the_student_teaches_on_two_processes_too(paths, tmp_path, one_process, zero_stage):
    two = run(paths, tmp_path / "two", 2, "--batch", 4, "--adapter_teacher", zero_stage=zero_stage)
    assert_same_training(two, one_process("--adapter_teacher"))
