"""A run of ERPD that is interrupted while it samples keeps its rollouts, and continues with them exactly."""

import inspect
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from huggingface_hub.utils import filter_repo_objects
from tiny_erpd import assert_equal, parameters, right_or_wrong, settings
from transformers import Trainer

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.growing_set import GrowingSet, rollouts_folder, set_aside


pytestmark = pytest.mark.slow  # trains for long


class RewardThatFails:
    """`right_or_wrong`, which counts the generations that it judges and fails in one of them."""

    __name__ = "reward"

    def __init__(self, fails_in=None, failure=None):
        self.judged, self.fails_in, self.failure = 0, fails_in, failure

    def __call__(self, completions, **kwargs):
        if self.judged == self.fails_in:
            if self.failure is not None:
                self.failure()
            raise RuntimeError("the judge is not there")
        self.judged += 1
        return right_or_wrong(completions)


def train(path, output_dir, reward, resume=None, **overrides):
    """4 generations of 2 prompts in a round, 4 updates a pass."""
    defaults = {"extraction_passes": 1, "distillation_passes": 1}
    args = ERPDConfig(**settings(output_dir, **defaults | overrides))
    trainer = ERPDTrainer(path, reward, args, tiny.prompts())
    torch.manual_seed(1234 if resume else 0)  # what the new process drew before must not matter
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def what_was_logged(trainer):
    """Without what measures time."""
    times = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    return [{name: value for name, value in log.items() if name not in times} for log in trainer.state.log_history]


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """An undisturbed run."""
    return train(path, tmp_path_factory.mktemp("whole"), RewardThatFails())


def test_a_reward_function_that_fails_loses_nothing(path, tmp_path, whole):
    with pytest.raises(RuntimeError, match="the judge is not there"):
        train(path, tmp_path, RewardThatFails(fails_in=3))
    reward = RewardThatFails()
    resumed = train(path, tmp_path, reward, resume=True)
    assert reward.judged == 1  # of 4 generations
    assert_equal(parameters(resumed), parameters(whole))
    assert what_was_logged(resumed) == what_was_logged(whole)
    assert not (tmp_path / "_rollouts").exists()  # the round is over


def test_a_killed_process_loses_nothing(path, tmp_path, whole):
    """Killed in the middle of its third generation."""
    support = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, __file__, path, tmp_path],
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": support},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    reward = RewardThatFails()
    resumed = train(path, tmp_path, reward, resume=True)
    assert reward.judged == 2
    assert_equal(parameters(resumed), parameters(whole))


def test_an_interruption_in_a_later_round(path, tmp_path):
    """The run continues from the checkpoint before it, in another folder, with what was sampled after it."""
    saving = {"rounds": 2, "save_strategy": "steps", "save_steps": 6}
    two_rounds = train(path, tmp_path / "whole", RewardThatFails(), **saving)
    with pytest.raises(RuntimeError):
        train(path, tmp_path / "first", RewardThatFails(fails_in=4 + 2), **saving)
    reward = RewardThatFails(fails_in=1)
    checkpoint = str(tmp_path / "first" / "checkpoint-6")
    with pytest.raises(RuntimeError):  # and again
        train(path, tmp_path / "second", reward, resume=checkpoint, **saving)
    (tmp_path / "first" / "checkpoint-6").rename(tmp_path / "second" / "checkpoint-6")
    reward = RewardThatFails()
    resumed = train(path, tmp_path / "second", reward, resume=True, **saving)
    assert reward.judged == 1
    assert_equal(parameters(resumed), parameters(two_rounds))


def test_rollouts_of_a_later_round_are_not_used_for_another_policy(path, tmp_path, caplog):
    """Round 1 ends differently with another `beta`, so that its policy has not sampled what there is of round 2."""
    saving = {"rounds": 2, "save_strategy": "steps", "save_steps": 6}
    with pytest.raises(RuntimeError):
        train(path, tmp_path, RewardThatFails(fails_in=4 + 2), **saving)
    reward = RewardThatFails()
    train(path, tmp_path, reward, resume=str(tmp_path / "checkpoint-6"), beta=0.1, **saving)
    assert "do not fit this run (beta 0.0 -> 0.1)" in caplog.text
    assert reward.judged == 4


def test_a_run_from_the_start_leaves_no_later_round_to_be_taken_for_its_own(path, tmp_path, caplog):
    with pytest.raises(RuntimeError):
        train(path, tmp_path, RewardThatFails(fails_in=4 + 2), rounds=2)
    assert (tmp_path / "_rollouts" / "round-2" / "generation-00001").exists()
    train(path, tmp_path, RewardThatFails(), rounds=1)
    assert "of a later round of an earlier run" in caplog.text
    assert not (tmp_path / "_rollouts" / "round-2").exists()
    assert (tmp_path / "_rollouts" / "round-2.old" / "generation-00001").exists()


