"""
How large should DRPO's trust region be? A study over staleness, on the embedded task, that decides the default.

    python studies/drpo_radius_study.py

Every trust region and radius, and GRPO's clipping as the baseline, trains the same policy on the same number of
rollout batches, with few and with many updates a batch, from several seeds. The accuracy on held-out problems is
printed as a table, drawn, and written with the curves of all runs to the output directory. Finished runs found there
are not repeated: start it again after an interruption, or with more seeds.
"""

import csv
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, TrlParser


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the embedded task

from common.report import NO_MATPLOTLIB, load_pyplot, markdown_table
from embedded.arithmetic import TOKENS_PER_DIGIT, as_dataset, held_out_accuracy, right_answer, split_problems
from embedded.arithmetic_policy import prepare_policy
from trl_ext import DRPOConfig, DRPOTrainer


@dataclass
class StudyArguments:
    variants: list[str] = field(
        default_factory=lambda: [
            *("drpo:0.05", "drpo:0.15", "drpo:0.5", "drpo:12.5"),
            *("spo:0.2", "dppo_tv:0.15", "dppo_kl:0.05", "grpo:0.2"),
        ],
        metadata={"help": "Each a trust region of DRPOConfig and its radius, or 'grpo' and its epsilon."},
    )
    updates_per_rollout: list[int] = field(
        default_factory=lambda: [2, 8], metadata={"help": "Passes over each rollout batch (`num_iterations`)."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the training, one run each."})
    rollout_batches: int = field(default=16, metadata={"help": "Rollout batches a run, of 256 completions each."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of AdamW, constant."})
    jobs: int = field(default=2, metadata={"help": "Runs at a time, each in one thread."})
    output_dir: str = field(default="drpo_radius_study", metadata={"help": "For the results."})
    smoke: bool = field(
        default=False, metadata={"help": "Two short runs, with few problems, to see that everything works."}
    )


@dataclass(frozen=True)
class Setting:
    """One run."""

    variant: str
    updates_per_rollout: int
    seed: int
    rollout_batches: int
    learning_rate: float
    completions: int = 256
    num_held_out: int = 1000

    @property
    def file_name(self) -> str:
        return "_".join(f"{value}".replace(":", "-") for value in asdict(self).values()) + ".json"


def train(setting: Setting, policy: str, output_dir: str) -> dict[str, Any]:
    """Trains and evaluates; the result is also written, whole or not at all, to `output_dir`."""
    logging.disable_progress_bar()  # of loading the policy: there is one over the runs
    name, radius = setting.variant.split(":")
    region: dict[str, Any] = {"trust_region": name, "trust_region_radius": float(radius)}
    config_class, trainer_class = (GRPOConfig, GRPOTrainer) if name == "grpo" else (DRPOConfig, DRPOTrainer)
    args = config_class(
        output_dir=output_dir,
        **({"epsilon": float(radius)} if name == "grpo" else region),
        num_iterations=setting.updates_per_rollout,
        max_steps=setting.rollout_batches * setting.updates_per_rollout,
        per_device_train_batch_size=setting.completions,
        num_generations=8,
        max_completion_length=2 * TOKENS_PER_DIGIT,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        loss_type="dr_grpo",
        scale_rewards="none",
        seed=setting.seed,
        logging_steps=setting.updates_per_rollout,  # a log a rollout batch
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    problems = split_problems()
    trainer = trainer_class(
        model=policy, reward_funcs=right_answer, args=args, train_dataset=as_dataset(problems.train)
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    result = {
        **asdict(setting),
        **held_out_accuracy(trainer, problems.held_out[: setting.num_held_out]),
        "seconds": round(time.perf_counter() - start, 1),
        "log_history": trainer.state.log_history,
    }
    path = Path(output_dir, setting.file_name)
    path.with_suffix(".unfinished").write_text(json.dumps(result))
    os.replace(path.with_suffix(".unfinished"), path)
    return result


def run_all(settings: list[Setting], policy: str, args: StudyArguments) -> list[dict[str, Any]]:
    """The results of `settings`, in their order; those found in the output directory are not run again."""
    paths = [Path(args.output_dir, setting.file_name) for setting in settings]
    missing = [setting for setting, path in zip(settings, paths, strict=True) if not path.is_file()]
    # A process a run, with one thread: two such runs share two cores better than one run with two threads
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        runs = [pool.submit(train, setting, policy, args.output_dir) for setting in missing]
        for run in tqdm(as_completed(runs), total=len(runs), desc=f"{len(paths) - len(runs)} runs found, runs to do"):
            run.result()
    return [json.loads(path.read_text()) for path in paths]


def table(results: list[dict[str, Any]], args: StudyArguments) -> str:
    """Mean over the seeds, with the least and the greatest."""
    header = ["trust region", "radius"]
    header += [f"{kind}, {n} updates" for n in args.updates_per_rollout for kind in ("sampled", "greedy")]
    rows = []
    for variant in args.variants:
        row = variant.split(":")
        for n, kind in itertools.product(args.updates_per_rollout, ("sampled", "greedy")):
            values = select(results, variant, n, f"accuracy, {kind}")
            row.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append(row)
    return markdown_table(header, rows)


def select(results: list[dict[str, Any]], variant: str, updates: int, key: str) -> list[Any]:
    return [r[key] for r in results if r["variant"] == variant and r["updates_per_rollout"] == updates]


def draw(results: list[dict[str, Any]], args: StudyArguments, path: Path) -> str:
    """A row for each number of updates: final accuracy of every run, and the reward over the rollout batches."""
    plt = load_pyplot()
    if plt is None:
        return NO_MATPLOTLIB
    rows = len(args.updates_per_rollout)
    figure, axes = plt.subplots(rows, 2, figsize=(12, 4 * rows), squeeze=False, layout="constrained")
    for (dots, curves), updates in zip(axes, args.updates_per_rollout, strict=True):
        for index, variant in enumerate(args.variants):
            values = select(results, variant, updates, "accuracy, sampled")
            dots.plot([statistics.mean(values)], [index], "|", color=f"C{index}", markersize=16)
            dots.plot(values, [index] * len(values), ".", color=f"C{index}")
            histories = select(results, variant, updates, "log_history")
            rewards = [[log["reward"] for log in history if "reward" in log] for history in histories]
            curves.plot(
                [statistics.mean(batch) for batch in zip(*rewards, strict=True)], color=f"C{index}", label=variant
            )
        dots.set_yticks(range(len(args.variants)), args.variants)
        dots.invert_yaxis()
        dots.set_title(f"{updates} updates a rollout batch: held-out accuracy, sampled (|: mean)", fontsize=10)
        curves.set_title("reward over the rollout batches, mean over the seeds", fontsize=10)
        curves.legend(fontsize=8)
        dots.grid(alpha=0.3)
        curves.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"


def main(args: StudyArguments) -> None:
    shortened: dict[str, int] = {}
    if args.smoke:
        args.variants, args.updates_per_rollout, args.seeds = ["drpo:0.15", "grpo:0.2"], [2], [0]
        args.rollout_batches, shortened = 2, {"completions": 16, "num_held_out": 20}
    settings = [
        Setting(variant, updates, seed, args.rollout_batches, args.learning_rate, **shortened)
        for seed, updates, variant in itertools.product(args.seeds, args.updates_per_rollout, args.variants)
    ]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = run_all(settings, prepare_policy(), args)

    columns = [key for key in results[0] if key != "log_history"]
    with open(output_dir / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)
    (output_dir / "table.md").write_text(table(results, args) + "\n")
    print(table(results, args))
    print(draw(results, args, output_dir / "accuracy.png"))
    print(f"All runs: {output_dir / 'runs.csv'}")


if __name__ == "__main__":
    main(*TrlParser(StudyArguments).parse_args_and_config())
