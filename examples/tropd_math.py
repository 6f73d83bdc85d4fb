r"""
Distil a teacher into a student with TrOPD, beside OPD, EOPD, REOPOLD and GKD from the same start.

Without arguments: sums with written-out steps. The student adds column by column and often forgets a carry; the
teacher adds place by place, and is correct. Made on the spot: no network, no GPU, a few minutes.

    accelerate launch examples/tropd_math.py

Your own student, teacher and dataset (a hub name, or a local .jsonl, .json, .csv or .parquet file):

    accelerate launch examples/tropd_math.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name openai/gsm8k --dataset_config main --max_new_tokens 1024 \
        --learning_rate 5e-6 --lr_scheduler_type constant --num_generations 4 --output_dir tropd_gsm8k

Every setting of TrOPDConfig is a flag, and all of them can be set in a file: `--config settings.yaml`.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments, get_peft_config

from common.command_line import chosen_methods, parse_arguments
from common.console import quieten
from common.gkd import SampledGKD
from common.report import Panel, Run
from common.training import Task, own_math_task, report, run
from embedded import tasks
from embedded.arithmetic import TOKENS_PER_DIGIT
from embedded.arithmetic_policy import Recipe
from trl_ext import TrainingDiagnosticsCallback, TrOPDConfig, TrOPDTrainer


STUDENTS = {
    "columns": Recipe(),  # has never written as the teacher does
    "mixed": Recipe(style="mixed", slip_rate=0.05, forgotten_carry_rate=0.9),  # writes in either way
}
TEACHER = Recipe(style="places", slip_rate=0.0, forgotten_carry_rate=0.0)

# For the embedded task; flags and a config file override them. The methods differ in nothing else.
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
}
# What each method changes
METHODS: dict[str, dict[str, Any]] = {
    "tropd": {},
    "tropd_expected": {"trust_region": "expected"},
    "tropd_forward_kl": {"outlier_loss": "forward_kl"},  # the paper's
    "tropd_clip": {"outlier_loss": "clip"},
    "tropd_mask": {"outlier_loss": "mask"},
    "tropd_both": {"outlier_loss": "forward_kl_and_clip"},
    "opd": {"objective": "opd"},
    "forward_kl": {"objective": "forward_kl"},
    "eopd": {"objective": "eopd"},
    "reopold": {"objective": "reopold"},
    "gkd": {},
}
EMBEDDED_METHODS = ["tropd", "opd", "eopd", "reopold", "gkd"]
PANELS = (
    Panel("KL to the teacher on own samples, nats per token", {"teacher/kl": "K1"}),
    Panel("share of outliers", {"outliers/share": "share"}),
    Panel("forward KL on outliers, nats", {"outliers/forward_kl": "forward KL"}),
    Panel("entropy of the student, nats per token", {"entropy": "student"}),
    Panel("length of completions, tokens", {"completions/mean_length": "mean"}),
)


@dataclass
class TrOPDScriptArguments(ScriptArguments):
    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Any of {', '.join(METHODS)}, trained one after the other from the same start. Default: "
            f"{', '.join(EMBEDDED_METHODS)} for the embedded models; for your own, one run with the settings that the "
            "other flags give."
        },
    )
    student: str = field(
        default="columns",
        metadata={
            "help": "The embedded student: 'columns' writes its steps differently from the teacher, 'mixed' in either "
            "way.",
            "choices": list(STUDENTS),
        },
    )
    num_held_out: int = field(
        default=400, metadata={"help": "Problems on which the student is evaluated before and after training."}
    )


def make_trainer(method: str | None, args: TrOPDConfig, task: Task, model: Any, peft_config: Any = None) -> Any:
    """The trainer of one method; `None`: of the one that `args` describe."""
    for name, value in METHODS.get(method or "", {}).items():
        setattr(args, name, value)
    teacher = task.teacher or args.teacher_model_name_or_path
    arguments: dict[str, Any] = {
        "args": args,
        "train_dataset": task.train,
        "eval_dataset": task.held_out,
        "processing_class": task.tokenizer,
        "callbacks": [TrainingDiagnosticsCallback()],
        "peft_config": peft_config,
    }
    trainer = SampledGKD if method == "gkd" else TrOPDTrainer  # GKD's divergence is over the whole vocabulary
    return trainer(model, teacher, **arguments)


def measure(trainer: Any, args: TrOPDConfig, task: Task, accuracy: Any) -> dict[str, float]:
    """The same measures for every method: accuracy, and the KL divergence to the teacher on held-out prompts."""
    judge = make_trainer("tropd", copy.deepcopy(args), task, trainer.accelerator.unwrap_model(trainer.model))
    quieten(judge)
    if task.held_out is None:
        return accuracy(judge)
    return {**accuracy(judge), "KL to the teacher, nats per token": judge.evaluate()["eval_teacher/kl"]}


def main(script_args: TrOPDScriptArguments, training_args: TrOPDConfig, model_args: ModelConfig) -> None:
    embedded = script_args.dataset_name is None
    methods = chosen_methods(script_args.method, METHODS, EMBEDDED_METHODS if embedded else [None])
    if embedded:
        task = tasks.sums(script_args.num_held_out, STUDENTS[script_args.student], TEACHER)
        task.measure = partial(measure, args=training_args, task=task, accuracy=task.measure)
    else:
        task = own_math_task(script_args, training_args, model_args, with_answers=False)
    runs: list[Run] = []
    for method in methods:
        args = copy.deepcopy(training_args)
        args.output_dir = str(Path(training_args.output_dir) / method) if method else training_args.output_dir
        trainer = make_trainer(method, args, task, task.model, get_peft_config(model_args))
        runs.append(run(trainer, task, method or args.objective, {"temperature": args.temperature}))
    report(runs, training_args.output_dir, PANELS)


if __name__ == "__main__":
    main(*parse_arguments(TrOPDScriptArguments, TrOPDConfig, EMBEDDED_DEFAULTS))
