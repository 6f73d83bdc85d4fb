"""
The main comparison once more with a policy of five times the parameters (1.9M), on sums of three digits.

Settings are those of the other studies; only the learning rates are looked for again, as a multiple of theirs.
"""

from typing import Any

from studies import erpd
from studies.runs import Run, run, with_seeds
from studies.tables import markdown_table, of_one_seed, table


FACTORS = (0.5, 1.0)  # of the learning rates
BEST = {"ERPD": 1.0, "DRPO, 8 phases": 1.0, "GRPO, 8 phases": 1.0}  # chosen on the validation problems
WHERE: dict[str, Any] = {"task": "sums_3", "policy": "pupil"}
# From the same 2,048 rollouts
METHODS: dict[str, Run] = {name: {**erpd.FINALISTS, **erpd.BESIDE}[name] for name in BEST}
BASE = run("grpo", {"max_steps": 0}, **WHERE)


def scaled(name: str, factor: float, **others: Any) -> Run:
    """With all learning rates of the method multiplied."""
    stage = METHODS[name].stages[0]
    settings = {"learning_rate": 5e-5, **stage.settings}
    settings |= {k: float(f"{factor * v:.4g}") for k, v in settings.items() if k.endswith("learning_rate")}
    return run(stage.method, settings, **WHERE, **others)


FINALISTS = {name: scaled(name, factor, group="final") for name, factor in BEST.items()}
RUNS = [
    BASE,
    *(scaled(name, factor, group="rates", final=False) for factor in FACTORS for name in METHODS),
    *with_seeds(FINALISTS.values(), (0, 1)),
]


def rates() -> str:
    """Accuracy on the validation problems, one seed."""
    lines = [
        [name, *(of_one_seed("larger", scaled(name, factor), "validation") for factor in FACTORS)] for name in METHODS
    ]
    return markdown_table(["method", *(f"learning rates x {factor:g}" for factor in FACTORS)], lines)


def finalists() -> str:
    spent = ("rollouts", "sampling_phases", "updates")
    return table("larger", {"base policy": BASE, **FINALISTS}, spent=spent, first="method")


TABLES = {"rates": rates, "finalists": finalists}
