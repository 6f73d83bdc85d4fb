"""The trainers that a run may name, each with what it takes beside its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig

from common.command_line import checkpointing
from common.gkd import SampledGKD
from studies.low_precision import LowPrecisionSampler
from studies.measures import batches, sample
from studies.runs import Stage
from studies.tasks import Task
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


class Corrected:
    """TRL's importance sampling correction for a `rollout_func`; TRL makes it for vLLM alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.use_vllm = True
        self.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        self._last_loaded_step = -1


class CorrectedGRPO(Corrected, GRPOTrainer):
    pass


class CorrectedDRPO(Corrected, DRPOTrainer):
    """With `trust_region_anchor="old_policy"`."""


@dataclass(frozen=True)
class Method:
    config: Any
    trainer: Any
    defaults: Callable[[Task], dict[str, Any]]
    arguments: Callable[..., dict[str, Any]]  # of (task, teacher, stage): the trainer's, beside the common ones
    spent: Callable[[Any, int], dict[str, int]]  # of (args, updates): rollouts and sampling phases


def policy_gradient(task: Task) -> dict[str, Any]:
    """A rollout batch is an update, unless `steps_per_generation` or `num_iterations` say more."""
    return {
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": task.max_tokens,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
    }


def regularized(task: Task) -> dict[str, Any]:
    return {**policy_gradient(task), "trust_region": "drpo"}


def policy_gradient_with_teacher(task: Task) -> dict[str, Any]:
    """Of a constant alpha, unless a run has another end: whatever the trainer's default is."""
    return {**policy_gradient(task), "teacher_mixture_alpha_end": None}


def extraction(task: Task) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 400,
        "prompts_per_round": 128,
        "num_generations": 16,
        "num_generations_eval": 1,
        "max_completion_length": task.max_tokens,
        "keep_teachers": True,  # to be measured like the result
        # Whatever the trainer's defaults are: a run's `epsilon` and `epsilon_high` are those of stage 2
        "distillation_epsilon": None,
        "distillation_epsilon_high": None,
        "outcome_advantage_weight": 0.0,
        "distillation_learning_rate_decay": 1.0,
    }


def distillation(task: Task) -> dict[str, Any]:
    return {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "max_new_tokens": task.max_tokens}


def fine_tuning(task: Task) -> dict[str, Any]:
    return {"per_device_train_batch_size": 64, "max_length": None}


def rewarded(task: Task, teacher: str | None, stage: Stage) -> dict[str, Any]:
    sampler = LowPrecisionSampler(stage.sampler) if stage.sampler else None
    return {"reward_funcs": task.reward, "rollout_func": sampler, "train_dataset": task.problems().train}


def with_held_out(task: Task, teacher: str | None, stage: Stage) -> dict[str, Any]:
    """ERPD measures its policies between the stages."""
    return {**rewarded(task, teacher, stage), "eval_dataset": task.problems().validation.select(range(400))}


def rewarded_and_taught(task: Task, teacher: str | None, stage: Stage) -> dict[str, Any]:
    return {**rewarded(task, teacher, stage), "teacher_model": teacher}


def taught(task: Task, teacher: str | None, stage: Stage) -> dict[str, Any]:
    return {"teacher": teacher, "train_dataset": task.problems().train.select_columns(["prompt"])}


def teacher_samples(task: Task, teacher: str | None, stage: Stage) -> dict[str, Any]:
    """`teacher_samples` completions of as many prompts, drawn from the teacher."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher, padding_side="left")
    train = task.problems().train
    train = train.select(range(min(stage.settings.get("teacher_samples", 2048), len(train))))
    pairs: list[dict[str, str]] = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for rows in batches(train, 1):
            tokens, length, _ = sample(model, tokenizer, task, rows)
            texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
            pairs += [{"prompt": p, "completion": c} for p, c in zip(rows["prompt"], texts, strict=True)]
    return {"train_dataset": Dataset.from_list(pairs)}


def spent_by_policy_gradient(args: Any, updates: int) -> dict[str, int]:
    per_phase = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
    phases = -(-updates // per_phase)
    return {"rollouts": phases * args.generation_batch_size, "sampling_phases": phases}


def spent_by_extraction(args: Any, updates: int) -> dict[str, int]:
    return {"rollouts": args.rounds * args.prompts_per_round * args.num_generations, "sampling_phases": args.rounds}


def spent_by_distillation(args: Any, updates: int) -> dict[str, int]:
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {"rollouts": updates * per_update, "sampling_phases": updates}


def spent_by_fine_tuning(args: Any, updates: int) -> dict[str, int]:
    return {"rollouts": 0, "sampling_phases": 0}


METHODS = {
    "grpo": Method(GRPOConfig, GRPOTrainer, policy_gradient, rewarded, spent_by_policy_gradient),
    "grpo_corrected": Method(GRPOConfig, CorrectedGRPO, policy_gradient, rewarded, spent_by_policy_gradient),
    "drpo_corrected": Method(DRPOConfig, CorrectedDRPO, regularized, rewarded, spent_by_policy_gradient),
    "drpo": Method(DRPOConfig, DRPOTrainer, regularized, rewarded, spent_by_policy_gradient),
    "rlad": Method(
        RLADConfig, RLADTrainer, policy_gradient_with_teacher, rewarded_and_taught, spent_by_policy_gradient
    ),
    "erpd": Method(ERPDConfig, ERPDTrainer, extraction, with_held_out, spent_by_extraction),
    "tropd": Method(TrOPDConfig, TrOPDTrainer, distillation, taught, spent_by_distillation),
    "gkd": Method(GKDConfig, SampledGKD, distillation, taught, spent_by_distillation),
    "sft": Method(SFTConfig, SFTTrainer, fine_tuning, teacher_samples, spent_by_fine_tuning),
}
STUDY_SETTINGS = {"teacher_samples"}  # not of a config class


def make_trainer(
    stage: Stage, task: Task, model: Any, tokenizer: Any, teacher: str | None, seed: int, output_dir: str,
    callbacks: list[TrainerCallback],
) -> Any:  # fmt: skip
    """The trainer of a stage; `model` is a path, or the model that the last stage left."""
    method = METHODS[stage.method]
    settings: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "learning_rate": 5e-5,
        "logging_steps": 8,
        **method.defaults(task),
        **{name: value for name, value in stage.settings.items() if name not in STUDY_SETTINGS},
    }
    if settings.get("trust_region") == "drpo":
        settings.setdefault("trust_region_radius", 0.15)  # of the runs that name none
    args = method.config(
        **settings,
        output_dir=output_dir,
        seed=seed,
        use_cpu=True,
        bf16=False,
        **checkpointing(method.config, False),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments = method.arguments(task, teacher, stage)
    positional = [model, arguments.pop("teacher")] if "teacher" in arguments else [model]
    trainer = method.trainer(*positional, args=args, processing_class=tokenizer, callbacks=callbacks, **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer
