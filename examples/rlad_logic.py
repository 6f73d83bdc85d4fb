r"""
RLAD beside GRPO and KDRL from the same start, on Knights-and-Knaves puzzles or on math problems.

Without arguments: puzzles of two people in a form for tiny models, a teacher that solves nearly all of them, and a
student of the same size that solves fewer than half; both made on the spot. No network, no GPU, a few minutes.

    accelerate launch examples/rlad_logic.py

Your own student and teacher, on puzzles in English of two to eight people:

    accelerate launch examples/rlad_logic.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B \
        --num_people 2 3 4 5 6 7 8 --max_completion_length 2048 --num_generations 8 --learning_rate 1e-6 \
        --epsilon 0.2 --epsilon_high 0.28 --output_dir rlad_knights_and_knaves

With `--dataset_name`, on math problems from the Hub or from a local .jsonl, .json, .csv or .parquet file instead.
Every setting of RLADConfig is a flag, and all of them can be set in a file: `--config settings.yaml`.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from common.command_line import add_model_init_kwargs, chosen_methods, parse_arguments
from common.report import Panel
from common.training import Task, evaluate_at_start, load_tokenizer, own_math_task, report, run
from embedded import tasks
from embedded.knights_and_knaves import as_dataset, correct_roles, split_puzzles
from embedded.puzzle_policy import MAX_TOKENS
from trl_ext import RLADConfig, RLADTrainer, TrainingDiagnosticsCallback


# For the embedded task; flags and a config file override them. The methods differ in nothing else.
EMBEDDED_DEFAULTS = {
    "output_dir": "rlad_logic_output",
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 400,
    "num_generations": 8,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 120,
    "max_completion_length": MAX_TOKENS,
    "scale_rewards": "none",
    "kdrl_coef": 2e-2,
    "logging_steps": 4,
    "bf16": False,
}
# What each method changes, and the settings that its line in the report shows
METHODS: dict[str, dict[str, Any]] = {"grpo": {}, "kdrl": {"distillation": "kdrl"}, "rlad": {"distillation": "trrd"}}
SHOWN = {"grpo": (), "kdrl": ("kdrl_coef",), "rlad": ("teacher_mixture_alpha", "teacher_mixture_alpha_end")}
PANELS = (
    Panel("reward, mean of the rollouts", {"reward": "reward"}),
    Panel("log pi_student - log pi_teacher, nats per token", {"teacher/log_ratio": "mean"}),
    Panel(
        "share of tokens clipped (RLAD: vetoed)",
        {
            "teacher/veto_positive": "A > 0",
            "teacher/veto_negative": "A < 0",
            "clip_ratio/high_mean": "A > 0",
            "clip_ratio/low_mean": "A < 0",
        },
    ),
    Panel("entropy, nats per token", {"entropy": "entropy"}),
)


@dataclass
class RLADScriptArguments(ScriptArguments):
    needs_dataset = False  # not a flag: puzzles are made here

    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Any of grpo, kdrl and rlad, trained one after the other from the same start. Default: all three "
            "for the embedded models, rlad for your own."
        },
    )
    num_people: list[int] = field(
        default_factory=lambda: [3, 4, 5, 6, 7],
        metadata={"help": "How many people a puzzle has, any of 2 to 8. The embedded puzzles have 2."},
    )
    num_train: int = field(default=5000, metadata={"help": "Puzzles to train on. The embedded ones are 3000."})
    num_held_out: int = field(
        default=400, metadata={"help": "Puzzles on which the policy is evaluated before and after training."}
    )


def own_puzzles_task(script_args: RLADScriptArguments, training_args: RLADConfig, model_args: ModelConfig) -> Task:
    assert model_args.model_name_or_path is not None
    tokenizer = load_tokenizer(training_args, model_args)
    add_model_init_kwargs(training_args, model_args)
    puzzles = split_puzzles(script_args.num_train, script_args.num_held_out, script_args.num_people)
    held_out = as_dataset(puzzles.held_out, tokenizer) if puzzles.held_out else None
    train = as_dataset(puzzles.train, tokenizer)
    return Task(model_args.model_name_or_path, tokenizer, train, held_out, reward=correct_roles)


def make_trainer(method: str, training_args: RLADConfig, task: Task, model_args: ModelConfig) -> Any:
    args = copy.deepcopy(training_args)
    for name, value in METHODS[method].items():
        setattr(args, name, value)
    args.output_dir = str(Path(training_args.output_dir) / method)
    teacher: dict[str, Any] = {} if method == "grpo" else {"teacher_model": task.teacher}
    return (GRPOTrainer if method == "grpo" else RLADTrainer)(
        model=task.model,
        reward_funcs=task.reward,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        processing_class=task.tokenizer,
        callbacks=[TrainingDiagnosticsCallback()],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **teacher,
    )


def main(script_args: RLADScriptArguments, training_args: RLADConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    methods = chosen_methods(script_args.method, METHODS, list(METHODS) if embedded else ["rlad"])
    if embedded:
        task = tasks.puzzles(script_args.num_held_out)
    elif script_args.dataset_name is not None:
        task = own_math_task(script_args, training_args, model_args)
    else:
        task = own_puzzles_task(script_args, training_args, model_args)
    evaluate_at_start(training_args, task.held_out)
    runs = []
    for method in methods:
        trainer = make_trainer(method, training_args, task, model_args)
        settings = {name: getattr(training_args, name) for name in SHOWN[method]}
        runs.append(run(trainer, task, method.upper(), settings))
    report(runs, training_args.output_dir, PANELS)


if __name__ == "__main__":
    main(*parse_arguments(RLADScriptArguments, RLADConfig, EMBEDDED_DEFAULTS))
