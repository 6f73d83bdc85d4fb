"""The policies of the embedded ERPD run and of GRPO with the same number of rollouts, measured in the same way."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from common.command_line import checkpointing
from common.console import quieten
from common.report import Run, markdown_table
from common.training import Task
from embedded.arithmetic import compare_with_base, split_problems


# GRPO's settings, those of drpo_math.py; an update has 64 rollouts
GRPO_LEARNING_RATE = 5e-5
GRPO_UPDATE = 64
GRPO_PASSES = 2  # over the rollouts of a phase


@dataclass
class Policy:
    """A trained policy, what it took to train it, and its measures."""

    name: str
    path: str
    rollouts: int = 0
    phases: int = 0  # how often rollouts were sampled
    updates: int = 0
    seconds: float = 0.0
    accuracy: float = 0.0  # of samples at temperature 1
    greedy: float = 0.0
    kl: float = 0.0  # to the base policy, nats per sequence


def policies_of_erpd(erpd: Run, args: Any, base: str) -> list[Policy]:
    """The base policy, the extreme region policies of the last round, and the distilled policy."""
    rollouts = rollouts_of(erpd)
    teachers = sorted(Path(args.output_dir, f"round-{args.rounds}").glob("teacher_*"))
    return [
        Policy("base policy", base),
        *(
            Policy(f"ERPD, extreme region policy ({path.name.split('_')[1]})", str(path), rollouts, args.rounds)
            for path in teachers
        ),
        Policy("ERPD, distilled policy", args.output_dir, rollouts, args.rounds, erpd.updates, erpd.seconds),
    ]


def rollouts_of(erpd: Run) -> int:
    """How many rollouts the run was trained on, in all rounds."""
    return int(sum(log.get("fixed_set/rollouts", 0) for log in erpd.log_history))


def train_grpo(phases: int, rollouts: int, args: Any, task: Task, peft_config: Any = None) -> Policy:
    """GRPO with that many rollouts, sampled in `phases` phases; other settings are those of ERPD's run."""
    output_dir = str(Path(args.output_dir) / f"grpo_{phases}_phases")
    micro_batch = GRPO_UPDATE // args.world_size
    if rollouts % (phases * GRPO_UPDATE):
        raise ValueError(
            f"{rollouts} rollouts cannot be sampled in {phases} phases of whole updates of {GRPO_UPDATE}: set "
            "--grpo_phases to divisors of their quotient, or to 0."
        )
    trainer = GRPOTrainer(
        model=task.model,
        reward_funcs=task.reward,
        args=GRPOConfig(
            output_dir=output_dir,
            learning_rate=GRPO_LEARNING_RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=micro_batch,
            num_generations=8,
            generation_batch_size=rollouts // phases,
            num_iterations=GRPO_PASSES,
            max_steps=rollouts // GRPO_UPDATE * GRPO_PASSES,
            max_completion_length=args.max_completion_length,
            loss_type="dr_grpo",
            scale_rewards="none",
            seed=args.seed,
            logging_steps=rollouts // GRPO_UPDATE * GRPO_PASSES // phases,  # a phase
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=args.use_cpu,
            disable_tqdm=args.disable_tqdm,
            dataloader_pin_memory=args.dataloader_pin_memory,
            **checkpointing(GRPOConfig, False),
        ),
        train_dataset=task.train,
        processing_class=task.tokenizer,
        peft_config=peft_config,
    )
    name = f"GRPO, {phases} sampling phase{'s' * (phases > 1)}"
    trainer.accelerator.print(name)
    quieten(trainer, lambda logs: f"Update {logs['step']}: reward {logs['reward']:.3f}" if "reward" in logs else None)
    start = time.perf_counter()
    trainer.train()
    policy = Policy(name, output_dir, rollouts, phases, trainer.state.global_step, time.perf_counter() - start)
    trainer.save_model(output_dir)
    trainer.accelerator.wait_for_everyone()
    return policy


def measure_policies(policies: Sequence[Policy], num_held_out: int) -> None:
    """On the same held-out problems, with four samples each and the same random numbers."""
    base = AutoModelForCausalLM.from_pretrained(policies[0].path).eval()
    tokenizer = AutoTokenizer.from_pretrained(policies[0].path, padding_side="left")
    problems = split_problems().held_out[:num_held_out]
    for policy in policies:
        model = AutoModelForCausalLM.from_pretrained(policy.path).eval()
        policy.accuracy, policy.greedy, policy.kl = compare_with_base(model, base, tokenizer, problems)


def comparison_table(policies: Sequence[Policy]) -> str:
    """A line for each policy."""
    header = ["policy", "accuracy", "greedy", "KL to base", "rollouts", "sampling phases", "updates", "seconds"]
    rows = [
        [
            *(policy.name, policy.accuracy, policy.greedy, policy.kl, policy.rollouts, policy.phases),
            *(policy.updates or "", f"{policy.seconds:.0f}" if policy.seconds else ""),
        ]
        for policy in policies
    ]
    note = "Accuracy of four samples per held-out problem, and of the greedy answer. KL in nats per sequence."
    return f"{markdown_table(header, rows)}\n{note}"
