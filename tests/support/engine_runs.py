"""Each trainer with a vLLM engine, and what the engine says beside what the model says."""

from pathlib import Path
from typing import Any

import tiny
import tiny_erpd
import torch
import tropd_runs

from trl_ext import (
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    RLADConfig,
    RLADTrainer,
    TrOPDConfig,
    TrOPDTrainer,
)


COLOCATED = {"use_vllm": True, "vllm_mode": "colocate"}


def make_trainer(name: str, path: str, tmp_path: Path, **overrides: Any) -> Any:
    """`"drpo"`, `"rlad"`, `"tropd"` or `"erpd"`, for a run of a few steps that samples more than once."""
    out = tmp_path / "run"
    arguments = {"peft_config": overrides.pop("peft_config", None), "processing_class": tiny.tokenizer()}
    torch.manual_seed(0)
    if name == "tropd":
        settings = tropd_runs.settings(out, guidance="none", **overrides)
        dataset = tropd_runs.sums()
        return TrOPDTrainer(path, tiny.policy(seed=1), TrOPDConfig(**settings), train_dataset=dataset, **arguments)
    if name == "erpd":
        defaults = {"prompts_per_round": 4, "extraction_passes": 1, "distillation_passes": 1}
        settings = tiny_erpd.settings(out, **{**defaults, "per_device_eval_batch_size": 8, **overrides})
        held_out = tiny.prompts(8)
        return ERPDTrainer(
            path, tiny_erpd.right_or_wrong, ERPDConfig(**settings), tiny.prompts(), held_out, **arguments
        )
    settings = tiny.grpo_settings(out, **overrides)
    if name == "rlad":
        teacher = overrides.get("teacher_model_server_url") is None
        arguments |= {"teacher_model": tiny.policy(seed=1)} if teacher else {}
        return RLADTrainer(path, tiny.digits_reward, RLADConfig(**settings), tiny.prompts(), **arguments)
    return DRPOTrainer(path, tiny.digits_reward, DRPOConfig(**settings), tiny.prompts(), **arguments)


def generation_of(trainer: Any) -> Any:
    """TRL's `VLLMGeneration`."""
    return trainer.sampler._vllm if hasattr(trainer, "sampler") else trainer.vllm_generation


def compare_with_model(trainer: Any) -> list[float]:
    """
    Fills, while the trainer runs, with the largest difference (nats) of each generation between the log-probabilities
    that the engine returns with its samples and those of the model that is trained.
    """
    differences: list[float] = []
    generation = generation_of(trainer)
    generate = generation.generate

    def compared(*args: Any, **kwargs: Any) -> tuple:
        prompts, completions, logps, ids = generate(*args, **kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        largest = 0.0
        for prompt, completion, values in zip(prompts, completions, logps, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, torch.tensor([[*completion]]).T).squeeze(1)
            difference = expected - torch.tensor([value[0] for value in values])
            largest = max(largest, difference.abs().max().item())
        differences.append(largest)
        return prompts, completions, logps, ids

    generation.generate = compared
    return differences
