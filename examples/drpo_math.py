"""
Train a policy with DRPO on problems whose answers can be checked.

Without arguments: sums with written-out steps and a tiny policy, made on the spot. No network, no GPU, a few minutes.

    accelerate launch examples/drpo_math.py

A model and a data set of your own (a hub name, or a local .jsonl, .json, .csv or .parquet file), here with LoRA:

    accelerate launch examples/drpo_math.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --use_peft --learning_rate 1e-5 \
        --num_iterations 2 --per_device_train_batch_size 8 --steps_per_generation 4 \
        --max_steps 200 --output_dir drpo_gsm8k

Every setting of DRPOConfig is a flag, and all of them can stand in a file: `--config settings.yaml`.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import add_model_init_kwargs, parse_arguments
from math_problems import load_problems, math_reward
from report import Run, draw_curves, results_table
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from embedded.arithmetic import TOKENS_PER_DIGIT, as_dataset, held_out_accuracy, right_answer, split_problems
from embedded.arithmetic_policy import prepare_policy
from trl_ext import DRPOConfig, DRPOTrainer


# For the embedded task; flags and a config file win. A rollout batch of 256 completions (32 prompts) makes 4 updates
# and is passed over twice, so that the last of its 8 updates is well off-policy and the trust region has work to do.
EMBEDDED_DEFAULTS = {
    "output_dir": "drpo_math_output",
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "num_generations": 8,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 320,
    "max_completion_length": 2 * TOKENS_PER_DIGIT,
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "logging_steps": 8,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass
class DRPOScriptArguments(ScriptArguments):
    num_held_out: int = field(
        default=400,
        metadata={"help": "Problems on which the policy is evaluated before and after training. 0: no evaluation."},
    )


def main(script_args: DRPOScriptArguments, training_args: DRPOConfig, model_args: ModelConfig) -> None:
    embedded = script_args.dataset_name is None
    if embedded and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the matrices are too small to be worth sharing
    model_path = prepare_policy() if embedded else model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(
        model_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        truncation_side="left",
        padding_side="left",
    )

    # Problems, and a reward that checks the answer
    if embedded:
        splits = split_problems()
        problems = splits.held_out[: script_args.num_held_out]
        train_dataset, held_out = as_dataset(splits.train), as_dataset(problems) if problems else None
    else:
        train_dataset, held_out = load_problems(script_args, tokenizer, script_args.num_held_out, training_args.seed)
        # TRL evaluates where its training loop has prepared the model for DeepSpeed or FSDP; one completion a problem
        training_args.eval_on_start = held_out is not None
        training_args.num_generations_eval = training_args.num_generations_eval or 1

    add_model_init_kwargs(training_args, model_args)
    trainer = DRPOTrainer(
        model=model_path,
        reward_funcs=right_answer if embedded else math_reward,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]

    # Train; in the embedded task, with the accuracy on the held-out problems before and after
    measures: dict[str, tuple[float, float]] = {}
    before = held_out_accuracy(trainer, problems) if embedded else {}
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    if embedded:
        after = held_out_accuracy(trainer, problems)
        measures = {name: (before[name], after[name]) for name in before}
    elif held_out is not None:
        trainer.evaluate()
        rewards = [log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log]
        measures["held-out reward"] = rewards[0], rewards[-1]

    # Save, report
    trainer.save_model(training_args.output_dir)
    run = Run(
        name=f"DRPO ({training_args.trust_region})",
        log_history=trainer.state.log_history,
        measures=measures,
        updates=trainer.state.global_step,
        seconds=seconds,
        settings={
            "trust_region_radius": trainer.trust_region_radius,
            "learning_rate": training_args.learning_rate,
            "updates_per_rollout": training_args.steps_per_generation
            * training_args.num_iterations
            // training_args.gradient_accumulation_steps,
            "completions_per_rollout": training_args.generation_batch_size,
        },
    )
    if trainer.accelerator.is_main_process:
        print(results_table([run]))
        print(draw_curves([run], Path(training_args.output_dir) / "curves.png"))
        print(f"Model: {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):  # transformers>=5.18
        trainer.end()


if __name__ == "__main__":
    main(*parse_arguments(DRPOScriptArguments, DRPOConfig, EMBEDDED_DEFAULTS))
