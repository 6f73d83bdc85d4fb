"""A run of ERPD that is killed at any step and resumed ends with the parameters of the undisturbed run."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_erpd import assert_equal, parameters, right_or_wrong, settings

from trl_ext import ERPDConfig, ERPDTrainer


def run(path, output_dir, resume=None, eval_dataset=None, **overrides):
    """Two updates per pass; a checkpoint at every step."""
    names = ("peft_config", "rollout_func", "reward")
    arguments = {name: overrides.pop(name) for name in names if name in overrides}
    reward = arguments.pop("reward", right_or_wrong)
    defaults = {"prompts_per_round": 4, "save_strategy": "steps", "save_steps": 1}
    args = ERPDConfig(**settings(output_dir, **defaults | overrides))
    trainer = ERPDTrainer(path, reward, args, tiny.prompts(12), eval_dataset, **arguments)
    torch.manual_seed(1234 if resume else 0)  # what the resumed process drew before must not matter
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def saved(path, tmp_path_factory):
    """An undisturbed run, with a checkpoint at every step, and its trainer. Tests that change files take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run(path, folder)


def logs_after(trainer, step):
    """What the run logged after `step`, without what measures time."""
    times = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    logs = [log for log in trainer.state.log_history if log["step"] > step]
    return [{name: value for name, value in log.items() if name not in times} for log in logs]


def assert_resumes_everywhere(path, tmp_path, steps, **overrides):
    whole = run(path, tmp_path, **overrides)
    assert whole.state.global_step == steps
    for step in range(1, steps + 1):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed = run(path, tmp_path / "resumed", resume=checkpoint, save_strategy="no", **overrides)
        assert resumed.state.global_step == steps
        assert_equal(parameters(resumed), parameters(whole))
        assert logs_after(resumed, step) == logs_after(whole, step), f"logs after resuming at step {step}"
    return whole


@pytest.mark.slow
@pytest.mark.supports("erpd", "one process: resuming")
def test_resume_in_each_stage_and_round(path, tmp_path):
    """2 rounds of extraction, unlearning and distillation, with measures: each step, boundaries among them."""
    whole = assert_resumes_everywhere(
        path, tmp_path, 2 * (1 + 1 + 2) * 2, rounds=2, extraction_passes=1, signal="unlearned_reference",
        distillation_anchor="pass",
        eval_dataset=tiny.prompts(4), per_device_eval_batch_size=8,
    )  # fmt: skip
    assert sum("distilled/kl_per_sequence" in log for log in whole.state.log_history) == 2


@pytest.mark.slow
def test_resume_of_an_adapter_with_two_teachers_accumulation_and_a_sampler(path, tmp_path):
    assert_resumes_everywhere(
        path, tmp_path, (1 + 1 + 1) * 2, extraction_passes=1, distillation_passes=1,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1), rollout_func=tiny.rollout,
        extraction_loss=["sapo", "mse"], per_device_train_batch_size=4, gradient_accumulation_steps=2, beta=0.1,
        lr_scheduler_type="cosine", trust_region="drpo",
    )  # fmt: skip


def test_a_resumed_run_still_knows_how_good_the_base_was(path, tmp_path):
    measured = {"eval_dataset": tiny.prompts(4), "per_device_eval_batch_size": 8}
    whole = run(path, tmp_path, **measured)
    resumed = run(path, tmp_path / "resumed", resume=str(tmp_path / "checkpoint-3"), **measured)
    assert resumed._stages.base_measures == whole._stages.base_measures != {}


def test_a_run_can_be_given_more_rounds(path, tmp_path):
    short = run(path, tmp_path, extraction_passes=1, distillation_passes=1)
    longer = run(path, tmp_path / "longer", resume=str(tmp_path / "checkpoint-4"), extraction_passes=1,
                 distillation_passes=1, rounds=2)  # fmt: skip
    whole = run(path, tmp_path / "whole", extraction_passes=1, distillation_passes=1, rounds=2)
    assert longer.state.global_step == 8
    assert_equal(parameters(longer), parameters(whole))
    assert any(not torch.equal(p, parameters(short)[name]) for name, p in parameters(longer).items())


def test_everything_is_kept_in_a_safe_format(saved):
    names = {p.name for p in (saved[0] / "checkpoint-3").iterdir()}
    assert {"fixed_set_0.safetensors", "base_policy.safetensors"} <= names
    assert not {name for name in names if name.startswith("rollouts")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_per_round": 6}, "prompts_per_round 4 -> 6"),
        ({"extraction_passes": 3}, "extraction_passes 2 -> 3"),
        ({"signal": "unlearned_teacher"}, "teachers"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 8 -> 4"),
        ({"seed": 1}, "seed 42 -> 1"),
        ({"temperature": 0.5}, "temperature 1.0 -> 0.5"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(path, tmp_path, saved, changes, message):
    with pytest.raises(ValueError, match=rf"cannot continue from the checkpoint .*{message}.*: resume with"):
        run(path, tmp_path / "resumed", resume=str(saved[0] / "checkpoint-3"), **changes)


def test_a_longer_run_is_not_cut_short(path, tmp_path):
    """Its checkpoint may hold a teacher, which must not be taken for the distilled policy."""
    settings = {"extraction_passes": 1, "distillation_passes": 1}
    run(path, tmp_path, rounds=2, **settings)
    with pytest.raises(ValueError, match="set rounds to what it was, or more"):
        run(path, tmp_path / "resumed", resume=str(tmp_path / "checkpoint-5"), **settings)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def test_a_checkpoint_that_is_not_whole_is_passed_over(path, tmp_path, saved, caplog):
    """Whether a file is missing or was cut short."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-7" / "fixed_set_0.safetensors").unlink()
    cut_short(tmp_path / "checkpoint-6" / "fixed_set_0.safetensors")
    cut_short(tmp_path / "checkpoint-5" / "base_policy.safetensors")
    for name in ("fixed_set_0", "base_policy"):
        checkpoint = str(tmp_path / f"checkpoint-{6 if name == 'fixed_set_0' else 5}")
        with pytest.raises(ValueError, match=rf"because {name}.safetensors is cut short or damaged: name another"):
            run(path, tmp_path / "resumed", resume=checkpoint)
    resumed = run(path, tmp_path, resume=True)
    assert_equal(parameters(resumed), parameters(saved[1]))
    passed_over = [record.message for record in caplog.records if "is passed over" in record.message]
    assert [f"checkpoint-{8 - i} is passed over" in message for i, message in enumerate(passed_over)] == [True] * 4
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="train from the start"):
        run(path, tmp_path, resume=True)


def test_held_out_prompts_may_come_with_the_resumption(path, tmp_path, saved):
    held_out = {"eval_dataset": tiny.prompts(4), "per_device_eval_batch_size": 8}
    resumed = run(path, tmp_path, resume=str(saved[0] / "checkpoint-2"), **held_out)
    assert any("distilled/reward" in log for log in resumed.state.log_history)


def test_a_lost_set_is_refused(path, tmp_path, saved):
    shutil.copytree(saved[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "fixed_set_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"because fixed_set_0.safetensors is missing .*: name another checkpoint"):
        run(path, tmp_path / "resumed", resume=str(tmp_path / "checkpoint-3"))


def test_rewards_are_not_asked_for_again(path, tmp_path, saved):
    def fail(**kwargs):
        raise AssertionError("the set is sampled already")

    resumed = run(path, tmp_path, resume=str(saved[0] / "checkpoint-2"), reward=fail)
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    assert resumed.state.global_step == 8
