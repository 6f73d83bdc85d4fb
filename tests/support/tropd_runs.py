"""Shared by the tests of TrOPDTrainer: data, a run of seconds, and rollouts that depend on the prompt alone."""

import hashlib
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset

from trl_ext import TrOPDConfig, TrOPDTrainer


def sums(n: int = 32, completions: bool = True) -> Dataset:
    """Sums of unequal length with their results, as plain text."""
    rows = {"prompt": [f"{i * 7 % 113}+{i}=" for i in range(n)]}
    if completions:
        rows["completion"] = [str(i * 7 % 113 + i) for i in range(n)]
    return Dataset.from_dict(rows)


def settings(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Settings of a run of seconds on one core."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_new_tokens": 10,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "outlier_top_k": 8,
        **overrides,
    }


def make_trainer(output_dir: Path, student: Any = None, teacher: Any = None, dataset: Any = None, **overrides: Any):
    names = ("peft_config", "eval_dataset", "data_collator", "processing_class", "callbacks")
    arguments = {name: overrides.pop(name) for name in names if name in overrides}
    return TrOPDTrainer(
        tiny.policy() if student is None else student,
        tiny.policy(seed=1) if teacher is None else teacher,
        TrOPDConfig(**settings(output_dir, **overrides)),
        train_dataset=sums() if dataset is None else dataset,
        **{"processing_class": tiny.tokenizer(), **arguments},
    )


def hashed_completion(prompt: list[int]) -> list[int]:
    """Always the same completion of 0 to 8 tokens for a prompt; half of them end with an end token."""
    digest = hashlib.sha256(str(prompt).encode()).digest()
    completion = [3 + byte % 45 for byte in digest[1 : 1 + digest[0] % 9]]
    return [*completion, 1] if digest[0] % 2 else completion


def hash_rollouts(trainer: Any) -> None:
    """Makes the student's and the teacher's samples depend on nothing but the prompt."""
    trainer.sampler.from_student = lambda prompts, length: ([hashed_completion(prompt) for prompt in prompts], None)
    trainer.sampler.from_teacher = lambda prompts, length: [
        hashed_completion([0, *prompt])[:length] for prompt in prompts
    ]


def micro_batches(trainer: Any, rows: int = 8, size: int = 4, training: bool = True) -> list[dict[str, Any]]:
    """The rollouts of one optimizer step over the first rows of the dataset."""
    trainer.model.train(training)
    trainer.state.max_steps = trainer.args.max_steps
    examples = [trainer.train_dataset[i] for i in range(rows)]
    batches = [trainer.data_collator(examples[i : i + size]) for i in range(0, rows, size)]
    return trainer._make_rollouts(batches)


def gradient(trainer: Any, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of an optimizer step over these micro-batches."""
    trainer.model.zero_grad()
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.current_gradient_accumulation_steps = len(batches)
    losses = [trainer.compute_loss(trainer.model, batch) for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def assert_same(first: dict, second: dict, **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)
