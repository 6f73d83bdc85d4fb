"""
Distil a teacher into a student with TrOPD, beside OPD, EOPD, REOPOLD and GKD from the same start.

Without arguments: sums with written-out steps. The student adds column by column and often forgets a carry; the
teacher adds place by place, and is right. Made on the spot: no network, no GPU, a few minutes.

    accelerate launch examples/tropd_math.py

A student, a teacher and a data set of your own (a hub name, or a local .jsonl, .json, .csv or .parquet file):

    accelerate launch examples/tropd_math.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name openai/gsm8k --dataset_config main --max_new_tokens 1024 \
        --learning_rate 5e-6 --lr_scheduler_type constant --num_generations 4 --output_dir tropd_gsm8k

Every setting of TrOPDConfig is a flag, and all of them can stand in a file: `--config settings.yaml`.
"""

import copy
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import add_model_init_kwargs, parse_arguments
from datasets import Dataset
from math_problems import load_problems
from report import Panel, Run, draw_curves, results_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, get_peft_config
from trl.experimental.gkd import GKDTrainer

from embedded.arithmetic import TOKENS_PER_DIGIT, as_dataset, held_out_accuracy, split_problems
from embedded.arithmetic_policy import Recipe, prepare_policy
from trl_ext import TrOPDConfig, TrOPDTrainer
from trl_ext.tropd.prompts import PromptCollator


STUDENTS = {
    "columns": Recipe(),  # never wrote as the teacher does
    "mixed": Recipe(style="mixed", slip_rate=0.05, forgotten_carry_rate=0.9),  # writes either way
}
TEACHER = Recipe(style="places", slip_rate=0.0, forgotten_carry_rate=0.0)

# For the embedded task; flags and a config file win. The methods differ in nothing else.
EMBEDDED_DEFAULTS = {
    "output_dir": "tropd_math_output",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_steps": 150,
    "max_new_tokens": 2 * TOKENS_PER_DIGIT,
    "logging_steps": 5,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}
# What each method changes
METHODS: dict[str, dict[str, Any]] = {
    "tropd": {},
    "tropd_expected": {"trust_region": "expected"},
    "tropd_clip": {"outlier_loss": "clip"},
    "tropd_mask": {"outlier_loss": "mask"},
    "opd": {"objective": "opd"},
    "eopd": {"objective": "eopd"},
    "reopold": {"objective": "reopold"},
    "gkd": {},
}
EMBEDDED_METHODS = ["tropd", "opd", "eopd", "reopold", "gkd"]
PANELS = (
    Panel("KL to the teacher on own samples, nats a token", {"teacher/kl": "K1"}),
    Panel("share of outliers", {"outliers/share": "share"}),
    Panel("forward KL on outliers, nats", {"outliers/forward_kl": "forward KL"}),
    Panel("entropy of the student, nats a token", {"entropy": "student"}),
    Panel("length of completions, tokens", {"completions/mean_length": "mean"}),
)


@dataclass
class TrOPDScriptArguments(ScriptArguments):
    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Any of {', '.join(METHODS)}, trained one after the other from the same start. Default: "
            f"{', '.join(EMBEDDED_METHODS)} for the embedded models, what the other flags say for your own."
        },
    )
    student: str = field(
        default="columns",
        metadata={
            "help": "The embedded student: 'columns' writes its steps otherwise than the teacher, 'mixed' either way.",
            "choices": list(STUDENTS),
        },
    )
    num_held_out: int = field(
        default=400, metadata={"help": "Problems on which the student is evaluated before and after training."}
    )


