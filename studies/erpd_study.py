"""
What ERPD's stages do, on the embedded task: a study that decides the defaults.

    python studies/erpd_study.py

Two questions. **Degradation**: stage 1 with a growing number of passes over the set, and what stage 2 makes of it.
**Signals**: every extraction loss with every signal, and two teachers together. Each from several seeds, which sample
the set and shuffle it. Tables and a picture of the mean and the spread go to the output directory, with the measures
of all runs. Finished runs found there are not repeated: start it again after an interruption, or with more seeds.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging
from trl import TrlParser


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the embedded task

from erpd_math import EMBEDDED_DEFAULTS

from common.erpd_report import measured_policies
from common.report import NO_MATPLOTLIB, load_pyplot, markdown_table
from embedded.arithmetic import as_dataset, right_answer, split_problems
from embedded.arithmetic_policy import prepare_policy
from trl_ext import ERPDConfig, ERPDTrainer


PASSES = 4  # of stage 1, where the signals are compared
SIGNALS = ("teacher", "unlearned_reference", "unlearned_teacher")


@dataclass
class StudyArguments:
    losses: list[str] = field(
        default_factory=lambda: ["sapo", "ce", "mse"],
        metadata={"help": "Extraction losses; `ce+mse` for two teachers."},
    )
    passes: list[int] = field(default_factory=lambda: [2, 4, 16], metadata={"help": "Passes of stage 1: degradation."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each."})
    questions: list[str] = field(
        default_factory=lambda: ["degradation", "signals"], metadata={"help": "Which of the two are run."}
    )
    jobs: int = field(default=2, metadata={"help": "Runs at a time, each in one thread."})
    output_dir: str = field(default="erpd_study", metadata={"help": "For the results."})
    smoke: bool = field(default=False, metadata={"help": "Three tiny runs, to see that everything works."})


@dataclass(frozen=True)
class Setting:
    """One run."""

    losses: str
    signal: str
    passes: int
    seed: int
    prompts: int = 64
    num_held_out: int = 500

    @property
    def file_name(self) -> str:
        return "_".join(map(str, asdict(self).values())) + ".json"


def train(setting: Setting, policy: str, output_dir: str) -> dict[str, Any]:
    """Trains and measures; the result is also written, whole or not at all, to `output_dir`."""
    logging.disable_progress_bar()  # of loading the policy: there is one over the runs
    settings: dict[str, Any] = {
        **EMBEDDED_DEFAULTS,
        "output_dir": output_dir,
        "extraction_loss": setting.losses.split("+"),
        "signal": setting.signal,
        "extraction_passes": setting.passes,
        "prompts_per_round": setting.prompts,
        "seed": setting.seed,
        "per_device_eval_batch_size": 500,
        "num_generations_eval": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "keep_teachers": False,
        "gradient_checkpointing": False,
    }
    problems = split_problems()
    trainer = ERPDTrainer(
        model=policy,
        reward_funcs=right_answer,
        args=ERPDConfig(**settings),
        train_dataset=as_dataset(problems.train),
        eval_dataset=as_dataset(problems.held_out[: setting.num_held_out]),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    policies = {prefix: values for _, _, prefix, values in measured_policies(trainer.state.log_history)}
    result = {**asdict(setting), "policies": policies, "seconds": round(time.perf_counter() - start, 1)}
    path = Path(output_dir, setting.file_name)
    path.with_suffix(".unfinished").write_text(json.dumps(result))
    os.replace(path.with_suffix(".unfinished"), path)
    return result


def run_all(settings: Sequence[Setting], policy: str, args: StudyArguments) -> dict[Setting, dict[str, Any]]:
    """The results of `settings`; those found in the output directory are not run again."""
    paths = {setting: Path(args.output_dir, setting.file_name) for setting in settings}
    missing = [setting for setting, path in paths.items() if not path.is_file()]
    # A process a run, with one thread: two such runs share two cores better than one run with two threads
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        runs = [pool.submit(train, setting, policy, args.output_dir) for setting in missing]
        for run in tqdm(as_completed(runs), total=len(runs), desc=f"{len(paths) - len(runs)} runs found, runs to do"):
            run.result()
    return {setting: json.loads(path.read_text()) for setting, path in paths.items()}


def degradation(args: StudyArguments) -> list[tuple[str, str, int]]:
    """(losses, signal, passes): the plain signal by the number of passes, an unlearned reference after the most."""
    cases = [(losses, "teacher", passes) for losses in args.losses for passes in args.passes]
    return [*cases, (args.losses[0], "unlearned_reference", max(args.passes))]


def signals(args: StudyArguments) -> list[tuple[str, str, int]]:
    """(losses, signal, passes): every loss with every signal, and all teachers of the losses together."""
    return [*itertools.product(args.losses, SIGNALS, [PASSES]), ("+".join(args.losses), "teacher", PASSES)]


QUESTIONS: dict[str, Callable[[StudyArguments], list[tuple[str, str, int]]]] = {
    "degradation": degradation,
    "signals": signals,
}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the least and the greatest."""
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.fmean, min, max))
    return f"{mean} ({low} to {high})"


