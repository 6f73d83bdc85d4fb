"""A resumed run of TrOPD equals the uninterrupted run to the bit."""

import shutil

import pytest
import torch
from tropd_runs import assert_same, make_trainer, sums


pytestmark = pytest.mark.slow  # trains for long

RUNS = {
    "tropd": {},
    "groups": {"num_generations": 2},
    "guided by the teacher": {"guidance": "teacher", "num_generations": 2},
    "partly off-policy": {"lmbda": 0.5, "trust_region": "expected"},
}


def run(folder, overrides, resume=None):
    """12 rows are 1.5 steps per epoch, 3 in groups of two: each stop is at a different place in an epoch."""
    trainer = make_trainer(
        folder,
        dataset=sums(12),
        save_strategy="no" if resume else "steps",
        save_steps=1,
        max_steps=5,
        lr_scheduler_type="linear",
        **overrides,
    )
    trainer.train(resume_from_checkpoint=resume)
    names = ("loss", "teacher/kl", "guidance/share", "entropy", "num_tokens")
    logs = [{name: log.get(name) for name in names} for log in trainer.state.log_history]
    return {name: value.clone() for name, value in trainer.model.named_parameters()}, logs[:-1]


@pytest.fixture(scope="module", params=RUNS)
def whole_run(request, tmp_path_factory):
    """Its folder, its settings, and its final weights and logs."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, RUNS[request.param], run(folder, RUNS[request.param])


@pytest.mark.supports("tropd", "one process: resuming")
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_exactly(tmp_path, whole_run, stop):
    folder, overrides, (weights, logs) = whole_run
    torch.manual_seed(99)
    resumed, resumed_logs = run(tmp_path, overrides, str(folder / f"checkpoint-{stop}"))
    assert_same(weights, resumed, rtol=0, atol=0)
    assert logs == resumed_logs


def test_tokens_that_were_not_logged_yet_are_counted(tmp_path):
    settings = {"logging_steps": 5}
    _, logs = run(tmp_path / "whole", settings)
    _, resumed = run(tmp_path / "resumed", settings, str(tmp_path / "whole" / "checkpoint-3"))
    assert logs[-1]["num_tokens"] == resumed[-1]["num_tokens"] > 0


@pytest.mark.parametrize("whole_run", ["tropd"], indirect=True)
def test_from_the_last_checkpoint_that_is_whole(tmp_path, whole_run, caplog):
    folder, overrides, (weights, logs) = whole_run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for step, name in ((5, "optimizer.pt"), (4, "model.safetensors")):
        file = tmp_path / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level("WARNING"):
        resumed, resumed_logs = run(tmp_path, overrides, True)
    assert "checkpoint-4 is passed over, because model.safetensors is cut short" in caplog.text
    assert_same(weights, resumed, rtol=0, atol=0)
    assert logs == resumed_logs
