"""Adapters that cannot be trained or scored are refused, and which are active and trained survives what others do."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import tropd_runs
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_erpd import right_or_wrong
from tiny_erpd import settings as erpd_settings
from transformers import AutoModelForCausalLM, GenerationConfig
from wrong import CONFIGS, config, construct

from trl_ext.adapters import check_vllm_adapters, load_active_adapters


LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TRAINED = LoraConfig(**LORA, init_lora_weights=False)


SETTINGS = {"tropd": tropd_runs.settings, "erpd": erpd_settings}


def make(name: str, model: Any, out: Path, teacher: Any = None, **settings: Any) -> Any:
    arguments = {key: settings.pop(key) for key in ("peft_config", "eval_dataset") if key in settings}
    if name in ("rlad", "tropd"):
        arguments["teacher_model"] = teacher
    if name == "erpd":
        arguments["reward_funcs"] = right_or_wrong
    data = tropd_runs.sums(32) if name == "tropd" else tiny.prompts(32)
    args = CONFIGS[name](**SETTINGS.get(name, tiny.grpo_settings)(out, **settings))
    return construct(name, model=model, args=args, train_dataset=data, processing_class=tiny.tokenizer(), **arguments)


def with_adapters(path: str, *names: str, active: tuple[str, ...] = (), config: Any = TRAINED) -> PeftModel:
    """A model with these adapters; those that are active come first to last, and only the last one is trained."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    if active:
        model.set_adapter(active[-1])
        model.base_model.set_adapter(list(active))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{active[-1]}." in name)
    return model


def trained(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("name", "teacher"), [("drpo", None), ("rlad", "base"), ("tropd", "base"), ("erpd", None)])
def test_an_adapter_that_is_frozen_is_refused(name, teacher, path, tmp_path):
    with_adapters(path, "default").save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    trainer = make(name, model, tmp_path, teacher)
    with pytest.raises(ValueError, match=r"nothing to train.*is_trainable=True"):
        trainer.train()


def test_a_model_without_an_adapter_that_is_frozen_is_refused(path, tmp_path):
    trainer = make("drpo", AutoModelForCausalLM.from_pretrained(path).requires_grad_(False), tmp_path)
    with pytest.raises(ValueError, match=r"nothing to train.*requires_grad_"):
        trainer.train()


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
@pytest.mark.parametrize("name", ["rlad", "tropd"])
def test_a_base_that_the_adapter_changes_cannot_be_the_teacher(name, change, path, tmp_path):
    with pytest.raises(ValueError, match=f"teacher_model='base'.*{next(iter(change))}"):
        make(name, path, tmp_path, "base", peft_config=LoraConfig(**LORA, **change))


def test_a_reference_that_is_not_the_start_brings_a_warning(path, tmp_path, caplog):
    make("drpo", path, tmp_path, beta=0.1, peft_config=LoraConfig(**LORA, init_lora_weights="olora"))
    assert "init_lora_weights='olora' is not the policy at the start" in caplog.text
    caplog.clear()
    make("drpo", path, tmp_path, beta=0.1, peft_config=LoraConfig(**LORA))
    assert "at the start" not in caplog.text


@pytest.mark.parametrize("names", [("mine",), ("default", "ref"), ("default", "student")])
def test_a_reference_that_trl_would_take_from_another_adapter_is_refused(names, path, tmp_path):
    active = ("default",) if "ref" in names else names[-1:]
    model = with_adapters(path, *names, active=active)
    with pytest.raises(ValueError, match="copies the adapter 'default' to 'ref'"):
        make("drpo", model, tmp_path, beta=0.1)
    make("drpo", model, tmp_path, beta=0.0)
    make("erpd", model, tmp_path, beta=0.1)  # its reference is the scores of the set


@pytest.mark.parametrize("teacher", ["expert", "base"])
@pytest.mark.parametrize("name", ["rlad", "tropd"])
def test_scoring_leaves_the_active_adapters_and_what_is_trained(name, teacher, path, tmp_path):
    model = with_adapters(path, "sft", "default", "expert", active=("sft", "default"))
    for parameter_name, parameter in model.named_parameters():  # LoRA-FA
        if "lora_A" in parameter_name:
            parameter.requires_grad_(False)
    before = trained(model)
    trainer = make(name, model, tmp_path, teacher, max_steps=2)
    trainer.train()
    assert trainer.model.active_adapters == ["sft", "default"]
    assert trained(trainer.model) == before
    assert before


