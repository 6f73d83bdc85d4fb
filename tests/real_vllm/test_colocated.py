"""The colocated engine against the model that is trained."""

import engine
import pytest
import torch
from engine_runs import COLOCATED, compare_with_model, make_trainer
from peft import LoraConfig
from transformers import GenerationConfig


def lora():
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def record_ratios(trainer):
    """The ratios of the model's to the engine's probabilities, for each update."""
    ratios, policy_loss = [], trainer.policy_loss

    def recorded(logps, behaviour_logps, advantages, mask, inputs):
        ratios.append((logps - behaviour_logps)[mask.bool()].exp().detach())
        return policy_loss(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = recorded
    return ratios


def greedy(trainer, prompts):
    """What `generate` and the engine write from the same prompts."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    length = trainer.max_completion_length
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=1, pad_token_id=0)
    written = []
    for prompt in prompts:
        sequence = model.generate(torch.tensor([prompt]), generation_config=settings)[0].tolist()
        written.append(sequence[len(prompt) :])
    generation = trainer.vllm_generation
    generation.sync_weights()
    generation.temperature = 0.0
    return written, [list(ids) for ids in generation.generate(prompts=prompts, images=None, num_generations=1)[1]]


def assert_no_mismatch_is_logged(trainer):
    name = "sampling/fresh_log_ratio_abs"
    logged = [log[name] for log in trainer.state.log_history if name in log]
    assert logged
    assert max(logged) < 1e-4


@pytest.mark.parametrize(
    "peft_config",
    [
        pytest.param(None, id="full", marks=pytest.mark.supports("drpo", "vLLM colocated, float32")),
        pytest.param(lora(), id="lora", marks=pytest.mark.supports("drpo", "vLLM colocated, LoRA")),
    ],
)
def test_the_engine_samples_from_the_model_that_is_trained(path, tmp_path, peft_config):
    trainer = make_trainer("drpo", path, tmp_path, peft_config=peft_config, max_steps=6, **COLOCATED)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    ratios = record_ratios(trainer)
    trainer.train()
    assert len(ratios) == 6
    for first, second in zip(ratios[::2], ratios[1::2], strict=True):  # two updates for each generation
        torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=1e-4)
        assert (second - 1).abs().max() > 1e-3
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
    assert trainer.state.log_history[0]["sampling/missing_logps"] == 0
    assert_no_mismatch_is_logged(trainer)
    prompts = [trainer.processing_class(f"{i}+{i * 3}=")["input_ids"] for i in range(16)]
    ours, engines = greedy(trainer, prompts)
    assert ours == engines


@pytest.mark.supports("drpo", "vLLM colocated, bfloat16")
def test_bfloat16_moves_the_ratio_by_its_rounding(path, tmp_path, monkeypatch):
    engine.adapt(monkeypatch, dtype="bfloat16")
    trainer = make_trainer("drpo", path, tmp_path, bf16=True, **COLOCATED)
    ratios = record_ratios(trainer)
    trainer.train()
    first = torch.cat(ratios[::2])
    assert 0.8 < first.min() < first.max() < 1.25
    assert (first - 1).abs().max() > 1e-4  # else it has not run in bfloat16
    assert trainer.state.log_history[0]["ratio/mean"] == pytest.approx(1.0, abs=0.05)


def test_around_the_old_policy_the_rounding_is_corrected_and_not_in_the_ratio(path, tmp_path, monkeypatch):
    engine.adapt(monkeypatch, dtype="bfloat16")
    settings = {"trust_region_anchor": "old_policy", "vllm_importance_sampling_mode": "token_truncate", **COLOCATED}
    trainer = make_trainer("drpo", path, tmp_path, **settings)
    ratios = record_ratios(trainer)
    trainer.train()
    first = torch.cat(ratios[::2])
    torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=1e-5)
    name = "sampling/importance_sampling_ratio"
    for log in trainer.state.log_history[:-1:2]:
        assert 0.8 < log[f"{name}/min"] < 1 < log[f"{name}/max"] < 1.25


OTHERS = ("rlad", "tropd", "erpd")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(n, "vLLM colocated, bfloat16")) for n in OTHERS]
)
def test_bfloat16_samples_from_the_rounded_model(path, tmp_path, monkeypatch, name):
    engine.adapt(monkeypatch, dtype="bfloat16")
    trainer = make_trainer(name, path, tmp_path, bf16=True, **COLOCATED)
    differences = compare_with_model(trainer)
    trainer.train()
    assert len(differences) >= 2
    assert 1e-4 < max(differences) < 0.25


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(n, "vLLM colocated, float32")) for n in OTHERS]
)
def test_every_rollout_is_the_models(path, tmp_path, name):
    trainer = make_trainer(name, path, tmp_path, **COLOCATED)
    differences = compare_with_model(trainer)
    trainer.train()
    assert len(differences) >= 2
    assert max(differences) < 1e-4
    assert_no_mismatch_is_logged(trainer)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(n, "vLLM colocated, LoRA")) for n in OTHERS]
)
def test_every_rollout_is_the_adapted_models(path, tmp_path, name):
    trainer = make_trainer(name, path, tmp_path, peft_config=lora(), **COLOCATED)
    differences = compare_with_model(trainer)
    trainer.train()
    assert len(differences) >= 2
    assert max(differences) < 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(n, "vLLM colocated: resuming")) for n in ("drpo", *OTHERS)]
)
def test_resuming_is_exact(path, tmp_path, name):
    settings = {"save_strategy": "steps", "save_steps": 1, **COLOCATED, **({} if name == "erpd" else {"max_steps": 5})}
    whole, resumed = (make_trainer(name, path, tmp_path, **settings) for _ in range(2))
    of_whole, of_resumed = compare_with_model(whole), compare_with_model(resumed)
    whole.train()
    # DRPO and RLAD are within their second generation, ERPD in stage 2
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert 0 < len(of_resumed) < len(of_whole)
    assert resumed.state.global_step == whole.state.global_step > 3
    for (parameter, expected), (_, value) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), parameter
