r"""
Train a policy with DRPO on problems whose answers can be checked.

Without arguments: sums with written-out steps and a tiny policy, made on the spot. No network, no GPU, a few minutes.

    accelerate launch examples/drpo_math.py

Your own model and dataset (a hub name, or a local .jsonl, .json, .csv or .parquet file), here with LoRA:

    accelerate launch examples/drpo_math.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --use_peft --learning_rate 1e-5 \
        --num_iterations 2 --per_device_train_batch_size 8 --steps_per_generation 4 \
        --max_steps 200 --output_dir drpo_gsm8k

Every setting of DRPOConfig is a flag, and all of them can be set in a file: `--config settings.yaml`.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from common.command_line import parse_arguments
from common.report import Panel
from common.training import own_math_task, report, run
from embedded import tasks
from embedded.arithmetic import TOKENS_PER_DIGIT
from trl_ext import DRPOConfig, DRPOTrainer, TrainingDiagnosticsCallback


# For the embedded task; flags and a config file override them. A rollout batch of 256 completions (32 prompts) makes 4
# updates and is passed over twice, so that the last of its 8 updates is off-policy and the trust region has an effect.
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
}
PANELS = (
    Panel("reward, mean of the rollouts", {"reward": "reward"}),
    Panel("|pi - mu|, shift of probability", {"probability_shift/mean": "mean", "probability_shift/max": "max"}),
    Panel("ratio pi / mu", {"ratio/min": "min", "ratio/mean": "mean", "ratio/max": "max"}),
    Panel(
        "tokens outside the region, by sign of the advantage",
        {"outside_region/positive": "A > 0", "outside_region/negative": "A < 0"},
    ),
    Panel("entropy, nats per token", {"entropy": "entropy"}),
    Panel("length of completions, tokens", {"completions/mean_length": "mean"}),
)


@dataclass
class DRPOScriptArguments(ScriptArguments):
    num_held_out: int = field(
        default=400,
        metadata={"help": "Problems on which the policy is evaluated before and after training. 0: no evaluation."},
    )


def main(script_args: DRPOScriptArguments, training_args: DRPOConfig, model_args: ModelConfig) -> None:
    if script_args.dataset_name is None:
        task = tasks.sums(script_args.num_held_out)
    else:
        task = own_math_task(script_args, training_args, model_args)
    trainer = DRPOTrainer(
        model=task.model,
        reward_funcs=task.reward,
        args=training_args,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        processing_class=task.tokenizer,
        callbacks=[TrainingDiagnosticsCallback()],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    settings = {"trust_region": training_args.trust_region, "trust_region_radius": trainer.trust_region_radius}
    report([run(trainer, task, "DRPO", settings)], training_args.output_dir, PANELS)


if __name__ == "__main__":
    main(*parse_arguments(DRPOScriptArguments, DRPOConfig, EMBEDDED_DEFAULTS))
