r"""
Self-distillation from privileged context: a policy that is given a hint teaches itself to do without it.

The student is a LoRA adapter. Its teacher is the base model, that is, the same model with the adapter off, which sees
the hint in its prompt: there is one model in memory. With TrOPD or RLAD, beside GRPO without a teacher and TRL's SDFT.

Without arguments: sums with written-out steps, and a policy that makes no mistakes where the worked carries are in its
prompt, and many where they are not. Made on the spot: no network, no GPU, a few minutes.

    accelerate launch examples/self_distillation.py

Your own model, and problems with worked solutions, which are the hints:

    accelerate launch examples/self_distillation.py \
        --model_name_or_path Qwen/Qwen3-0.6B --use_peft --learning_rate 1e-5 \
        --dataset_name openai/gsm8k --dataset_config main --max_new_tokens 1024 \
        --output_dir self_distillation_gsm8k

Every setting of TrOPDConfig is a flag, and all of them can be set in a file: `--config settings.yaml`. The methods
with another configuration take those that mean the same there: transformers' own, sampling and vLLM.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from common import math_problems
from common.command_line import chosen_methods, parse_arguments
from common.report import Panel, markdown_table
from common.training import Task, own_math_task, report, reproducibly, run
from embedded import arithmetic, tasks
from trl_ext import RLADConfig, RLADTrainer, TrainingDiagnosticsCallback, TrOPDConfig, TrOPDTrainer


# For the embedded task; flags and a config file override them. The methods differ in nothing else.
EMBEDDED_DEFAULTS = {
    "output_dir": "self_distillation_output",
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_steps": 80,
    "max_new_tokens": 2 * arithmetic.TOKENS_PER_DIGIT,
    "logging_steps": 10,
    "save_strategy": "no",
    "bf16": False,
}


@dataclass(frozen=True)
class Method:
    """A trainer, the class of its configuration, and what is set in it."""

    trainer: Any
    config: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    needs_reward: bool = False


KDRL = {"distillation": "kdrl", "kdrl_coef": 2e-2}
METHODS = {
    "tropd": Method(TrOPDTrainer, TrOPDConfig, teacher="base"),
    "opd": Method(TrOPDTrainer, TrOPDConfig, {"objective": "opd"}, teacher="base"),
    "rlad": Method(RLADTrainer, RLADConfig, teacher="base", needs_reward=True),
    "kdrl": Method(RLADTrainer, RLADConfig, KDRL, teacher="base", needs_reward=True),
    "grpo": Method(GRPOTrainer, GRPOConfig, needs_reward=True),
    "sdft": Method(SDFTTrainer, SDFTConfig, {"max_prompt_length": None}),  # its teacher is the base model too
}
# The settings that mean the same in every configuration
SHARED = {setting.name for setting in fields(TrainingArguments) if setting.init} - {"remove_unused_columns"}
SHARED |= {"num_generations", "temperature", "model_init_kwargs", "trust_remote_code"}
SHARED |= {setting.name for setting in fields(TrOPDConfig) if setting.name.startswith(("use_vllm", "vllm_"))}
PANELS = (
    Panel("KL to the teacher on own samples, nats per token", {"teacher/kl": "TrOPD", "teacher/log_ratio": "RLAD"}),
    Panel("reward, mean of the rollouts", {"reward": "reward"}),
    Panel("length of completions, tokens", {"completions/mean_length": "mean"}),
)


@dataclass
class SelfDistillationArguments(ScriptArguments):
    method: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Any of {', '.join(METHODS)}, trained one after the other from the same start. Default: all "
            "for the embedded policy, tropd for your own."
        },
    )
    num_held_out: int = field(
        default=400,
        metadata={"help": "Problems on which the policy is evaluated, without hints, before and after training."},
    )


def make_config(method: Method, args: TrOPDConfig, template: str, vocabulary: int) -> Any:
    """The configuration of a method; `template` makes of prompt and hint what SDFT's teacher sees."""
    if method.config is TrOPDConfig:
        config = copy.deepcopy(args)
        for setting, value in method.settings.items():
            setattr(config, setting, value)
        return config
    known = {setting.name for setting in fields(method.config)}
    settings = {setting: getattr(args, setting) for setting in SHARED & known} | dict(method.settings)
    settings |= {"max_completion_length": args.max_new_tokens, "num_generations_eval": 1}
    if method.config is SDFTConfig:
        settings["teacher_prompt_template"] = template
        if vocabulary < SDFTConfig.distillation_topk:
            settings["distillation_mode"] = "full_logits"
    return method.config(**settings)


def make_trainer(name: str, args: TrOPDConfig, task: Task, model_args: ModelConfig, template: str) -> Any:
    method = METHODS[name]
    config = make_config(method, args, template, len(task.tokenizer))
    config.output_dir = str(Path(args.output_dir) / name)
    others: dict[str, Any] = {} if method.teacher is None else {"teacher_model": method.teacher}
    if method.needs_reward:
        others["reward_funcs"] = task.reward
    return method.trainer(
        model=task.model,
        args=config,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        processing_class=task.tokenizer,
        callbacks=[TrainingDiagnosticsCallback()],
        peft_config=get_peft_config(model_args),
        **others,
    )


def print_teacher(task: Task, num_held_out: int) -> None:
    """What the student is to reach: the accuracy of the embedded base model with the hints."""
    model = AutoModelForCausalLM.from_pretrained(task.model)
    problems = [arithmetic.HintedProblem(*p) for p in arithmetic.split_problems().held_out[:num_held_out]]
    values = [reproducibly(arithmetic.accuracy, model, task.tokenizer, problems, greedy) for greedy in (False, True)]
    print(markdown_table(["", "accuracy, sampled", "accuracy, greedy"], [["teacher: base model with hints", *values]]))


def main(script_args: SelfDistillationArguments, training_args: TrOPDConfig, model_args: ModelConfig) -> None:
    embedded = script_args.dataset_name is None
    methods = chosen_methods(script_args.method, METHODS, list(METHODS) if embedded else ["tropd"])
    if not model_args.use_peft:
        raise ValueError("The teacher is the student without its adapter, so the student needs one: add --use_peft.")
    if embedded:
        task, template = tasks.hinted_sums(script_args.num_held_out), arithmetic.HINT_TEMPLATE
    else:
        with_answers = any(METHODS[name].needs_reward for name in methods)
        task = own_math_task(script_args, training_args, model_args, with_answers=with_answers, with_hints=True)
        template = math_problems.HINT_TEMPLATE
    runs = []
    for name in methods:
        trainer = make_trainer(name, training_args, task, model_args, template)
        runs.append(run(trainer, task, name))
    if embedded and task.held_out is not None and trainer.accelerator.is_main_process:
        print_teacher(task, script_args.num_held_out)
    report(runs, training_args.output_dir, PANELS)


if __name__ == "__main__":
    main(*parse_arguments(SelfDistillationArguments, TrOPDConfig, EMBEDDED_DEFAULTS))