def test_the_trainer_that_was_interrupted_can_resume_from_an_earlier_pass(path, tmp_path):
    saving = {"rounds": 2, "save_strategy": "steps", "save_steps": 2}
    whole = train(path, tmp_path / "whole", RewardThatFails(), **saving)
    reward = RewardThatFails(fails_in=4 + 2)
    args = ERPDConfig(**settings(tmp_path / "run", extraction_passes=1, distillation_passes=1, **saving))
    trainer = ERPDTrainer(path, reward, args, tiny.prompts())
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        trainer.train()
    reward.fails_in = None
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(parameters(trainer), parameters(whole))


def test_a_set_that_is_complete_is_not_sampled_again(path, tmp_path, whole):
    class Fails(ERPDTrainer):
        def training_step(self, *args):
            if self.state.global_step == 2:
                raise RuntimeError("out of memory")
            return super().training_step(*args)

    args = ERPDConfig(**settings(tmp_path, extraction_passes=1, distillation_passes=1))
    trainer = Fails(path, RewardThatFails(), args, tiny.prompts())
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    resumed = train(path, tmp_path, RewardThatFails(fails_in=0), resume=True)
    assert_equal(parameters(resumed), parameters(whole))


def test_two_machines_that_set_the_same_rollouts_aside_keep_them(tmp_path, caplog):
    """At the same time, in a folder that they share."""
    for trial in range(50):
        folder = rollouts_folder(str(tmp_path / str(trial)), 1)
        (folder / "generation-00000").mkdir(parents=True)
        with ThreadPoolExecutor(2) as machines:
            list(machines.map(lambda _, folder=folder: set_aside(folder, "of an earlier run "), range(2)))
        assert [path.name for path in folder.parent.iterdir()] == ["round-1.old"]
        assert (folder.parent / "round-1.old" / "generation-00000").exists()
    assert caplog.text.count("of an earlier run") == 50


def test_rollouts_in_the_making_are_not_pushed_to_the_hub(tmp_path):
    """Of a folder in which a run is being made, transformers leaves out what begins with `_` and its checkpoints."""
    patterns = inspect.getsource(Trainer._push_from_checkpoint)
    assert 'ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]' in patterns
    folder = rollouts_folder(str(tmp_path), 1).relative_to(tmp_path)
    files = [str(folder / "generation-00000" / "rollouts_0.safetensors"), "model.safetensors"]
    assert list(filter_repo_objects(files, ignore_patterns=["_*"])) == ["model.safetensors"]


def test_a_run_from_the_start_sets_old_rollouts_aside(path, tmp_path, whole, caplog):
    with pytest.raises(RuntimeError):
        train(path, tmp_path, RewardThatFails(fails_in=3))
    reward = RewardThatFails(fails_in=2)
    with pytest.raises(RuntimeError):
        train(path, tmp_path, reward)
    assert reward.judged == 2  # from the start
    assert "of an earlier run, which resume_from_checkpoint=True would continue with, are kept in" in caplog.text
    assert len(list((tmp_path / "_rollouts" / "round-1.old").glob("*/rollouts_0.safetensors"))) == 3
    reward = RewardThatFails()
    train(path, tmp_path, reward, resume=True, temperature=0.5)
    assert reward.judged == 4
    assert "that do not fit this run (temperature 1.0 -> 0.5) are kept in" in caplog.text


def test_what_was_being_written_does_not_count(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    rollouts = GrowingSet(str(tmp_path), 1, {"seed": 1}, accelerator)
    for number in range(2):
        rollouts.write(number, [{"completion_ids": torch.tensor([number])}], torch.tensor([0.5]), {"tokens": 7})

    def power_cut(*args):
        raise OSError("power cut")

    monkeypatch.setattr("trl_ext.erpd.growing_set.os.replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        rollouts.write(2, [], torch.tensor([0.5]), {})
    assert GrowingSet(str(tmp_path), 1, {"seed": 1}, accelerator).begin(str(tmp_path)) == 2
    rows, rewards, progress = rollouts.read(1)
    assert (rows[0]["completion_ids"].tolist(), rewards.tolist(), progress) == ([1], [0.5], {"tokens": 7})


def test_nothing_to_resume(path, tmp_path):
    with pytest.raises(ValueError, match=r"There is no whole checkpoint in .* train from the start"):
        train(path, tmp_path, RewardThatFails(), resume=True)


def main():
    torch.set_num_threads(1)
    path, output_dir = sys.argv[1:]
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    train(path, output_dir, RewardThatFails(fails_in=2, failure=kill))


if __name__ == "__main__":
    main()
