"""
Train a policy with ERPD on problems whose answers can be checked: extract from a fixed set of rollouts, then distil.

Without arguments: sums with written-out steps and a tiny policy, made on the spot. No network, no GPU, a few minutes.

    accelerate launch examples/erpd_math.py

A model and a data set of your own (a hub name, or a local .jsonl, .json, .csv or .parquet file), here with LoRA:

    accelerate launch examples/erpd_math.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --use_peft --learning_rate 1e-5 \
        --rounds 2 --prompts_per_round 512 --num_generations 16 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --output_dir erpd_gsm8k

Every setting of ERPDConfig is a flag, and all of them can stand in a file: `--config settings.yaml`.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import add_model_init_kwargs, parse_arguments
from math_problems import load_problems, math_reward
from report import NO_MATPLOTLIB, load_pyplot, markdown_table
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from embedded.arithmetic import TOKENS_PER_DIGIT, as_dataset, right_answer, split_problems
from embedded.arithmetic_policy import prepare_policy
from trl_ext import ERPDConfig, ERPDTrainer


# For the embedded task; flags and a config file win. What they rest on: erpd_study.py and docs/erpd.md
EMBEDDED_DEFAULTS = {
    "output_dir": "erpd_math_output",
    "prompts_per_round": 128,
    "num_generations": 16,
    "extraction_passes": 16,
    "extraction_learning_rate": 5e-5,
    "distillation_passes": 4,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 400,
    "max_completion_length": 2 * TOKENS_PER_DIGIT,
    "logging_steps": 8,  # a pass
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass
class ERPDScriptArguments(ScriptArguments):
    num_held_out: int = field(
        default=400,
        metadata={"help": "Problems on which the policies are measured between the stages. 0: only on the fixed set."},
    )


def main(script_args: ERPDScriptArguments, training_args: ERPDConfig, model_args: ModelConfig) -> None:
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
    training_args.num_generations_eval = training_args.num_generations_eval or 1  # one completion a held-out problem

    add_model_init_kwargs(training_args, model_args)
    trainer = ERPDTrainer(
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

    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    seconds = time.perf_counter() - start

    # Save, report
    trainer.save_model(training_args.output_dir)
    if trainer.accelerator.is_main_process:
        print(policies_table(trainer.state.log_history))
        print(f"{trainer.state.global_step} updates in {seconds:.0f} seconds, {training_args.rounds} round(s)")
        print(draw_stages(trainer.state.log_history, Path(training_args.output_dir) / "stages.png"))
        print(f"Model: {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):  # transformers>=5.18
        trainer.end()


NAMES = {"base": "base policy", "teacher": "extreme region policy", "unlearned": "unlearned policy"}
MEASURES = {"reward": "accuracy", "kl_per_sequence": "KL to base, nats a sequence"}
MEASURES |= {"kl_per_token": "nats a token", "entropy": "entropy, nats a token"}


def measured_policies(log_history: list[dict[str, Any]]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """Round, update, policy and its measures on held-out problems (else on the set), in the order of measuring."""
    policies = []
    for log in log_history:
        for prefix in dict.fromkeys(key.split("/")[0] for key in log):
            if prefix in ("base", "distilled") or prefix.startswith(("teacher_", "unlearned_")):
                values = {name: log.get(f"{prefix}/{name}", log.get(f"{prefix}/set_{name}")) for name in MEASURES}
                policies.append((log["round"], log["step"], prefix, values))
    return policies


def policies_table(log_history: list[dict[str, Any]]) -> str:
    """A line for the base policy, for each policy of stage 1 and for the distilled one, round by round."""
    rows = []
    for number, _, prefix, values in measured_policies(log_history):
        kind, _, loss = prefix.partition("_")
        name = NAMES.get(kind, f"{kind} policy") + f" ({loss})" * bool(loss)
        rows.append([number, name, *("" if values[measure] is None else values[measure] for measure in MEASURES)])
    return markdown_table(["round", "policy", *MEASURES.values()], rows)


def draw_stages(log_history: list[dict[str, Any]], path: Path) -> str:
    """Both stages of each round over the updates: accuracy, divergence from the base and entropy."""
    plt = load_pyplot()
    if plt is None:
        return NO_MATPLOTLIB
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    updates = [log for log in log_history if "kl_from_base" in log]
    for axis, key, title in (
        (axes[1], "kl_from_base", "KL from the base, nats a token of the set"),
        (axes[2], "entropy", "entropy, nats a token of the set"),
    ):
        phases = sorted({(log["round"], log["stage"]) for log in updates})
        for phase in phases:
            points = [(log["step"], log[key]) for log in updates if (log["round"], log["stage"]) == phase]
            axis.plot(*zip(*points, strict=True), ".-", color=f"C{phase[1]}", markersize=4)
        axis.set_title(title, fontsize=10)
    for _, step, prefix, values in measured_policies(log_history):
        stage = {"base": 0, "distilled": 2}.get(prefix, 1)
        if values["reward"] is not None:
            axes[0].plot(step, values["reward"], "o", color=f"C{stage}")
            axes[0].annotate(prefix.replace("_", " "), (step, values["reward"]), fontsize=8, ha="center", va="bottom")
    axes[0].set_title("accuracy on held-out problems", fontsize=10)
    axes[0].margins(0.15)
    for axis in axes:
        axis.set_xlabel("updates (orange: extraction, green: distillation)")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"


if __name__ == "__main__":
    main(*parse_arguments(ERPDScriptArguments, ERPDConfig, EMBEDDED_DEFAULTS))
