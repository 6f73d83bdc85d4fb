"""What DRPOTrainer takes from a sampler, and the forward passes that it makes or leaves out."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_drpo import make_trainer
from trl import GRPOConfig, GRPOTrainer

from trl_ext import DRPOTrainer


# ---- rollout functions that do not return one score per token


def test_scores_of_another_length_are_refused(path, tmp_path):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        return {**output, "logprobs": [scores[:-1] for scores in output["logprobs"]]}

    with pytest.raises(ValueError, match="one log-probability per token"):
        make_trainer(path, tmp_path, rollout_func=rollout).train()


def test_scores_that_are_placeholders_bring_a_warning(path, tmp_path, caplog):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        return {**output, "logprobs": [[0.0] * len(scores) for scores in output["logprobs"]]}

    make_trainer(path, tmp_path, rollout_func=rollout).train()
    assert "or logprobs=None for the trainer to compute them" in caplog.text


def test_placeholders_that_nothing_is_computed_from_may_have_any_length(path, tmp_path):
    """As in GRPO: around the old policy, without vLLM, a rollout function's log-probabilities have no use."""

    def rollout(prompts, trainer):
        return {**tiny.rollout(prompts, trainer), "logprobs": [[0.0] for _ in prompts]}

    trainer = make_trainer(path, tmp_path, rollout_func=rollout, trust_region_anchor="old_policy")
    trainer.train()
    assert not any("sampling/fresh_log_ratio_abs" in log for log in trainer.state.log_history)


# ---- forward passes


def count_passes(trainer):
    """Scoring passes (not generation) of the policy, and of the reference where it is another model."""
    counts = {"policy": 0, "reference": 0}

    def hook(name):
        def count(module, args, kwargs):
            counts[name] += bool(kwargs.get("fused_lm_head"))

        return count

    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    model.register_forward_pre_hook(hook("policy"), with_kwargs=True)
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(hook("reference"), with_kwargs=True)
    return counts


def unscored_rollout(prompts, trainer):
    return {**tiny.rollout(prompts, trainer), "logprobs": None}


@pytest.mark.parametrize(
    ("trainer_class", "rollout_func", "lora", "beta", "expected"),
    [
        # 4 updates, 2 rollout batches
        (GRPOTrainer, tiny.rollout, False, 0.0, {"policy": 4 + 2, "reference": 0}),
        (DRPOTrainer, tiny.rollout, False, 0.0, {"policy": 4, "reference": 0}),
        (DRPOTrainer, unscored_rollout, False, 0.0, {"policy": 4 + 2, "reference": 0}),
        (DRPOTrainer, None, False, 0.0, {"policy": 4 + 2, "reference": 0}),
        (DRPOTrainer, tiny.rollout, False, 0.1, {"policy": 4, "reference": 2}),
        (DRPOTrainer, tiny.rollout, True, 0.0, {"policy": 4, "reference": 0}),
        # the reference is the same model without its adapter
        (GRPOTrainer, tiny.rollout, True, 0.1, {"policy": 4 + 2 + 2, "reference": 0}),
        (DRPOTrainer, tiny.rollout, True, 0.1, {"policy": 4 + 2, "reference": 0}),
    ],
)
def test_no_pass_for_old_logps_where_the_sampler_scored(
    path, tmp_path, trainer_class, rollout_func, lora, beta, expected
):
    peft_config = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = make_trainer(
        path, tmp_path, GRPOConfig, trainer_class, rollout_func=rollout_func, peft_config=peft_config, beta=beta
    )
    counts = count_passes(trainer)
    trainer.train()
    assert counts == expected


