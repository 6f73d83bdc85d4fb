"""A run that stops at any step and resumes ends with the parameters of the undisturbed run."""

import math
import shutil

import pytest
import tiny
import torch
import tropd_runs
from peft import LoraConfig

from trl_ext import DRPOConfig, DRPOTrainer
from trl_ext.rollout_checkpoint import load_rollouts, save_rollouts


pytestmark = pytest.mark.slow  # trains for long


SCHEDULES = {
    "two passes a rollout batch": {"num_iterations": 2},
    "four mini-batches and two passes": {
        "num_iterations": 2,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    },
    "on policy, with a reference": {"num_iterations": 1, "beta": 0.05},
    "adaptive entropy": {"num_iterations": 3, "use_adaptive_entropy": True, "entropy_target": 10.0},
}


def run(path, output_dir, resume=None, peft_config=None, rollout_func=None, dataset=None, **overrides):
    saving = {} if resume else {"save_strategy": "steps", "save_steps": 1}
    settings = {"max_steps": 6, **saving, **overrides}
    args = DRPOConfig(**tiny.grpo_settings(output_dir, **settings))
    trainer = DRPOTrainer(
        path, tiny.digits_reward, args, dataset or tiny.prompts(), peft_config=peft_config, rollout_func=rollout_func
    )
    torch.manual_seed(1234 if resume else 0)  # what the resumed process drew before must not matter
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.supports("drpo", "one process: resuming")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_resume_is_exact_at_every_step(path, tmp_path, schedule):
    whole = run(path, tmp_path, **schedule)
    start = tiny.policy().state_dict()
    assert any(not torch.equal(p, start[n]) for n, p in whole.model.named_parameters())
    for step in range(1, 6):
        resumed = run(path, tmp_path / "resumed", resume=str(tmp_path / f"checkpoint-{step}"), **schedule)
        assert resumed.state.global_step == 6
        for (name, ours), (_, theirs) in zip(
            resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), f"{name} after resuming at step {step}"
        assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]


