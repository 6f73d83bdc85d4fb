"""
Step time and peak memory of a trainer beside GRPO's, side by side in one run and in turn, as a ratio.

    accelerate launch benchmarks/step.py
    accelerate launch benchmarks/step.py --trainer rlad
    accelerate launch benchmarks/step.py --model_name_or_path Qwen/Qwen3-0.6B --batch_size 8 --length 1024

The rollouts are given (fixed random tokens), so that what is timed is the training side: scoring passes, loss,
backward, optimizer. Two settings, both with four mini-batches a rollout batch:

- `old`: the rollout has no log-probabilities, so that both trainers make a pass for the old policy's;
- `sampler`: the rollout has the sampler's, as vLLM's do. Ours needs no pass then, GRPO still makes it.

`rlad` is compared with the sum of GRPO and its teacher: the time of one forward pass of the teacher, measured beside
it, and the size of its weights. The teacher has the student's size.

Machines are noisy and so only ratios count: the trainers take turns, each turn is a fresh run of the same steps whose
first rollout batch warms up, and the reported ratio is that of the medians over all turns.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Qwen3Config,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the embedded task

from common.command_line import checkpointing
from common.console import ignore_deprecated_names
from embedded.arithmetic import character_tokenizer
from trl_ext import DRPOTrainer, RLADTrainer


TRAINERS = {"grpo": GRPOTrainer, "drpo": DRPOTrainer, "rlad": RLADTrainer}
MINI_BATCHES = 4


class Clock(TrainerCallback):
    """Seconds of each rollout batch (its scoring and all its updates) but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % MINI_BATCHES == 0:
            synchronize()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % MINI_BATCHES == 0:
            synchronize()
            self.seconds.append(time.perf_counter() - self.start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark of the resident set


def peak_memory() -> float:
    """MiB: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def make_model(flags: argparse.Namespace) -> PreTrainedModel:
    """The given model, or a random Qwen3 in which the layers, not the bookkeeping, take the time."""
    if flags.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(flags.model_name_or_path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=flags.vocabulary,
        hidden_size=flags.hidden_size,
        intermediate_size=3 * flags.hidden_size,
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.hidden_size // 64,
        num_key_value_heads=flags.hidden_size // 128,
        head_dim=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


def rollout_function(flags: argparse.Namespace, vocabulary: int, with_logps: bool):
    generator = torch.Generator().manual_seed(0)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list | None]:
        shape = (len(prompts), flags.length)
        tokens = torch.randint(2, vocabulary, shape, generator=generator)
        logps = -torch.rand(shape, generator=generator) - torch.log(torch.tensor(vocabulary))
        return {
            "prompt_ids": [[2] * 16 for _ in prompts],
            "completion_ids": tokens.tolist(),
            "logprobs": logps.tolist() if with_logps else None,
        }

    return rollout


def teacher_seconds(trainer: Any, teacher: PreTrainedModel, flags: argparse.Namespace) -> float:
    """One pass of the teacher over a rollout batch, in the trainer's micro-batches."""
    shape = (flags.batch_size * MINI_BATCHES, flags.length)
    tokens = torch.randint(2, 8, shape, device=trainer.accelerator.device)
    batch = {"prompt_ids": tokens[:, :16], "prompt_mask": torch.ones_like(tokens[:, :16])}
    batch |= {"completion_ids": tokens, "completion_mask": torch.ones_like(tokens)}
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            synchronize()
            start = time.perf_counter()
            RLADTrainer.score_completions(trainer, teacher, batch)
            synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds[-1]


def measure(
    name: str, flags: argparse.Namespace, model: PreTrainedModel, with_logps: bool
) -> tuple[list[float], float, float]:
    """One turn: seconds of each rollout batch after the first, peak memory in MiB, seconds of a teacher's pass."""
    reset_peak_memory()
    teacher = {"teacher_model": make_model(flags)} if name == "rlad" else {}
    vocabulary = model.config.get_text_config().vocab_size
    with tempfile.TemporaryDirectory() as output_dir:
        clock = Clock()
        trainer = TRAINERS[name](
            model=model,
            reward_funcs=lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))],
            args=GRPOConfig(
                output_dir=output_dir,
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                **checkpointing(GRPOConfig, flags.gradient_checkpointing),
                per_device_train_batch_size=flags.batch_size,
                num_generations=flags.batch_size,
                steps_per_generation=MINI_BATCHES,
                max_completion_length=flags.length,
                max_steps=MINI_BATCHES * (1 + flags.rollout_batches),
                learning_rate=0.0,  # the same work in every turn
                logging_steps=MINI_BATCHES,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["benchmark"] * 1024}),
            processing_class=AutoTokenizer.from_pretrained(flags.model_name_or_path)
            if flags.model_name_or_path
            else character_tokenizer(),
            rollout_func=rollout_function(flags, vocabulary, with_logps),
            callbacks=[clock],
            **teacher,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    peak = peak_memory()
    return clock.seconds[1:], peak, teacher_seconds(trainer, trainer.teacher.model, flags) if teacher else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="drpo", choices=TRAINERS, help="what is compared with GRPO")
    parser.add_argument("--model_name_or_path", help="a model instead of a random Qwen3")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=4, help="completions a mini-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens a completion")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--rollout_batches", type=int, default=2, help="timed rollout batches a turn")
    parser.add_argument("--turns", type=int, default=4)
    flags = parser.parse_args()

    PartialState(cpu=not torch.cuda.is_available())
    model = make_model(flags)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.0f}M parameters, mini-batches of {flags.batch_size} x {flags.length} tokens")
    sum_of = "GRPO + teacher" if flags.trainer == "rlad" else "GRPO"
    teacher_size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    header = f"{sum_of}, s | {flags.trainer}, s | ratio | {sum_of}, MiB | {flags.trainer}, MiB | ratio"
    print(f"| log-probabilities | {header} |\n|---|---|---|---|---|---|---|")
    for setting in ("old", "sampler"):
        seconds: dict[str, list[float]] = {"grpo": [], flags.trainer: []}
        memory: dict[str, list[float]] = {"grpo": [], flags.trainer: []}
        teacher_passes: list[float] = [0.0]
        for turn in range(flags.turns):
            for name in seconds if turn % 2 == 0 else reversed(seconds):
                times, peak, teacher_pass = measure(name, flags, model, with_logps=setting == "sampler")
                seconds[name] += times
                memory[name].append(peak)
                if name == "rlad":
                    teacher_passes = [*filter(None, teacher_passes), teacher_pass]
        time_of, memory_of = ({n: statistics.median(v) for n, v in d.items()} for d in (seconds, memory))
        if flags.trainer == "rlad":
            time_of["grpo"] += statistics.median(teacher_passes)
            memory_of["grpo"] += teacher_size
        cells = [f"{d[n]:.{digits}f}" for d, digits in ((time_of, 2), (memory_of, 0)) for n in seconds]
        ratios = [f"{d[flags.trainer] / d['grpo']:.3f}" for d in (time_of, memory_of)]
        print(f"| {setting} | {' | '.join([*cells[:2], ratios[0], *cells[2:], ratios[1]])} |", flush=True)


if __name__ == "__main__":
    ignore_deprecated_names()
    main()