@pytest.mark.parametrize(
    ("lora", "expected"), [(True, {"policy": 4 + 4, "reference": 0}), (False, {"policy": 4, "reference": 4})]
)
def test_the_reference_is_scored_where_there_is_no_old_pass_to_skip(path, tmp_path, lora, expected):
    """Each update has its own rollouts, so that TRL makes no pass for old log-probabilities."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = make_trainer(
        path, tmp_path, rollout_func=tiny.rollout, peft_config=peft_config, beta=0.1, num_iterations=1
    )
    counts = count_passes(trainer)
    trainer.train()
    assert counts == expected


def test_the_reference_is_the_base_model_when_the_old_pass_is_skipped(path, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    trainer = make_trainer(path, tmp_path, rollout_func=tiny.rollout, peft_config=lora, beta=0.1)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with trainer.model.disable_adapter(), torch.no_grad():
        expected, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, inputs["completion_ids"].shape[1]
        )
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"][mask], expected[mask])
    assert "old_per_token_logps" not in inputs


# ---- vLLM, whose engine cannot run here: its place is taken by a stub with the same two methods


class StubEngine:
    def __init__(self, trainer):
        self.trainer = trainer

    def sync_weights(self):
        pass

    def generate(self, prompts, images=None, num_generations=1, **kwargs):
        texts = self.trainer.processing_class.batch_decode(prompts)
        output = tiny.rollout(texts, self.trainer)
        logprobs = [[[math.nan if x is None else x] for x in scores] for scores in output["logprobs"]]
        return output["prompt_ids"], output["completion_ids"], logprobs, None


def train_with_engine(path, tmp_path, monkeypatch, **settings):
    """The trainer, what its policy loss was called with in each of 4 updates, and its passes."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **kwargs: None)
    trainer = make_trainer(path, tmp_path, use_vllm=True, vllm_mode="colocate", **settings)
    trainer.vllm_generation = StubEngine(trainer)
    counts = count_passes(trainer)
    batches = []
    compute = trainer.policy_loss

    def record(logps, behaviour_logps, advantages, mask, inputs):
        batches.append((behaviour_logps, inputs))
        return compute(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = record
    trainer.train()
    assert len(batches) == 4
    return trainer, batches, counts


@pytest.mark.parametrize("correction", [True, False])
def test_vllm_is_corrected_once(path, tmp_path, monkeypatch, correction):
    """Its log-probabilities are the ratio's denominator, so that no importance sampling weight comes on top."""
    trainer, batches, counts = train_with_engine(
        path, tmp_path, monkeypatch, vllm_importance_sampling_correction=correction
    )
    for behaviour_logps, inputs in batches:
        assert "importance_sampling_ratio" not in inputs
        assert (behaviour_logps is inputs["sampling_per_token_logps"]) == correction
        assert torch.equal(behaviour_logps, inputs["old_per_token_logps"]) == (not correction)
    assert counts["policy"] == (4 if correction else 4 + 2)
    assert ("sampling/missing_logps" in trainer.state.log_history[0]) == correction
    if correction:
        assert trainer.state.log_history[0]["sampling/missing_logps"] == pytest.approx(0.2, abs=0.08)


def test_around_the_old_policy_trl_corrects_for_vllm(path, tmp_path, monkeypatch, caplog):
    settings = {"trust_region_anchor": "old_policy", "vllm_importance_sampling_mode": "token_truncate"}
    trainer, batches, counts = train_with_engine(path, tmp_path, monkeypatch, **settings)
    for behaviour_logps, inputs in batches:
        old_logps, mask = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
        assert torch.equal(behaviour_logps, old_logps)
        ratio = (old_logps - inputs["sampling_per_token_logps"]).nan_to_num(0).exp()
        torch.testing.assert_close(inputs["importance_sampling_ratio"][mask], ratio.clamp(max=3.0)[mask])
    assert counts["policy"] == 4 + 2
    assert "sampling/importance_sampling_ratio/mean" in trainer.state.log_history[0]
    assert not [record for record in caplog.records if record.name.startswith("trl_ext")]


def test_a_correction_without_the_samplers_log_probabilities_is_one_clear_sentence(path, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **kwargs: None)
    settings = {"use_vllm": True, "vllm_mode": "colocate", "trust_region_anchor": "old_policy"}
    trainer = make_trainer(path, tmp_path, rollout_func=unscored_rollout, **settings)
    trainer.vllm_generation = StubEngine(trainer)
    with pytest.raises(ValueError, match="or set vllm_importance_sampling_correction=False"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "whose ratio is against vLLM's own log-probabilities"),
        ({"vllm_importance_sampling_correction": False}, "with vllm_importance_sampling_correction=False"),
        ({"trust_region_anchor": "old_policy", "top_p": 0.9}, "sample with top_p=1.0"),
    ],
)
def test_settings_of_the_correction_that_have_no_effect(path, tmp_path, monkeypatch, caplog, settings, message):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **kwargs: None)
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_mask", **settings}
    make_trainer(path, tmp_path, **settings)
    warnings = [record.message for record in caplog.records if record.name.startswith("trl_ext")]
    assert len(warnings) == 1
    assert message in warnings[0]
