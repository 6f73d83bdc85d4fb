"""
Time and peak memory of TrOPD beside GKD's, side by side in one run and in turn, as a ratio.

    accelerate launch benchmarks/distillation.py
    accelerate launch benchmarks/distillation.py --hidden_size 1024 --layers 28 --batch_size 4 --length 1024

- `loss`: from the last hidden states of student and teacher to the loss, and back to the gradients of hidden states
  and student's LM head, for 2048 completion tokens and a vocabulary of 151,936. GKD's side is what its trainer does:
  both LM heads, then its generalized Jensen-Shannon divergence.
- `step`: a whole training step of both trainers on the same given rollouts: forward passes, loss, backward, optimizer.

Machines are noisy and so only ratios count: the two take turns, and a ratio is that of the medians over all turns.
Memory is what is allocated above the inputs; on a CPU, what the process grows by.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from step import make_model, peak_memory, reset_peak_memory, synchronize
from transformers import PrinterCallback, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the embedded task

from common.command_line import checkpointing
from common.console import ignore_deprecated_names
from embedded.arithmetic import character_tokenizer
from trl_ext import TrOPDConfig, TrOPDTrainer
from trl_ext.losses import tropd_loss
from trl_ext.next_token import HeadScaling, likeliest_tokens, selected_logps


TOP_K = 64


class Clock(TrainerCallback):
    """Seconds of each optimizer step but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MiB above what is held before."""
    reset_peak_memory()
    held = peak_memory()
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start, peak_memory() - held


def loss_measurements(flags: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """One turn of the losses alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens, width, vocabulary = flags.loss_tokens, flags.loss_width, flags.loss_vocabulary

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) / width**0.25

    hidden, head = tensor(tokens, width).requires_grad_(), tensor(vocabulary, width).requires_grad_()
    teacher_hidden, teacher_head = tensor(tokens, width), tensor(vocabulary, width)
    labels = torch.randint(vocabulary, (1, tokens), device=device)

    def gkd() -> None:
        with torch.no_grad():
            teacher_logits = (teacher_hidden @ teacher_head.t())[None]
        loss = GKDTrainer.generalized_jsd_loss((hidden @ head.t())[None], teacher_logits, labels, beta=0.5)
        loss.backward()

    def tropd() -> None:
        scaling = HeadScaling(1.0, None, 1.0)
        teacher = likeliest_tokens(teacher_hidden, teacher_head, None, labels[0], TOP_K, scaling)
        columns = torch.cat([labels[0][:, None], teacher.top_k_ids], dim=1)
        logps, _ = selected_logps(hidden, head, None, columns, scaling)
        loss = tropd_loss(
            logps[None, :, 0],
            teacher.logps[None],
            torch.ones_like(labels),
            top_k_logps=logps[None, :, 1:],
            teacher_top_k_logps=teacher.top_k_logps[None],
            draws=torch.rand(1, tokens, device=device),
            outlier_loss=TrOPDConfig.outlier_loss,
        ).loss
        loss.mean().backward()

    results = {}
    for name, work in (("gkd", gkd), ("tropd", tropd)):
        results[name] = measured(work)
        hidden.grad = head.grad = None
    return results


