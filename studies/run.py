"""
Makes the runs of studies whose results are missing, one after the other.

    python -m studies.run erpd drpo
    python -m studies.run erpd --group wide --jobs 2

A run takes one thread. Started twice, or with `--jobs 2`, two processes share the work; however many are started, no
more than `--slots` of a machine's study processes train at a time. A run that was stopped starts over the next time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studies.runs import RESULTS, Run, append_result, check_copy, claimed, commit, finished, slot


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", help="Modules of this folder with a list RUNS.")
    parser.add_argument("--group", nargs="*", help="Only these groups of runs.")
    parser.add_argument("--seed", type=int, nargs="*", help="Only these seeds.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes to start.")
    parser.add_argument("--slots", type=int, default=2, help="How many runs the machine may do at a time.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the results.")
    parser.add_argument("--problems", type=int, help="Measure on this many problems only, for a quick look.")
    parser.add_argument("--list", action="store_true", help="Only say which runs are missing.")
    return parser.parse_args(arguments)


def missing_runs(study: str, flags: argparse.Namespace) -> list[Run]:
    done = finished(study, flags.results)
    runs = {run.key: run for run in importlib.import_module(f"studies.{study}").RUNS if is_wanted(run, flags)}
    return [run for key, run in runs.items() if key not in done]


def is_wanted(run: Run, flags: argparse.Namespace) -> bool:
    return (not flags.group or run.group in flags.group) and (flags.seed is None or run.seed in flags.seed)


def execute(study: str, run: Run, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures: the result's line."""
    from studies.execution import train_and_measure, weights_of_policy  # import torch and TRL: --list needs neither

    weights = weights_of_policy(run)
    check_copy(study, run, weights, flags.results)
    return {"run": asdict(run), "commit": commit(), "weights": weights, **train_and_measure(run, flags.problems)}


def work(flags: argparse.Namespace) -> int:
    """The missing runs, one after the other; returns how many failed."""
    failures = 0
    for study in flags.studies:
        tried: set[str] = set()
        # Read again after each run, because other processes work on the same list
        while runs := [r for r in missing_runs(study, flags) if r.key not in tried]:
            run = runs[0]
            tried.add(run.key)
            with claimed(study, run) as is_ours:
                if not is_ours or run.key in finished(study, flags.results):
                    continue
                with slot(flags.slots):
                    start = time.strftime("%H:%M:%S")
                    try:
                        result = execute(study, run, flags)
                    except Exception:
                        failures += 1
                        print(f"{start} {study} FAILED {describe(run)}\n{traceback.format_exc()}", flush=True)
                        continue
                    append_result(study, result, flags.results)
                    print(f"{start} {study} {describe(run)}\n    {summary(result)}", flush=True)
    return failures


def describe(run: Run) -> str:
    stages = " then ".join(
        " ".join([s.method, *(f"{k}={v}" for k, v in s.settings.items()), *([s.sampler] if s.sampler else [])])
        for s in run.stages
    )
    pair = " ".join(filter(None, [run.task, run.policy, run.teacher and f"teacher={run.teacher}"]))
    return f"[{run.group}] {pair} {stages} seed={run.seed}{run.copy and f' copy={run.copy}'}"


def summary(result: dict[str, Any]) -> str:
    measures = " ".join(f"{name} {value:.3f}" for name, value in result["validation"].items())
    return f"{measures} | {result['rollouts']} rollouts, {result['updates']} updates, {result['seconds']} s"


def main() -> None:
    flags = parse_flags()
    if flags.list:
        for study in flags.studies:
            for run in missing_runs(study, flags):
                print(study, describe(run))
        return
    # One thread: two such runs share two cores better than one run with two threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if flags.jobs > 1:
        command = [sys.executable, "-m", "studies.run", *sys.argv[1:], "--jobs", "1"]
        processes = [subprocess.Popen(command) for _ in range(flags.jobs)]
        sys.exit(max(process.wait() for process in processes))
    os.nice(5)
    sys.exit(min(work(flags), 1))


if __name__ == "__main__":
    main()