@pytest.mark.parametrize("name", ["drpo", "tropd", "erpd"])
def test_a_run_with_two_active_adapters_resumes(name, path, teacher_path, tmp_path):
    length = {} if name == "erpd" else {"max_steps": 4}
    settings = {"teacher": teacher_path, "save_strategy": "steps", "save_steps": 2, **length}

    def run(folder: str, checkpoint: str | None = None) -> Any:
        model = with_adapters(path, "sft", "default", active=("sft", "default"))
        trainer = make(name, model, tmp_path / folder, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.active_adapters == ["sft", "default"]
    assert trained(resumed) == trained(whole)
    others = dict(resumed.named_parameters())
    assert all(torch.equal(parameter, others[key]) for key, parameter in whole.named_parameters())


def test_the_best_adapter_is_loaded_whatever_its_name(path, tmp_path):
    model = with_adapters(path, "default", "student", active=("student",))
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.05}
    trainer = make("rlad", model, tmp_path, "default", eval_dataset=tiny.prompts(4), **steps, **best)
    trainer.train()
    weights = load_file(Path(trainer.state.best_model_checkpoint, "student", "adapter_model.safetensors"))
    own = {key.replace(".student", ""): value for key, value in trainer.model.state_dict().items() if "student" in key}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in weights)
    assert all(".student." in key for key in trained(trainer.model))


def test_an_adapter_called_default_is_left_to_transformers(path, tmp_path):
    model = with_adapters(path, "default")
    model.save_pretrained(tmp_path)
    assert not load_active_adapters(model, str(tmp_path))
    assert not load_active_adapters(AutoModelForCausalLM.from_pretrained(path), str(tmp_path))


def test_adapters_that_need_the_forward_of_peft_are_refused_by_tropd(path, teacher_path, tmp_path):
    activated = LoraConfig(**LORA, alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match=r"The model of TrOPDTrainer .*alora_invocation_tokens"):
        make("tropd", path, tmp_path, teacher_path, peft_config=activated)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts its prompt"):
        make("tropd", path, tmp_path, teacher_path, peft_config=PromptTuningConfig(num_virtual_tokens=2))
    teacher = get_peft_model(AutoModelForCausalLM.from_pretrained(teacher_path), activated)
    with pytest.raises(ValueError, match=r"The teacher .*alora_invocation_tokens"):
        make("tropd", path, tmp_path, teacher)


def test_single_tokens_of_a_head_are_refused(path, tmp_path):
    config = LoraConfig(**LORA, trainable_token_indices={"lm_head": [3]})
    with pytest.raises(ValueError, match="The policy trains single tokens"):
        make("drpo", path, tmp_path, peft_config=config)
    teacher = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    with pytest.raises(ValueError, match=r"The teacher .*trains single tokens"):
        make("rlad", path, tmp_path, teacher)


def test_modules_to_save_that_vllm_would_not_get_are_refused(path, tmp_path):
    args = config("drpo", use_vllm=True)
    adapter = LoraConfig(**LORA, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save of the adapter 'expert'"):
        check_vllm_adapters(with_adapters(path, "default", "expert", config=adapter), args)
    check_vllm_adapters(with_adapters(path, "default", config=adapter), args)


def test_a_generation_config_of_the_adapter_has_no_effect_on_samples(path, teacher_path, tmp_path):
    def samples(model: Any) -> torch.Tensor:
        trainer = make("tropd", model, tmp_path, teacher_path)
        return tropd_runs.micro_batches(trainer)[0]["completion_ids"]

    plain, repeating = with_adapters(path, "default"), with_adapters(path, "default")
    repeating.generation_config = GenerationConfig(repetition_penalty=100.0)
    assert torch.equal(samples(plain), samples(repeating))
    assert repeating.generation_config.repetition_penalty == 100.0


def test_the_folder_of_an_adapter_is_no_policy(path, tmp_path):
    with_adapters(path, "default").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter without its model.*AutoPeftModelForCausalLM"):
        make("drpo", str(tmp_path / "adapter"), tmp_path)
