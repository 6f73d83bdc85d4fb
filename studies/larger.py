"""
The finalists once more with a policy of five times the parameters (1.9M), on sums of three digits.

Settings are those of the other studies; only the learning rate is looked for again, as a multiple of theirs.
"""

from typing import Any

from studies import erpd, rlad, tropd
from studies.runs import Run, run, with_seeds
from studies.tables import markdown_table, of_one_seed, table


FACTORS = (0.5, 1.0)  # of the learning rates
WHERE: dict[str, Any] = {"task": "sums_3", "policy": "pupil"}


def scaled(settings: dict[str, Any], factor: float) -> dict[str, Any]:
    """All learning rates of the settings, multiplied."""
    return {k: float(f"{factor * v:.4g}") if k.endswith("learning_rate") else v for k, v in settings.items()}


def made(method: str, settings: dict[str, Any], teacher: str | None, factor: float, **others: Any) -> Run:
    return run(method, scaled({"learning_rate": 5e-5, **settings}, factor), teacher=teacher, **WHERE, **others)


def settings_of(run: Run) -> dict[str, Any]:
    return run.stages[0].settings


Row = tuple[str, dict[str, Any], str | None]  # method, settings, teacher

# From the same 2,048 rollouts
REWARDED: dict[str, Row] = {
    "ERPD": ("erpd", settings_of(erpd.FINALISTS["ERPD"]), None),
    **{
        name: (run.stages[0].method, settings_of(run), None)
        for name, run in erpd.BESIDE.items()
        if "24 phases" not in name
    },
}
TAUGHT_AND_REWARDED: dict[str, Row] = {
    name: (method, {**rlad.BUDGET, **settings}, None if method == "grpo" else "teacher")
    for name in rlad.FINALISTS
    for method, settings in [{**rlad.VARIANTS, **rlad.COEFFICIENTS}[name]]
}
# Pair: teacher, learning rate, updates
PAIRS: dict[str, tuple[str, float, int]] = {
    "same-format": ("teacher", 1e-4, 80),
    "other-format": ("places", 1e-3, 150),
}
DISTILLED = {
    "TrOPD, forward KL everywhere and clip at -1": tropd.EVERYWHERE,
    "TrOPD, forward KL (the paper's)": tropd.FORWARD_KL,
    "OPD": tropd.OPD,
    "GKD, JSD": tropd.JSD,
}


def distilled(pair: str) -> dict[str, Row]:
    teacher, rate, updates = PAIRS[pair]
    return {
        name: (method, {**settings, "learning_rate": rate, "max_steps": updates}, teacher)
        for name, (method, settings) in DISTILLED.items()
    }


GROUPS: dict[str, dict[str, Row]] = {
    "rewarded": REWARDED,
    **{pair: distilled(pair) for pair in PAIRS},
    "taught": TAUGHT_AND_REWARDED,
}
# Of FACTORS, for the methods of a group: chosen on the validation problems
BEST: dict[str, float] = dict.fromkeys(GROUPS, 1.0)
BASE = run("grpo", {"max_steps": 0}, **WHERE)


def searched(group: str, factor: float) -> list[Run]:
    return [made(*row, factor, group="rates", final=False) for row in GROUPS[group].values()]


def finalists(group: str) -> dict[str, Run]:
    return {name: made(*row, BEST[group], group=group) for name, row in GROUPS[group].items()}


RUNS = [BASE]
for each_group in GROUPS:  # one after the other, so that what is there when the study is stopped is whole
    RUNS += [run for factor in FACTORS for run in searched(each_group, factor)]
    RUNS += with_seeds(finalists(each_group).values(), (0, 1, 2))


def rates() -> str:
    """Accuracy on the validation problems, one seed."""
    lines = [
        [
            f"{group}: {name}",
            *(of_one_seed("larger", made(*row, factor), "validation") for factor in FACTORS),
        ]
        for group, rows in GROUPS.items()
        for name, row in rows.items()
    ]
    return markdown_table(["method", *(f"learning rates x {factor:g}" for factor in FACTORS)], lines)


def results_of(group: str) -> str:
    measures = ("accuracy", "accuracy_greedy", "kl_to_teacher" if group in PAIRS else "kl_to_base")
    spent = ("rollouts", "sampling_phases", "updates") if group == "rewarded" else ()
    return table("larger", {"before": BASE, **finalists(group)}, measures=measures, first="method", spent=spent)


TABLES = {
    "rewarded": lambda: results_of("rewarded"),
    "taught": lambda: results_of("taught"),
    "same": lambda: results_of("same-format"),
    "other": lambda: results_of("other-format"),
    "rates": rates,
}