@pytest.mark.parametrize("method", ["drpo", "tropd"])
def test_resume_of_a_mixture_of_experts(tmp_path, method):
    """Whose experts transformers saves one by one, under names that its trainer does not find in the model."""

    def make(output_dir, **settings):
        model = tiny.policy(moe=True)
        if method == "tropd":
            return tropd_runs.make_trainer(output_dir, model, tiny.policy(moe=True, seed=1), **settings)
        args = DRPOConfig(**tiny.grpo_settings(output_dir, num_iterations=4, **settings))
        return DRPOTrainer(model, tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer())

    whole = make(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_best_checkpoint_of_a_mixture_of_experts_is_loaded_whole(tmp_path):
    trainer = tropd_runs.make_trainer(tmp_path, tiny.policy(moe=True), save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    loaded = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    for (name, ours), (_, theirs) in zip(trainer.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_resume_of_an_adapter_and_sampler_logps(path, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {"peft_config": lora, "rollout_func": tiny.rollout, "num_iterations": 3}
    whole = run(path, tmp_path, **settings)
    resumed = run(path, tmp_path / "resumed", resume=str(tmp_path / "checkpoint-4"), **settings)
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_what_a_callback_wrote_and_a_tuple_of_weights_do_not_matter(path, tmp_path, caplog):
    """JSON lines beside the checkpoint's own files, and settings that JSON has in another form."""
    whole = run(path, tmp_path, num_iterations=3, reward_weights=(1.0,))
    for step in (4, 5, 6):
        (tmp_path / f"checkpoint-{step}" / "samples.json").write_text('{"a": 1}\n{"a": 2}\n')
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = run(path, tmp_path, resume=True, num_iterations=3, reward_weights=(1.0,))
    assert "passed over" not in caplog.text
    assert "do not fit" not in caplog.text
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_rollouts_are_kept_only_while_they_are_needed(path, tmp_path):
    run(path, tmp_path, num_iterations=2)
    kept = [(tmp_path / f"checkpoint-{step}" / "rollouts_0.safetensors").exists() for step in range(1, 7)]
    assert kept == [True, False] * 3


def test_rollouts_are_restored_as_they_were(tmp_path):
    """Every dtype and shape, values that are not tensors, and slices that share memory."""
    shared = torch.arange(12).view(4, 3)
    batches = [
        {"ids": shared[:2], "logps": torch.tensor([[math.nan, -math.inf]]), "num_images": [1, 0], "num_tiles": None},
        {"ids": shared[2:], "flag": torch.tensor([True]), "count": torch.tensor(7), "half": torch.ones(2).bfloat16()},
    ]
    run_identity = {"num_processes": 2, "beta": True}
    save_rollouts(str(tmp_path / "new folder"), batches, 5, run_identity, process_index=1)
    assert load_rollouts(str(tmp_path / "new folder"), run_identity, 0, torch.device("cpu")) is None
    restored, step = load_rollouts(str(tmp_path / "new folder"), run_identity, 1, torch.device("cpu"))
    assert step == 5
    for ours, theirs in zip(restored, batches, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert ours[name].dtype == value.dtype
                torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
            else:
                assert ours[name] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size 8 -> 4, gradient_accumulation_steps 1 -> 2, steps_per_generation 1 -> 2",
        ),
        ({"beta": 0.1}, "reference False -> True"),
        ({"num_iterations": 3}, "num_iterations 4 -> 3"),
        ({"temperature": 0.5}, "temperature 1.0 -> 0.5"),
        ({"scale_rewards": "none"}, "scale_rewards group -> none"),
    ],
)
def test_rollouts_that_do_not_fit_the_run_are_not_used(path, tmp_path, caplog, changes, message):
    run(path, tmp_path, num_iterations=4)
    settings = {"num_iterations": 4, **changes}
    resumed = run(path, tmp_path / "resumed", resume=str(tmp_path / "checkpoint-2"), **settings)
    assert message in caplog.text
    assert resumed.state.global_step == 6


def test_rollouts_without_what_another_anchor_needs_are_not_used(path, tmp_path, caplog):
    """They have no old log-probabilities, because the ratio was against the sampler's."""
    settings = {"num_iterations": 4, "rollout_func": tiny.rollout}
    run(path, tmp_path, **settings)
    resume = str(tmp_path / "checkpoint-2")
    run(path, tmp_path / "resumed", resume=resume, trust_region_anchor="old_policy", **settings)
    assert "sampler_logps True -> False" in caplog.text
    assert "restore these settings" in caplog.text


def test_rollouts_of_another_number_of_processes_are_not_used(path, tmp_path, caplog):
    trainer = run(path, tmp_path, num_iterations=2)
    folder, identity = str(tmp_path / "checkpoint-3"), {**trainer._run_identity(), "global_step": 3}
    batches, step = load_rollouts(folder, identity, 0, torch.device("cpu"))
    save_rollouts(folder, batches, step, {**identity, "num_processes": 2}, process_index=0)
    resumed = run(path, tmp_path / "resumed", resume=folder, num_iterations=2)
    assert "num_processes 2 -> 1" in caplog.text
    assert resumed.state.global_step == 6


def test_rollouts_of_an_earlier_run_in_the_same_folder_are_not_used(path, tmp_path):
    run(path, tmp_path, num_iterations=3)
    assert (tmp_path / "checkpoint-2" / "rollouts_0.safetensors").exists()
    run(path, tmp_path, num_iterations=2)  # here step 2 is between two rollout batches
    assert not (tmp_path / "checkpoint-2" / "rollouts_0.safetensors").exists()


def test_a_batch_that_cannot_be_written_does_not_stop_the_run(path, tmp_path, caplog):
    class Scribbler(DRPOTrainer):
        def finish_rollouts(self, batch, rows):
            return {**batch, "notes": [torch.zeros(1)] * len(batch["prompt_ids"])}

    args = DRPOConfig(**tiny.grpo_settings(tmp_path, save_strategy="steps", save_steps=1))
    trainer = Scribbler(path, tiny.digits_reward, args, tiny.prompts())
    trainer.train()
    assert "make it a tensor" in caplog.text
    assert trainer.state.global_step == 4


def test_resume_is_exact_in_later_epochs(path, tmp_path):
    """4 prompts, 2 per rollout batch, 2 passes: an epoch has 4 steps, and the shuffling of each differs."""
    settings = {"max_steps": 10, "num_iterations": 2}
    whole = run(path, tmp_path, dataset=tiny.prompts(4), **settings)
    for step in (4, 5, 6, 8, 9):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed = run(path, tmp_path / "resumed", checkpoint, dataset=tiny.prompts(4), **settings)
        for (name, ours), (_, theirs) in zip(
            resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), f"{name} after resuming at step {step}"


def test_an_iterable_dataset_says_where_resuming_is_not_exact(path, tmp_path, caplog):
    """Two prompts per rollout batch of two passes: the second pass over four prompts begins at step 4."""

    def resume(step):
        caplog.clear()
        data = tiny.prompts(4).to_iterable_dataset()
        run(path, tmp_path / "resumed", str(tmp_path / f"checkpoint-{step}"), dataset=data, num_iterations=2)
        return "does not resume exactly, because transformers begins another pass" in caplog.text

    run(path, tmp_path, dataset=tiny.prompts(4).to_iterable_dataset(), num_iterations=2)
    assert [resume(step) for step in (3, 5)] == [False, True]
