"""Runs of DRPOTrainer on a tiny model: what it logs, and what moves."""

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_drpo import MASK_METRICS, REGULARIZER_METRICS, make_trainer, region_metrics


# ---- metrics


@pytest.mark.parametrize(
    ("trust_region", "names"),
    [
        ("drpo", REGULARIZER_METRICS),
        ("spo", REGULARIZER_METRICS),
        ("dppo_tv", MASK_METRICS),
        ("dppo_kl", MASK_METRICS),
    ],
)
def test_metrics_of_each_trust_region(path, tmp_path, trust_region, names):
    radius = {"spo": 0.1, "dppo_kl": 1e-3}.get(trust_region, 0.01)
    trainer = make_trainer(
        path, tmp_path, trust_region=trust_region, trust_region_radius=radius, rollout_func=tiny.rollout, max_steps=6
    )
    trainer.train()
    logs = trainer.state.log_history[:-1]
    for log in logs:
        assert region_metrics(log) == names
        assert not any(name.startswith("clip_ratio") for name in log)
        assert log["ratio/min"] <= log["ratio/mean"] <= log["ratio/max"]
        assert 0 <= log["probability_shift/mean"] <= log["probability_shift/max"] <= 1
    for name in names:
        assert any(log[name] != 0 for log in logs), f"{name} is always 0"


def test_metrics_are_means_over_all_tokens_of_the_step(path, tmp_path):
    """Of unequal micro-batches, every token weighs the same; padding and masked tokens do not count."""
    trainer = make_trainer(
        path,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=2,
        logging_steps=1,
    )
    seen = []
    compute = trainer.policy_loss

    def record(logps, behaviour_logps, advantages, mask, inputs):
        seen.append(((logps.detach() - behaviour_logps).exp(), mask.bool(), advantages))
        return compute(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = record
    trainer.train()
    ratios = torch.cat([ratio[mask] for ratio, mask, _ in seen[2:4]])
    log = trainer.state.log_history[1]
    assert log["ratio/mean"] == pytest.approx(ratios.mean().item(), rel=1e-5)
    assert log["ratio/min"] == pytest.approx(ratios.min().item(), rel=1e-5)
    assert log["ratio/max"] == pytest.approx(ratios.max().item(), rel=1e-5)
    assert log["ratio/max"] > 1 > log["ratio/min"]


def test_on_policy_updates_log_no_constants(path, tmp_path, caplog):
    trainer = make_trainer(path, tmp_path, num_iterations=1)
    assert "raise num_iterations or steps_per_generation" in caplog.text
    trainer.train()
    assert region_metrics(trainer.state.log_history[0]) == set()
    assert "reward" in trainer.state.log_history[0]


def test_evaluation_and_logged_completions(path, tmp_path):
    trainer = make_trainer(
        path,
        tmp_path,
        eval_dataset=tiny.prompts(8),
        rollout_func=tiny.rollout,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        log_completions=True,
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 2
    assert evaluations[0]["eval_ratio/max"] > 1  # against the sampler
    assert (tmp_path / "completions" / "completions_00001.parquet").exists()


def test_evaluation_of_its_own_samples_logs_no_constants(path, tmp_path):
    trainer = make_trainer(path, tmp_path, eval_dataset=tiny.prompts(8), per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert "eval_reward" in metrics
    assert not any(("ratio/" in name and "clipped" not in name) or "shift" in name for name in metrics)


# ---- what moves


def parameters_that_moved(trainer):
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("trust_region", ["drpo", "spo", "dppo_tv", "dppo_kl"])
def test_every_parameter_moves(path, tmp_path, trust_region):
    trainer = make_trainer(path, tmp_path, trust_region=trust_region)
    assert parameters_that_moved(trainer) == {name for name, _ in trainer.model.named_parameters()}


def test_lora_moves_only_the_adapter(path, tmp_path):
    trainer = make_trainer(path, tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    moved = parameters_that_moved(trainer)
    assert moved == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    assert len(moved) == 8
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_reward_rises(path, tmp_path):
    trainer = make_trainer(path, tmp_path, max_steps=40, per_device_train_batch_size=32, num_iterations=4)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2
