"""What every example does with its trainer: measure, train, measure again, save, report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import ModelConfig

from common.command_line import add_model_init_kwargs
from common.console import Line, quieten
from common.math_problems import load_problems, math_reward
from common.report import Panel, Run, draw_curves, results_table


@dataclass
class Task:
    """
    What an example trains on.

    Args:
        model (`str`):
            Hub name or path of the policy, for `from_pretrained`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        train (`Dataset` or `IterableDataset`), held_out (`Dataset` or `IterableDataset`, *optional*):
            Prompts, with the columns that `reward` needs.
        reward (`Callable`, *optional*):
            A reward function of [`~trl.GRPOTrainer`].
        teacher (`str`, *optional*):
            Path of the embedded teacher. Your own is among the training arguments.
        measure (`Callable[[Trainer], dict[str, float]]`, *optional*):
            Measures of a trainer's policy, taken before and after training. `None`: those of TRL's `evaluate`.
        start (`dict[str, float]`):
            The measures before training, which are taken once: all runs of a script have the same start.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    held_out: Dataset | IterableDataset | None
    reward: Callable[..., list[Any]] | None = None
    teacher: str | None = None
    measure: Callable[[Any], dict[str, float]] | None = None
    start: dict[str, float] = field(default_factory=dict)


def prepare_embedded() -> None:
    """For models of some 0.4M parameters: one thread, because their matrices are too small to be worth sharing."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    logging.disable_progress_bar()  # of loading and saving a few hundred kilobytes


def load_tokenizer(training_args: Any, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        truncation_side="left",
        padding_side="left",
    )


def own_math_task(script_args: Any, training_args: Any, model_args: ModelConfig, **columns: bool) -> Task:
    """
    A model and math problems of your own; held-out problems are evaluated with one completion each. `columns` are
    those of `load_problems`.
    """
    assert model_args.model_name_or_path is not None
    tokenizer = load_tokenizer(training_args, model_args)
    add_model_init_kwargs(training_args, model_args)
    data = load_problems(script_args, tokenizer, script_args.num_held_out, training_args.seed, **columns)
    evaluate_at_start(training_args, data[1])
    return Task(model_args.model_name_or_path, tokenizer, *data, reward=math_reward)


def evaluate_at_start(training_args: Any, held_out: Any) -> None:
    """Evaluation before training takes place in the training loop, which prepares models for DeepSpeed and FSDP."""
    training_args.eval_on_start = held_out is not None
    if hasattr(training_args, "num_generations_eval"):
        training_args.num_generations_eval = training_args.num_generations_eval or 1


def run(trainer: Any, task: Task, name: str, settings: dict[str, Any] | None = None, line: Line | None = None) -> Run:
    """Trains, measures before and after, saves to `output_dir`, and pushes to the Hub where that was asked for."""
    args = trainer.args
    quieten(trainer, line)
    if task.measure and not task.start:
        task.start = reproducibly(task.measure, trainer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint_of(args))
    seconds = time.perf_counter() - start
    measures: dict[str, tuple[float, float]] = {}
    if task.measure:
        after = reproducibly(task.measure, trainer)
        measures = {measure: (task.start[measure], value) for measure, value in after.items()}
    elif args.eval_on_start:
        trainer.evaluate()
        for key, label in EVALUATED.items():
            values = [log[key] for log in trainer.state.log_history if key in log]
            if values:
                measures[label] = values[0], values[-1]
    finish(trainer)
    shown = {"learning_rate": args.learning_rate, "seed": args.seed, **(settings or {})}
    return Run(name, trainer.state.log_history, measures, trainer.state.global_step, seconds, shown)


def reproducibly(function: Callable[..., Any], *args: Any) -> Any:
    """With the same random numbers for every policy, and without an effect on those of the training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return function(*args)


EVALUATED = {"eval_reward": "held-out reward", "eval_teacher/kl": "KL to the teacher, nats per token"}


def checkpoint_of(args: Any) -> Any:
    """`--resume_from_checkpoint True`: the last checkpoint of `output_dir`, or, where there is none yet, none."""
    resume = args.resume_from_checkpoint
    folder = Path(args.output_dir)
    has_rollouts = any(folder.glob("_rollouts/round-1/*/*"))  # of ERPD, which was interrupted before a checkpoint
    if resume is True and not has_rollouts and not (folder.is_dir() and get_last_checkpoint(str(folder))):
        return None
    return resume


def finish(trainer: Any) -> None:
    """Saves the model, and pushes it where that was asked for."""
    args = trainer.args
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.accelerator.wait_for_everyone()


def report(runs: list[Run], output_dir: str, panels: tuple[Panel, ...]) -> None:
    """The closing table and a picture of the curves, by the main process; then the process group is closed."""
    state = PartialState()
    if state.is_main_process:
        print(results_table(runs))
        print(draw_curves(runs, Path(output_dir) / "curves.png", panels))
        print(f"Saved: {output_dir}")
    state.destroy_process_group()