class SampledGKD(GKDTrainer):
    """TRL's own, which otherwise divides its loss by the data set's number of completion tokens, here 0."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # the mean over what was sampled


def make_trainer(
    method: str | None,
    args: TrOPDConfig,
    student: Any,
    teacher: str | None,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset, Dataset | None],
    peft_config: Any = None,
) -> Any:
    """The trainer of one method; `None` for what `args` say."""
    for name, value in METHODS.get(method or "", {}).items():
        setattr(args, name, value)
    arguments: dict[str, Any] = {
        "args": args,
        "train_dataset": data[0],
        "eval_dataset": data[1],
        "processing_class": tokenizer,
        "peft_config": peft_config,
    }
    if method != "gkd":
        return TrOPDTrainer(student, teacher, **arguments)
    # Given the same prompts; its divergence is of the whole vocabulary
    teacher = teacher or args.teacher_model_name_or_path
    collator = PromptCollator(tokenizer, args.max_length, completions=args.lmbda < 1)
    return SampledGKD(student, teacher, data_collator=collator, **arguments)


def measure(trainer: Any, args: TrOPDConfig, teacher: str | None, data: Any, problems: list[Any]) -> dict[str, float]:
    """The same measures of every method: accuracy, and the KL divergence to the teacher on held-out prompts."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    judge = make_trainer("tropd", copy.deepcopy(args), model, teacher, trainer.processing_class, data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        divergence = judge.evaluate()["eval_teacher/kl"]
        accuracy = held_out_accuracy(judge, problems)
    return {**accuracy, "KL to the teacher, nats a token": divergence}


def train(
    method: str | None,
    training_args: TrOPDConfig,
    model_args: ModelConfig,
    paths: tuple[str, str | None],
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset, Dataset | None],
    problems: list[Any],
    before: dict[str, float],
) -> Run:
    """One method from the start, whose measures are `before`: everything but the method is the same."""
    args = copy.deepcopy(training_args)
    args.output_dir = str(Path(training_args.output_dir) / method) if method else training_args.output_dir
    trainer = make_trainer(method, args, *paths, tokenizer, data, get_peft_config(model_args))
    embedded = bool(problems)
    if embedded and not before:
        before |= measure(trainer, training_args, paths[1], data, problems)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    measures: dict[str, tuple[float, float]] = {}
    if embedded:
        after = measure(trainer, training_args, paths[1], data, problems)
        measures = {name: (before[name], after[name]) for name in before}
    elif data[1] is not None:
        trainer.evaluate()
        for name in ("eval_teacher/kl", "eval_loss"):
            values = [log[name] for log in trainer.state.log_history if name in log]
            if values:
                measures[name] = values[0], values[-1]
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    settings = {"learning_rate": args.learning_rate, "seed": args.seed, "temperature": args.temperature}
    name = method or args.objective
    return Run(name, trainer.state.log_history, measures, trainer.state.global_step, seconds, settings)


def main(script_args: TrOPDScriptArguments, training_args: TrOPDConfig, model_args: ModelConfig) -> None:
    embedded = script_args.dataset_name is None
    methods: list[Any] = script_args.method or (EMBEDDED_METHODS if embedded else [None])
    if unknown := set(methods) - {*METHODS, None}:
        raise ValueError(f"--method {' '.join(unknown)} is unknown: choose from {', '.join(METHODS)}.")
    problems: list[Any] = []
    if embedded:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # the matrices are too small to be worth sharing
        paths: tuple[str, str | None] = prepare_policy(STUDENTS[script_args.student]), prepare_policy(TEACHER)
    else:
        paths = model_args.model_name_or_path, None  # the teacher is among the training arguments
    tokenizer = AutoTokenizer.from_pretrained(
        paths[0],
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        truncation_side="left",
        padding_side="left",
    )
    if embedded:
        splits = split_problems()
        problems = splits.held_out[: script_args.num_held_out]
        data: tuple[Dataset, Dataset | None] = as_dataset(splits.train), as_dataset(problems)
    else:
        data = load_problems(script_args, tokenizer, script_args.num_held_out, training_args.seed)
        training_args.eval_on_start = data[1] is not None  # where the model is prepared for DeepSpeed or FSDP
        add_model_init_kwargs(training_args, model_args)
    before: dict[str, float] = {}  # of the start that all share
    runs = [train(method, training_args, model_args, paths, tokenizer, data, problems, before) for method in methods]
    if training_args.process_index == 0:
        print(results_table(runs))
        print(draw_curves(runs, Path(training_args.output_dir) / "curves.png", PANELS))


if __name__ == "__main__":
    main(*parse_arguments(TrOPDScriptArguments, TrOPDConfig, EMBEDDED_DEFAULTS))
