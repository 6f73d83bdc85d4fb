r"""
Train a policy with ERPD on problems whose answers can be checked: extract from a fixed set of rollouts, then distil.

Without arguments: sums with written-out steps and a tiny policy, made on the spot, and beside it GRPO with the same
number of rollouts, sampled at once or in several phases. No network, no GPU, a few minutes.

    accelerate launch examples/erpd_math.py

Your own model and dataset (a hub name, or a local .jsonl, .json, .csv or .parquet file), here with LoRA:

    accelerate launch examples/erpd_math.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --use_peft --learning_rate 1e-5 \
        --rounds 2 --prompts_per_round 512 --num_generations 16 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --output_dir erpd_gsm8k

Rollouts can be written to a file, and trained from without sampling anything:

    accelerate launch examples/erpd_math.py --write_rollouts rollouts.jsonl
    accelerate launch examples/erpd_math.py --rollouts rollouts.jsonl

Every setting of ERPDConfig is a flag, and all of them can be set in a file: `--config settings.yaml`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from common.command_line import parse_arguments
from common.erpd_report import boundary_line, draw_stages, policies_table
from common.rollout_file import RolloutWriter, read_rollouts
from common.training import checkpoint_of, own_math_task, run
from embedded import tasks
from embedded.arithmetic import TOKENS_PER_DIGIT
from embedded.compared import comparison_table, measure_policies, policies_of_erpd, rollouts_of, train_grpo
from trl_ext import ERPDConfig, ERPDTrainer, TrainingDiagnosticsCallback


# For the embedded task; flags and a config file override them. What they are based on: docs/erpd.md
EMBEDDED_DEFAULTS = {
    "output_dir": "erpd_math_output",
    "prompts_per_round": 256,
    "num_generations": 8,
    "extraction_learning_rate": 5e-5,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "steps_per_generation": 2,
    "per_device_eval_batch_size": 400,
    "max_completion_length": 2 * TOKENS_PER_DIGIT,
    "keep_teachers": True,  # to be compared at the end
    "logging_steps": 16,  # half a pass
    "bf16": False,
}


@dataclass
class ERPDScriptArguments(ScriptArguments):
    num_held_out: int = field(
        default=400,
        metadata={"help": "Problems on which the policies are measured between the stages. 0: only on the fixed set."},
    )
    grpo_phases: list[int] = field(
        default_factory=lambda: [1, 8],
        metadata={
            "help": "In the embedded task: train GRPO too, with the same number of rollouts in that many sampling "
            "phases, one run for each number. 0: no GRPO."
        },
    )
    rollouts: str | None = field(
        default=None,
        metadata={"help": "A .jsonl file of rollouts with their rewards, to train from without sampling."},
    )
    write_rollouts: str | None = field(
        default=None, metadata={"help": "A .jsonl file for the rollouts of the first round, for --rollouts to read."}
    )


def main(script_args: ERPDScriptArguments, training_args: ERPDConfig, model_args: ModelConfig) -> None:
    embedded = script_args.dataset_name is None
    if embedded:
        task = tasks.sums(script_args.num_held_out)
        task.measure = None  # the trainer measures the policies itself, between the stages
    else:
        task = own_math_task(script_args, training_args, model_args)
    reward: Any = task.reward
    if script_args.rollouts is not None:
        task.train, training_args.prompts_per_round = read_rollouts(script_args.rollouts), None
    elif script_args.write_rollouts is not None:
        resumes = bool(checkpoint_of(training_args))
        reward = RolloutWriter(reward, script_args.write_rollouts, task.tokenizer, resumes)
    training_args.eval_on_start = False
    training_args.num_generations_eval = training_args.num_generations_eval or 1
    trainer = ERPDTrainer(
        model=task.model,
        reward_funcs=reward if task.held_out or not script_args.rollouts else None,
        args=training_args,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        processing_class=task.tokenizer,
        callbacks=[TrainingDiagnosticsCallback(verbose=False)],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if isinstance(reward, RolloutWriter):
        reward.model = trainer.model
    erpd = run(trainer, task, "ERPD", line=boundary_line)
    folder = Path(training_args.output_dir)
    table, policies = policies_table(erpd.log_history), []
    if embedded and task.held_out is not None:
        policies = policies_of_erpd(erpd, training_args, task.model)
        phases = [number for number in script_args.grpo_phases if number > 0]
        adapter = get_peft_config(model_args)
        policies += [train_grpo(number, rollouts_of(erpd), training_args, task, adapter) for number in phases]
        measure_policies(policies, script_args.num_held_out)
        table = comparison_table(policies)
    if trainer.accelerator.is_main_process:
        print(table)
        print(draw_stages(erpd.log_history, folder / "stages.png", policies))
        print(f"{erpd.updates} updates in {erpd.seconds:.0f} seconds. Saved: {folder}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*parse_arguments(ERPDScriptArguments, ERPDConfig, EMBEDDED_DEFAULTS))
