"""
RLAD beside GRPO and KDRL from the same start, on Knights-and-Knaves puzzles.

Without arguments: puzzles of two people in a form for tiny models, a teacher that solves nearly all of them, and a
student of the same size that solves fewer than half; both made on the spot. No network, no GPU, a few minutes.

    accelerate launch examples/rlad_logic.py

A student and a teacher of your own, on puzzles in English of two to eight people:

    accelerate launch examples/rlad_logic.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B \
        --num_people 2 3 4 5 6 7 8 --max_completion_length 2048 --num_generations 8 --learning_rate 1e-6 \
        --epsilon 0.2 --epsilon_high 0.28 --output_dir rlad_knights_and_knaves

Every setting of RLADConfig is a flag, and all of them can stand in a file: `--config settings.yaml`.
"""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import add_model_init_kwargs, parse_arguments
from datasets import Dataset
from report import Panel, Run, draw_curves, results_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from embedded.arithmetic_policy import prepare_policy
from embedded.knights_and_knaves import as_dataset, right_compact_roles, right_roles, split_puzzles
from embedded.puzzle_policy import MAX_TOKENS, STUDENT, TEACHER, embedded_puzzles
from trl_ext import RLADConfig, RLADTrainer


# For the embedded task; flags and a config file win. The methods differ in nothing else.
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
    "gradient_checkpointing": False,
}
PANELS = (
    Panel("reward, mean of the rollouts", {"reward": "reward"}),
    Panel("log pi_student - log pi_teacher, nats a token", {"teacher/log_ratio": "mean"}),
    Panel(
        "share of tokens clipped (RLAD: vetoed)",
        {
            "teacher/veto_positive": "A > 0",
            "teacher/veto_negative": "A < 0",
            "clip_ratio/high_mean": "A > 0",
            "clip_ratio/low_mean": "A < 0",
        },
    ),
    Panel("entropy, nats a token", {"entropy": "entropy"}),
)


@dataclass
class RLADScriptArguments:
    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Any of 'grpo', 'kdrl' and 'rlad', trained one after the other from the same start. Default: all "
            "three of the embedded models, 'rlad' for your own."
        },
    )
    num_people: list[int] = field(
        default_factory=lambda: [3, 4, 5, 6, 7],
        metadata={"help": "Sizes of the puzzles, 2 to 8 people each. The embedded ones have 2."},
    )
    num_train: int = field(default=5000, metadata={"help": "Puzzles to train your own models on."})
    num_held_out: int = field(default=400, metadata={"help": "Puzzles that are evaluated, and not trained on."})


def train(
    method: str,
    training_args: RLADConfig,
    model_args: ModelConfig,
    paths: tuple[str, str | None],
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset, Dataset],
    reward: Callable[..., list[float]],
) -> Run:
    """One method from the start: everything but the method is the same."""
    args = copy.deepcopy(training_args)
    args.distillation = "kdrl" if method == "kdrl" else "trrd"
    args.output_dir = str(Path(training_args.output_dir) / method)
    student, teacher = paths
    train_dataset, held_out = data
    with_teacher: dict[str, Any] = {} if method == "grpo" else {"teacher_model": teacher}
    trainer = (GRPOTrainer if method == "grpo" else RLADTrainer)(
        model=student,
        reward_funcs=reward,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **with_teacher,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.evaluate()
    rewards = [log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log]
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    settings = {"learning_rate": args.learning_rate, "seed": args.seed}
    if method == "rlad":
        settings |= {"alpha": args.teacher_mixture_alpha, "clip": args.teacher_log_ratio_clip}
    elif method == "kdrl":
        settings |= {"coef": args.kdrl_coef, "estimator": args.kdrl_estimator}
    measures = {"puzzles solved": (rewards[0], rewards[-1])}
    return Run(method.upper(), trainer.state.log_history, measures, trainer.state.global_step, seconds, settings)


def main(script_args: RLADScriptArguments, training_args: RLADConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    methods = script_args.method or (["grpo", "kdrl", "rlad"] if embedded else ["rlad"])
    if unknown := set(methods) - {"grpo", "kdrl", "rlad"}:
        raise ValueError(f"--method {' '.join(unknown)} is unknown: choose from grpo, kdrl and rlad.")
    if embedded:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # the matrices are too small to be worth sharing
        paths: tuple[str, str | None] = prepare_policy(STUDENT), prepare_policy(TEACHER)
        tokenizer = AutoTokenizer.from_pretrained(paths[0], padding_side="left")
        puzzles = embedded_puzzles()
        held_out = as_dataset(puzzles.held_out[: script_args.num_held_out], compact=True)
        data, reward = (as_dataset(puzzles.train, compact=True), held_out), right_compact_roles
    else:
        paths = model_args.model_name_or_path, None  # the teacher is among the training arguments
        tokenizer = AutoTokenizer.from_pretrained(
            paths[0],
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
            truncation_side="left",
            padding_side="left",
        )
        puzzles = split_puzzles(script_args.num_train, script_args.num_held_out, script_args.num_people)
        data, reward = (as_dataset(puzzles.train, tokenizer), as_dataset(puzzles.held_out, tokenizer)), right_roles
        add_model_init_kwargs(training_args, model_args)
    # TRL evaluates where its training loop has prepared the model for DeepSpeed or FSDP; one completion a puzzle
    training_args.eval_on_start = True
    training_args.num_generations_eval = training_args.num_generations_eval or 1
    runs = [train(method, training_args, model_args, paths, tokenizer, data, reward) for method in methods]
    if training_args.process_index == 0:
        print(results_table(runs))
        print(draw_curves(runs, Path(training_args.output_dir) / "curves.png", PANELS))


if __name__ == "__main__":
    main(*parse_arguments(RLADScriptArguments, RLADConfig, EMBEDDED_DEFAULTS))
