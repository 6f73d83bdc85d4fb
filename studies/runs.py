"""What a run is, where its result goes, and how many may run at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
UNSCORED = ", unscored"  # suffix of a sampler's name: it keeps its log-probabilities to itself


@dataclass(frozen=True)
class Stage:
    """One trainer with its settings; the others have the defaults of `trainers.METHODS` for the task."""

    method: str  # a key of `trainers.METHODS`
    settings: dict[str, Any] = field(default_factory=dict)  # of the trainer's config class
    sampler: str | None = None  # a key of `low_precision.SAMPLERS`: what samples the rollouts; None: the policy itself


@dataclass(frozen=True)
class Run:
    """
    One training run. Two runs are the same if everything but `group` is equal; then only one of them is made.

    Several stages follow each other, each from the policy that the last one left.
    """

    stages: tuple[Stage, ...]
    seed: int = 0
    task: str = "sums"  # a key of `tasks.TASKS`
    policy: str = "pupil"  # among the task's policies: what is trained
    teacher: str | None = None  # likewise
    curve_every: int | None = None  # updates between two measurements during the training
    final: bool = True  # measured on the test problems too; False in a search for settings
    group: str = ""  # for tables: which question of the study it belongs to
    # Which copy of the policies it starts from. They are taught on the spot, and come out differently on another
    # processor: a study that is continued elsewhere names a new copy, and makes anew what it compares with
    copy: str = ""

    @property
    def key(self) -> str:
        return identity({**asdict(self), "stages": [asdict(stage) for stage in self.stages]})


def run(method: str, settings: dict[str, Any] | None = None, *, sampler: str | None = None, **others: Any) -> Run:
    """A run of one stage."""
    return Run((Stage(method, settings or {}, sampler),), **others)


def identity(description: dict[str, Any], ignored: Sequence[str] = ("group",)) -> str:
    """The same for the same run, also after a round trip through JSON."""
    kept = {k: v for k, v in description.items() if k not in ignored and (k, v) != ("copy", "")}
    return json.dumps(kept, sort_keys=True)


def load_results(study: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The lines of a study's file; each has the run's description as `run`."""
    path = folder / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def finished(study: str, folder: Path = RESULTS) -> set[str]:
    """Of the results there are. One on the test problems has the validation problems too: it is both runs' result."""
    runs = [result["run"] for result in load_results(study, folder)]
    return {identity(run) for run in runs} | {identity({**run, "final": False}) for run in runs}


def check_copy(study: str, run: Run, weights: str, folder: Path = RESULTS) -> None:
    """Raises a `ValueError` where other results of the same `copy` began with other weights."""
    for result in load_results(study, folder):
        other = result["run"]
        same = all(other.get(name, "") == getattr(run, name) for name in ("task", "policy", "copy"))
        if same and result.get("weights", weights) != weights:
            raise ValueError(
                f"The {run.policy!r} of {run.task!r} has other weights than in the results with copy={run.copy!r}: it "
                "comes out differently on another processor. Name a new copy, in which the runs to compare with are "
                "made again."
            )


def append_result(study: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """Adds a line, whole or not at all where several processes write to the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{study}.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def commit() -> str:
    """Of the code that runs, with `+` where files have been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    short = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    touched = [line for line in changed.stdout.splitlines() if not line.endswith(".jsonl")]
    return short.stdout.strip() + "+" * bool(touched)


@contextmanager
def slot(number: int) -> Iterator[None]:
    """Waits until fewer than `number` processes of this machine, of any study, hold a slot."""
    paths = [Path(tempfile.gettempdir(), f"trl_ext_study_slot_{index}") for index in range(number)]
    with ExitStack() as stack:  # closing a file unlocks it
        files = [stack.enter_context(open(path, "w")) for path in paths]
        while not any(_try_lock(file) for file in files):
            time.sleep(random.uniform(0.3, 0.7))
        yield
    time.sleep(2)  # so that a process that waits gets the slot first


@contextmanager
def claimed(study: str, run: Run) -> Iterator[bool]:
    """Whether the run is ours: False if another process is making it."""
    name = hashlib.sha256(f"{study} {run.key}".encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir(), f"trl_ext_study_{name}.lock"), "w") as file:
        yield _try_lock(file)


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def with_seeds(runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    """Seed by seed, so that every run has been made once before the first is repeated."""
    runs = list(runs)
    return [Run(**{**vars(run), "seed": seed}) for seed in seeds for run in runs]
