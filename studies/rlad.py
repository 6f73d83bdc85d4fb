"""
RLAD and what its formula suggests, beside GRPO, KDRL and the ways to distil without a reward or before it.

Every run takes 2,048 rollouts in 16 sampling phases and 64 updates, from the same student.
"""

from typing import Any

from studies import tables
from studies.pictures import dots, dots_by_group
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
    "RLAD, constant alpha (the paper's)": ("rlad", PAPER),
    "TRRD, `teacher_mixture_alpha` 0.8": ("rlad", {**PAPER, "teacher_mixture_alpha": 0.8}),
    "RLAD, alpha grows to 1 (default)": ("rlad", {**PAPER, **GROWING_ALPHA}),
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


def wide(variants: dict[str, Variant], task: str) -> dict[str, Run]:
    return {name: rl(*variant, task=task, seed=42, group="wide", final=False) for name, variant in variants.items()}


# Settings are chosen on the validation problems, from seed 42, and reported with others on the test problems
SEARCHED = (
    "RLAD, alpha grows to 1 (default)",
    "RLAD, constant alpha (the paper's)",
    "TRRD and KDRL, alpha grows to 1",
    "KDRL",
    "GRPO",
)
# The combination, and KDRL alone, with other coefficients: compared with the seeds below on both tasks
COMBINED: dict[str, Variant] = {
    f"TRRD and KDRL, alpha grows to 1, `kdrl_coef` {coef:g}": ("rlad", {**BOTH, **GROWING_ALPHA, "kdrl_coef": coef})
    for coef in (2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
}
COEFFICIENTS = COMBINED | {
    f"KDRL, `kdrl_coef` {coef:g}": ("rlad", {"distillation": "kdrl", "kdrl_coef": coef}) for coef in (2e-3, 5e-3, 2e-2)
}
SEEDS_OF_COEFFICIENTS = (43, 44, 45)
FINALISTS = ("TRRD and KDRL, alpha grows to 1, `kdrl_coef` 0.005", *SEARCHED)
RATES = {"sums": (2.5e-5, 5e-5, 1e-4), "puzzles": (5e-5, 1e-4, 2e-4)}
BEST_RATE = {"sums": 5e-5, "puzzles": 1e-4}  # of these, for every method; GRPO's two on sums do not differ


def rate(value: float) -> dict[str, float]:
    """As a setting; 5e-5 is that of all runs without one."""
    return {} if value == 5e-5 else {"learning_rate": value}


def at_rate(name: str, value: float, **others: Any) -> Run:
    method, settings = {**VARIANTS, **COEFFICIENTS}[name]
    return rl(method, {**settings, **rate(value)}, **others)


def distillation(learning_rate: float) -> Stage:
    settings = {"objective": "opd", "per_device_train_batch_size": 32, "max_steps": 64}
    return Stage("tropd", {**settings, **rate(learning_rate)})


def fine_tuning(learning_rate: float, updates: int = 64) -> Stage:
    return Stage("sft", {"teacher_samples": 2048, "learning_rate": learning_rate, "max_steps": updates})


# Looked for on the validation problems, with seed 42
ALONE = {"on-policy distillation alone": distillation, "fine-tuning on the teacher's samples": fine_tuning}
RATES_ALONE = {
    "on-policy distillation alone": (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4),
    "fine-tuning on the teacher's samples": (2.5e-4, 5e-4, 1e-3, 2e-3),
}


def alone(name: str, value: float, task: str, **others: Any) -> Run:
    return Run((ALONE[name](value),), task=task, teacher="teacher", copy="second", **others)


SEARCH_ALONE = [
    alone(name, value, task, seed=42, group="learning rate", final=False)
    for task in TASKS
    for name, values in RATES_ALONE.items()
    for value in values
]


# Of on-policy distillation and of fine-tuning: the best of the above, and those of the first base policy
BEST_ALONE = {"sums": (1e-4, 2.5e-4), "puzzles": (2e-4, 2.5e-4)}
BEFORE_THE_SEARCH = {"sums": (5e-5, 5e-4), "puzzles": (1e-4, 5e-4)}


def without_reward(task: str, copy: str, **others: Any) -> dict[str, Run]:
    """On-policy distillation alone; fine-tuning on the teacher's samples, alone and followed by GRPO."""
    distilling, tuning = (BEST_ALONE if copy else BEFORE_THE_SEARCH)[task]
    then = Stage("grpo", {**BUDGET, "max_steps": 32, **rate(BEST_RATE[task])})
    stages = {
        "on-policy distillation alone": (distillation(distilling),),
        "fine-tuning on the teacher's samples": (fine_tuning(tuning),),
        "half of that, then GRPO": (fine_tuning(tuning, 32), then),
    }
    return {name: Run(each, task=task, teacher="teacher", copy=copy, **others) for name, each in stages.items()}


# DRPO's region around the mixture, with the radius that is DRPO's default, on another copy of the policies
REGIONS: dict[str, Run] = {
    name: rl("rlad", settings, copy="second", group="regions", final=False)
    for name, settings in {
        "RLAD, alpha grows to 1 (default)": {**PAPER, **GROWING_ALPHA},
        'the same, `trust_region="drpo"`, radius 0.5': {
            **PAPER,
            **GROWING_ALPHA,
            "trust_region": "drpo",
            "trust_region_radius": 0.5,
        },
        'the same, `trust_region="drpo"`, radius 0.15': {
            **PAPER,
            **GROWING_ALPHA,
            "trust_region": "drpo",
            "trust_region_radius": 0.15,
        },
    }.items()
}
SEARCH_OF_RATES = [
    at_rate(name, value, task=task, seed=42, group="learning rate", final=False)
    for task, values in RATES.items()
    for value in values
    for name in SEARCHED
]
FINAL = with_seeds(
    [
        at_rate(name, value, task=task, copy="second", group="final")
        for task, value in BEST_RATE.items()
        for name in FINALISTS
    ],
    (43, 44, 45, 46, 47),
)


def by_coefficient(task: str) -> dict[str, Run]:
    where: dict[str, Any] = {"task": task, "copy": "second", "group": "coefficients"}
    return {name: at_rate(name, BEST_RATE[task], **where) for name in COEFFICIENTS}


WITHOUT_REWARD = with_seeds(
    [made for task in TASKS for made in without_reward(task, "second", group="final").values()], (43, 44, 45)
)
TEACHERS = with_seeds(
    [
        at_rate(name, BEST_RATE[task], task=task, teacher=teacher, copy="second", group="teachers")
        for teacher in ("worse", "equal")
        for task in TASKS
        for name in FINALISTS
        if name != "GRPO"  # without a teacher
    ],
    (43, 44, 45),
)

RUNS = [
    *(run for task in TASKS for run in wide(VARIANTS, task).values()),
    *wide(ON_SUMS_ALONE, "sums").values(),
    *SEARCH_OF_RATES,
    *SEARCH_ALONE,
    *FINAL,
    *WITHOUT_REWARD,
    *TEACHERS,
    *with_seeds([made for task in TASKS for made in by_coefficient(task).values()], SEEDS_OF_COEFFICIENTS),
    *with_seeds(REGIONS.values(), (42, 43, 44)),
]


def searched() -> str:
    """Accuracy of each variant on the validation problems of both tasks, one seed."""
    variants = {**VARIANTS, **ON_SUMS_ALONE, **REMOVED}
    lines = [
        [name, *(tables.of_one_seed("rlad", wide(variants, task)[name], "validation") for task in TASKS)]
        for name in variants
    ]
    return tables.markdown_table(["method", *TASKS], lines)


def searched_rates() -> str:
    columns = [(task, value) for task, values in RATES.items() for value in values]
    lines = [
        [
            name,
            *(
                tables.of_one_seed("rlad", at_rate(name, value, task=task, seed=42), "validation")
                for task, value in columns
            ),
        ]
        for name in SEARCHED
    ]
    return tables.markdown_table(["method", *(f"{task}, {value:.1e}" for task, value in columns)], lines)


def rates_alone() -> str:
    lines = [
        [
            f"{task}: {name}",
            ", ".join(
                f"{found} ({value:g})"
                for value in values
                if (found := tables.of_one_seed("rlad", alone(name, value, task, seed=42), "validation"))
            ),
        ]
        for task in TASKS
        for name, values in RATES_ALONE.items()
    ]
    return tables.markdown_table(["method", "accuracy (learning rate)"], lines)


def coefficients() -> str:
    runs = {task: by_coefficient(task) for task in TASKS}

    def cell(run: Run) -> str:
        found = tables.summary("rlad", run, "validation")
        same = [r for r in found.results if r["run"]["seed"] in SEEDS_OF_COEFFICIENTS] if found else []
        return tables.Summary(same).spread("accuracy", "validation") if same else ""

    lines = [[name, *(cell(runs[task][name]) for task in TASKS)] for name in COEFFICIENTS]
    return tables.markdown_table(["method", *TASKS], lines)


def by_teacher() -> str:
    columns = [(task, teacher) for task in TASKS for teacher in ("teacher", "equal", "worse")]

    def cell(name: str, task: str, teacher: str) -> str:
        found = tables.summary("rlad", at_rate(name, BEST_RATE[task], task=task, teacher=teacher, copy="second"))
        return found.spread("accuracy") if found else ""

    lines = [[name, *(cell(name, *column) for column in columns)] for name in FINALISTS]
    names = {"teacher": "better"}
    header = ["method", *(f"{task}, {names.get(teacher, teacher)} teacher" for task, teacher in columns)]
    return tables.markdown_table(header, lines)


def finalists(task: str, copy: str = "second") -> dict[str, Run]:
    rows = {name: at_rate(name, BEST_RATE[task], task=task, copy=copy) for name in FINALISTS}
    return rows | without_reward(task, copy)


def table(task: str, copy: str = "second") -> str:
    measures = ("accuracy", "accuracy_greedy", "kl_to_base")
    return tables.table("rlad", finalists(task, copy), measures=measures, first="method")


def short(name: str) -> str:
    """For a picture."""
    return name.replace(", `kdrl_coef` 0.005", ", 5e-3").replace(", alpha grows to 1", "").split(" (the")[0]


def draw_methods(axis: Any) -> None:
    groups = {task: {short(n): run for n, run in finalists(task).items() if n in FINALISTS} for task in TASKS}
    dots_by_group(axis, "rlad", groups, "RLAD: accuracy by method and task", "accuracy")


def picture(figure: Any) -> None:
    for axis, task in zip(figure.subplots(1, 2), TASKS, strict=True):
        rows = {short(name): run for name, run in finalists(task).items()}
        dots(axis, "rlad", rows, f"{task}: accuracy, sampled", "accuracy")


TABLES = {
    "searched": searched,
    "rates": searched_rates,
    "ratesalone": rates_alone,
    "sums": lambda: table("sums"),
    "puzzles": lambda: table("puzzles"),
    "firstsums": lambda: table("sums", copy=""),
    "firstpuzzles": lambda: table("puzzles", copy=""),
    "teachers": by_teacher,
    "coefficients": coefficients,
    "regions": lambda: tables.table("rlad", REGIONS, "validation"),
}
PICTURES = {"rlad.png": picture}
