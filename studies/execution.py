"""Trains what a run describes, and measures the policy that it leaves."""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from common.console import ignore_deprecated_names
from embedded.arithmetic_policy import prepare_policy
from studies.measures import measure
from studies.runs import Run
from studies.tasks import TASKS
from studies.trainers import METHODS, make_trainer


CURVE_PROBLEMS, CURVE_SAMPLES = 500, 2  # of the validation split


class Curve(TrainerCallback):
    """Measures the policy every so many updates; the time that takes is not the run's."""

    def __init__(self, every: int, measure_now: Any):
        self.every = every
        self.measure_now = measure_now
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            start = time.perf_counter()
            self.points.append({"update": state.global_step, **self.measure_now(model)})
            self.seconds += time.perf_counter() - start


def weights_of_policy(run: Run) -> str:
    """A fingerprint of the weights that the run starts from."""
    path = prepare_policy(TASKS[run.task].policies[run.policy])
    return hashlib.sha256(Path(path, "model.safetensors").read_bytes()).hexdigest()[:12]


def train_and_measure(run: Run, num_problems: int | None = None) -> dict[str, Any]:
    """All of a result's line but the run, the weights and the commit; measured on `num_problems` per split, or all."""
    logging.disable_progress_bar()
    ignore_deprecated_names()
    torch.set_num_threads(1)
    task = TASKS[run.task]
    path = prepare_policy(task.policies[run.policy])
    teacher = prepare_policy(task.policies[run.teacher]) if run.teacher else None
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    judges = {"base": load(path), "teacher": load(teacher) if teacher else None}

    def measured(model: Any, split: str, limit: int | None = None, **how: Any) -> dict[str, float]:
        problems = getattr(task.problems(), split)
        problems = problems.select(range(min(limit or num_problems or len(problems), len(problems))))
        return measure(model, tokenizer, task, problems, **judges, **how)

    def measured_on_the_way(model: Any) -> dict[str, float]:
        limit = min(CURVE_PROBLEMS, num_problems or CURVE_PROBLEMS)
        return measured(model, "validation", limit, samples=CURVE_SAMPLES, greedy=False)

    def measured_on_splits(model: Any) -> dict[str, dict[str, float]]:
        return {split: measured(model, split) for split in (("validation", "test") if run.final else ("validation",))}

    model: Any = path
    stages: list[dict[str, Any]] = []
    for stage in run.stages:
        curve = Curve(run.curve_every or 10**9, measured_on_the_way)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(stage, task, model, tokenizer, teacher, run.seed, folder, [curve])
            start = time.perf_counter()
            if trainer.args.max_steps != 0:
                trainer.train()
            seconds = time.perf_counter() - start - curve.seconds
            teachers = {saved.name: measured_on_splits(load(str(saved))) for saved in kept_teachers(folder)}
        model = trainer.accelerator.unwrap_model(trainer.model)
        updates = trainer.state.global_step
        stages.append(
            {
                "seconds": round(seconds, 1),
                "updates": updates,
                **METHODS[stage.method].spent(trainer.args, updates),
                "curve": curve.points,
                "policies": between_the_stages(trainer.state.log_history),
                "teachers": teachers,
                "rewards": course(trainer.state.log_history, "reward"),
                "fresh_log_ratio": course(trainer.state.log_history, "sampling/fresh_log_ratio_abs"),
            }
        )

    totals = {
        name: sum(stage[name] for stage in stages) for name in ("rollouts", "sampling_phases", "updates", "seconds")
    }
    return {**totals, **measured_on_splits(model), "stages": stages}


def kept_teachers(folder: str) -> list[Path]:
    """ERPD's extreme region policies of its last round."""
    rounds = sorted(Path(folder).glob("round-*/"), key=lambda path: int(path.name.partition("-")[2]))
    return sorted(rounds[-1].glob("teacher_*")) if rounds else []


def load(path: str | None) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)


def course(log_history: list[dict[str, Any]], metric: str) -> list[list[float]]:
    """Updates and values of a logged metric."""
    return [[log["step"], round(log[metric], 4)] for log in log_history if metric in log]


def between_the_stages(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ERPD's own measures of its policies on the first 400 validation problems, in the order of measuring."""
    measured = []
    for log in log_history:
        for policy in dict.fromkeys(key.split("/")[0] for key in log if key.endswith("/reward")):
            values = {name: log.get(f"{policy}/{name}") for name in ("reward", "kl_per_sequence", "entropy")}
            measured.append({"round": log["round"], "policy": policy, **values})
    return measured
