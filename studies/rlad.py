"""
RLAD and what its formula suggests, beside GRPO, KDRL and the ways to distil without a reward or before it.

Every run takes 2,048 rollouts in 16 sampling phases and 64 updates, from the same student.
"""

from typing import Any

from studies import tables
from studies.runs import Run, Stage, run, with_seeds


Variant = tuple[str, dict[str, Any]]


# As in examples/rlad_logic.py: each rollout batch of 128 completions makes 4 updates
BUDGET: dict[str, Any] = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 64}

PAPER = {"distillation": "trrd"}
BOTH = {"distillation": "trrd_and_kdrl", "kdrl_coef": 2e-2}
GROWING_ALPHA = {"teacher_mixture_alpha_end": 1.0}

VARIANTS: dict[str, Variant] = {
    "GRPO": ("grpo", {}),
    "KDRL": ("rlad", {"distillation": "kdrl", "kdrl_coef": 2e-2}),
    "KDRL, `kdrl_coef` 0.1": ("rlad", {"distillation": "kdrl", "kdrl_coef": 1e-1}),
    "RLAD, the paper's TRRD": ("rlad", PAPER),
    "TRRD, `teacher_mixture_alpha` 0.8": ("rlad", {**PAPER, "teacher_mixture_alpha": 0.8}),
    "TRRD, alpha grows to 1": ("rlad", {**PAPER, **GROWING_ALPHA}),
    'TRRD, `trust_region="drpo"`': ("rlad", {**PAPER, "trust_region": "drpo"}),
    "TRRD and KDRL, alpha grows to 1": ("rlad", {**BOTH, **GROWING_ALPHA}),
    "TRRD and KDRL, alpha grows to 1, `kdrl_coef` 0.1": ("rlad", {**BOTH, "kdrl_coef": 1e-1, **GROWING_ALPHA}),
}
# Not ahead on sums, and not tried on puzzles
ON_SUMS_ALONE: dict[str, Variant] = {
    "TRRD and KDRL": ("rlad", BOTH),
    'TRRD and KDRL, `trust_region="drpo"`': ("rlad", {**BOTH, "trust_region": "drpo"}),
    'TRRD, `trust_region="drpo"`, radius 0.05': (
        "rlad",
        {**PAPER, "trust_region": "drpo", "trust_region_radius": 0.05},
    ),
}
# Settings of commit af7a1bf that are gone
REMOVED: dict[str, Variant] = {
    "TRRD that vetoes and does not reweigh": ("rlad", {**PAPER, "teacher_reweighs": False}),
    'the same, `trust_region="drpo"`': ("rlad", {**PAPER, "trust_region": "drpo", "teacher_reweighs": False}),
    "the same, and KDRL": ("rlad", {**BOTH, "teacher_reweighs": False}),
    "TRRD whose clamp passes the gradient": ("rlad", {**PAPER, "teacher_clip_passes_gradient": True}),
}
TASKS = ("sums", "puzzles")


def rl(method: str, settings: dict[str, Any], **others: Any) -> Run:
    teacher = None if method == "grpo" else others.pop("teacher", "teacher")
    others.pop("teacher", None)
    return run(method, {**BUDGET, **settings}, teacher=teacher, **others)


def without_reward(**others: Any) -> list[Run]:
    """On-policy distillation alone; fine-tuning on the teacher's samples, alone and followed by GRPO."""
    opd = Stage("tropd", {"objective": "opd", "per_device_train_batch_size": 32, "max_steps": 64})
    samples = {"teacher_samples": 2048, "learning_rate": 5e-4}
    fine_tuning, half = Stage("sft", {**samples, "max_steps": 64}), Stage("sft", {**samples, "max_steps": 32})
    stages = [(opd,), (fine_tuning,), (half, Stage("grpo", {**BUDGET, "max_steps": 32}))]
    return [Run(stages=each, teacher="teacher", **others) for each in stages]


def wide(variants: dict[str, Variant], task: str) -> dict[str, Run]:
    return {name: rl(*variant, task=task, seed=42, group="wide", final=False) for name, variant in variants.items()}


# What is chosen is chosen on the validation problems, from one seed, and reported with others on the test problems
FINALISTS = ("TRRD and KDRL, alpha grows to 1", "KDRL", "GRPO", "RLAD, the paper's TRRD", "TRRD, alpha grows to 1")
RATES = {"sums": (2.5e-5, 5e-5, 1e-4), "puzzles": (5e-5, 1e-4, 2e-4)}


def at_rate(name: str, rate: float, **others: Any) -> Run:
    """A variant with this learning rate; 5e-5 is that of all others, and goes without saying."""
    method, settings = VARIANTS[name]
    return rl(method, settings if rate == 5e-5 else {**settings, "learning_rate": rate}, **others)


SEARCH_OF_RATES = [
    at_rate(name, rate, task=task, seed=42, group="learning rate", final=False)
    for task, rates in RATES.items()
    for rate in rates
    for name in FINALISTS
]
FINAL = with_seeds(
    [rl(*VARIANTS[name], task=task, group="final") for name in FINALISTS for task in TASKS], (43, 44, 45)
)
TEACHERS = [
    rl(*VARIANTS[name], task=task, teacher=teacher, seed=43, group="teachers")
    for teacher in ("worse", "equal")
    for task in TASKS
    for name in FINALISTS[:2]
]
WITHOUT_REWARD = [made for task in TASKS for made in without_reward(task=task, seed=43, group="without reward")]

RUNS = [
    *(run for task in TASKS for run in wide(VARIANTS, task).values()),
    *wide(ON_SUMS_ALONE, "sums").values(),
    *SEARCH_OF_RATES,
    *FINAL,
    *TEACHERS,
    *WITHOUT_REWARD,
]


def searched() -> str:
    """Accuracy of each variant on the validation problems of both tasks, one seed."""
    lines = []
    for name in (*VARIANTS, *ON_SUMS_ALONE, *REMOVED):
        cells = []
        for task in TASKS:
            made = wide({**VARIANTS, **ON_SUMS_ALONE, **REMOVED}, task)[name]
            found = tables.summary("rlad", made, "validation")
            one = [r for r in found.results if r["run"]["seed"] == 42] if found else []
            cells.append(f"{one[0]['validation']['accuracy']:.3f}" if one else "")
        lines.append([name, *cells])
    return tables.markdown_table(["method", *TASKS], lines)


def finalists(task: str) -> str:
    """What was measured on the test problems of a task: variants, and the ways to distil without a reward."""
    rows = {name: rl(*variant, task=task) for name, variant in VARIANTS.items()}
    names = ("on-policy distillation alone", "fine-tuning on the teacher's samples", "half of that, then GRPO")
    rows |= dict(zip(names, without_reward(task=task), strict=True))
    for teacher in ("equal", "worse"):
        rows |= {
            f"{name}, {teacher} teacher": rl(*VARIANTS[name], task=task, teacher=teacher) for name in FINALISTS[:2]
        }
    return tables.table("rlad", rows, measures=("accuracy", "accuracy_greedy", "kl_to_base"), first="method")


TABLES = {
    "searched": searched,
    "sums": lambda: finalists("sums"),
    "puzzles": lambda: finalists("puzzles"),
}
