"""A short run of each trainer that writes a checkpoint at every step and can be resumed exactly."""

from pathlib import Path
from typing import Any

import tiny
import tropd_runs
from tiny_erpd import right_or_wrong
from tiny_erpd import settings as erpd_settings

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


SAVING = {"save_strategy": "steps", "save_steps": 1}


def drpo(path: str, out: Path, **arguments: Any) -> DRPOTrainer:
    args = DRPOConfig(**tiny.grpo_settings(out, max_steps=6, num_iterations=3, **SAVING))
    return DRPOTrainer(path, tiny.digits_reward, args, tiny.prompts(), **arguments)


def rlad(path: str, out: Path, **arguments: Any) -> RLADTrainer:
    args = RLADConfig(**tiny.grpo_settings(out, max_steps=6, **SAVING))
    return RLADTrainer(path, tiny.digits_reward, args, tiny.prompts(), teacher_model=tiny.policy(seed=1), **arguments)


def tropd(path: str, out: Path, **arguments: Any) -> TrOPDTrainer:
    args = TrOPDConfig(**tropd_runs.settings(out, max_steps=6, **SAVING))
    return TrOPDTrainer(
        path,
        tiny.policy(seed=1),
        args,
        train_dataset=tropd_runs.sums(),
        processing_class=tiny.tokenizer(),
        **arguments,
    )


def erpd(path: str, out: Path, **arguments: Any) -> ERPDTrainer:
    args = ERPDConfig(**erpd_settings(out, prompts_per_round=4, distillation_passes=1, **SAVING))
    return ERPDTrainer(path, right_or_wrong, args, tiny.prompts(12), **arguments)


RUNS = {"drpo": drpo, "rlad": rlad, "tropd": tropd, "erpd": erpd}


def weights(trainer: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