def given_rollouts(batch: int, length: int, vocabulary: int) -> Callable[..., list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return lambda prompts, most=0: torch.randint(2, vocabulary, (len(prompts), length), generator=generator).tolist()


class GivenGKD(GKDTrainer):
    """GKD on rollouts that are given instead of generated."""

    def __init__(self, *args: Any, rollouts: Callable[..., list[list[int]]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollouts = rollouts

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # of the dataset, which has no completions here

    def generate_on_policy_outputs(self, model, inputs, generation_config):
        prompts = inputs["prompts"]
        completions = torch.tensor(self.rollouts(prompts), device=prompts.device)
        ids = torch.cat([prompts, completions], dim=1)
        labels = ids.clone()
        labels[:, : prompts.shape[1]] = -100
        return ids, torch.ones_like(ids), labels


def step_measurement(name: str, flags: argparse.Namespace, student: Any) -> tuple[list[float], float]:
    """One turn of a trainer: seconds of each step, and MiB above both models."""
    teacher = make_model(flags)
    settings: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        **checkpointing(GKDConfig, flags.gradient_checkpointing),
        "per_device_train_batch_size": flags.batch_size,
        "gradient_accumulation_steps": 2,
        "max_new_tokens": flags.length,
        "lmbda": 1.0,
        "temperature": 1.0,
        "max_steps": 1 + flags.steps,
        "learning_rate": 0.0,  # the same work in every turn
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 512,
    }
    vocabulary = student.config.vocab_size
    rollouts = given_rollouts(flags.batch_size, flags.length, vocabulary)
    dataset = Dataset.from_dict({"prompt": ["1+2="] * 1024})
    with tempfile.TemporaryDirectory() as output_dir:
        clock = Clock()
        shared: dict[str, Any] = {
            "data_collator": given_prompts,
            "train_dataset": dataset,
            "processing_class": character_tokenizer(),
            "callbacks": [clock],
        }
        if name == "gkd":
            args = GKDConfig(output_dir=output_dir, **settings)
            trainer: Any = GivenGKD(student, teacher, args, rollouts=rollouts, **shared)
        else:
            args = TrOPDConfig(output_dir=output_dir, **settings)
            trainer = TrOPDTrainer(student, teacher, args, **shared)
            trainer.sampler.from_student = lambda prompts, most: (rollouts(prompts), None)
        trainer.remove_callback(PrinterCallback)
        _, peak = measured(trainer.train)
    return clock.seconds, peak


def given_prompts(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A collator that both trainers understand."""
    prompts = torch.tensor([[2, 3, 4, 5]] * len(rows))
    masks = torch.ones_like(prompts)
    return {
        "prompts": prompts,
        "prompt_attention_mask": masks,
        "input_ids": prompts,
        "attention_mask": masks,
        "labels": -100 * masks,
    }


def report(what: str, seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> None:
    time_of, memory_of = ({n: statistics.median(v) for n, v in d.items()} for d in (seconds, memory))
    ratios = [f"{d['tropd'] / d['gkd']:.3f}" for d in (time_of, memory_of)]
    cells = [f"{time_of[n]:.2f}" for n in ("gkd", "tropd")] + [ratios[0]]
    cells += [f"{memory_of[n]:.0f}" for n in ("gkd", "tropd")] + [ratios[1]]
    print(f"| {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss_tokens", type=int, default=2048, help="of the loss alone")
    parser.add_argument("--loss_vocabulary", type=int, default=151_936)
    parser.add_argument("--loss_width", type=int, default=256, help="hidden size of both models")
    parser.add_argument("--hidden_size", type=int, default=256, help="of the random models of the step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    flags = parser.parse_args()
    flags.model_name_or_path = None

    PartialState(cpu=not torch.cuda.is_available())
    print("| what | GKD, s | TrOPD, s | ratio | GKD, MiB | TrOPD, MiB | ratio |\n|---|---|---|---|---|---|---|")
    for what in ("loss", "step"):
        seconds: dict[str, list[float]] = {"gkd": [], "tropd": []}
        memory: dict[str, list[float]] = {"gkd": [], "tropd": []}
        student = make_model(flags) if what == "step" else None
        for turn in range(flags.turns):
            if what == "loss":
                for name, (time_taken, peak) in loss_measurements(flags).items():
                    seconds[name].append(time_taken)
                    memory[name].append(peak)
                continue
            for name in seconds if turn % 2 == 0 else reversed(seconds):
                times, peak = step_measurement(name, flags, student)
                seconds[name] += times
                memory[name].append(peak)
        report(what, seconds, memory)


if __name__ == "__main__":
    ignore_deprecated_names()
    main()