def table(question: str, results: dict[Setting, dict[str, Any]], args: StudyArguments) -> str:
    """A line a case: accuracy, divergence and entropy of the extreme region policy, then of the distilled one."""
    header = ["extraction loss", "signal", "passes"]
    header += [f"{who}, {what}" for who in ("pi_E", "distilled") for what in ("accuracy", "KL a sequence", "entropy")]
    rows = []
    for losses, signal, passes in QUESTIONS[question](args):
        runs = [
            r["policies"] for s, r in results.items() if (s.losses, s.signal, s.passes) == (losses, signal, passes)
        ]
        row: list[Any] = [losses, signal, passes]
        for policy in (f"teacher_{losses}", "distilled"):
            for measure, digits in (("reward", 3), ("kl_per_sequence", 2), ("entropy", 3)):
                values = [run[policy][measure] for run in runs if policy in run]
                row.append(spread(values, digits) if values else "")
        rows.append(row)
    base = [r["policies"]["base"] for r in results.values()]
    footer = (
        f"Base policy: accuracy {spread([b['reward'] for b in base])}, entropy {spread([b['entropy'] for b in base])}"
    )
    return f"{markdown_table(header, rows)}\n\n{footer}"


def draw(results: dict[Setting, dict[str, Any]], args: StudyArguments, path: Path) -> str:
    """Accuracy of the extreme region policy and of the distilled one over the passes of stage 1."""
    plt = load_pyplot()
    if plt is None:
        return NO_MATPLOTLIB
    figure, axes = plt.subplots(
        1, len(args.losses), figsize=(5 * len(args.losses), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, losses in zip(axes[0], args.losses, strict=True):
        for policy, colour in ((f"teacher_{losses}", "C1"), ("distilled", "C2")):
            for signal, style in (("teacher", "o-"), ("unlearned_reference", "s--")):
                cases = [s for s in results if (s.losses, s.signal) == (losses, signal) and s.passes in args.passes]
                values = {
                    n: [results[s]["policies"][policy]["reward"] for s in cases if s.passes == n]
                    for n in sorted({s.passes for s in cases})
                }
                if values and (policy == "distilled" or signal == "teacher"):
                    axis.plot(list(values), [statistics.fmean(v) for v in values.values()], style, color=colour,
                              label=f"{policy.split('_')[0]}, {signal}")  # fmt: skip
                    for n, of_n in values.items():
                        axis.plot([n] * len(of_n), of_n, ".", color=colour, alpha=0.5)
        axis.axhline(statistics.fmean(r["policies"]["base"]["reward"] for r in results.values()), color="0.6")
        axis.set(title=losses, xlabel="passes of stage 1", xscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out accuracy (grey: base policy)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"


def main(args: StudyArguments) -> None:
    size: dict[str, Any] = {}
    if args.smoke:
        args.losses, args.passes, args.seeds, args.questions = ["ce"], [1, 2], [0], ["degradation"]
        size = {"prompts": 16, "num_held_out": 20}  # one update a pass
    cases = dict.fromkeys(case for question in args.questions for case in QUESTIONS[question](args))
    settings = [
        Setting(losses, signal, passes, seed, **size)
        for seed, (losses, signal, passes) in itertools.product(args.seeds, cases)
    ]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = run_all(settings, prepare_policy(), args)
    for question in args.questions:
        text = table(question, results, args)
        (output_dir / f"{question}.md").write_text(text + "\n")
        print(f"\n{question}\n\n{text}")
    if "degradation" in args.questions:
        print(draw(results, args, output_dir / "degradation.png"))


if __name__ == "__main__":
    main(*TrlParser(StudyArguments).parse_args_and_config())
