"""
TrOPD's outlier losses and trust regions, its baselines and GKD, on three pairs of student and teacher.

- `same-format`: the student writes its steps in either of two formats and makes mistakes, the teacher in one of them,
  without mistakes. The student has to drop the other format, and its mistakes.
- `mixed-format`: sums of two and of three digits. The teacher writes those of two digits as the student does, without
  its mistakes, and those of three digits in a format that the student has never seen.
- `other-format`: the teacher writes all its steps in a format that the student has never seen.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from studies.pictures import dots, dots_by_group
from studies.runs import Run, run, with_seeds
from studies.tables import markdown_table, of_one_seed, summary, table


PAIRS: dict[str, dict[str, Any]] = {
    "same-format": {"task": "sums", "policy": "mixed", "teacher": "places"},
    "mixed-format": {"task": "sums_2_3", "policy": "pupil", "teacher": "partly"},
    "other-format": {"task": "sums", "policy": "pupil", "teacher": "places"},
}
LEARNING_RATES = {"same-format": 1e-4, "mixed-format": 1e-3, "other-format": 1e-3}
UPDATES = {"same-format": 80, "mixed-format": 120, "other-format": 150}
FEWER_UPDATES = {"same-format": 40, "other-format": 100}  # of a search

Method = tuple[str, dict[str, Any]]


def outliers(loss: str, floor: float | None = None, coef: float | None = None, **others: Any) -> Method:
    clip = {"outlier_clip_floor": floor, "outlier_clip_coef": coef}
    return "tropd", {"outlier_loss": loss, **{name: x for name, x in clip.items() if x is not None}, **others}


def both(floor: float, coef: float, **others: Any) -> Method:
    return outliers("forward_kl_and_clip", floor, coef, **others)


def everywhere(floor: float, coef: float, **others: Any) -> Method:
    return outliers("forward_kl_everywhere_and_clip", floor, coef, **others)


def objective(name: str) -> Method:
    return "tropd", {"objective": name}


def gkd(beta: float) -> Method:
    return "gkd", {"lmbda": 1.0, "temperature": 1.0, "beta": beta}


def runs(
    methods: Iterable[Method],
    pairs: Iterable[str],
    updates: dict[str, int] = UPDATES,
    seed: int = 0,
    times_rate: float = 1.0,
    **others: Any,
) -> list[Run]:
    """Each method on each of the pairs, at `times_rate` times the pair's learning rate."""
    return [
        run(
            method,
            {**settings, "learning_rate": round(times_rate * LEARNING_RATES[pair], 8), "max_steps": updates[pair]},
            **PAIRS[pair],
            seed=seed,
            **others,
        )
        for method, settings in methods
        for pair in pairs
    ]


BOTH, FORWARD_KL, OPD, JSD = both(-1.0, 1.0), outliers("forward_kl"), objective("opd"), gkd(0.5)
EVERYWHERE = everywhere(-1.0, 1.0)
GUIDED_EVERYWHERE = everywhere(-1.0, 1.0, guidance="teacher")
GUIDED = both(-1.0, 1.0, guidance="teacher")
METHODS: dict[str, Method] = {
    "TrOPD, forward KL everywhere and clip at -1": EVERYWHERE,
    "TrOPD, forward KL everywhere and clip at -1, guided by the teacher": GUIDED_EVERYWHERE,
    "TrOPD, forward KL and clip at -1": BOTH,
    "TrOPD, forward KL and clip at -1, guided by the teacher": GUIDED,
    "TrOPD, forward KL and clip at -2": both(-2.0, 1.0),
    "TrOPD, forward KL and 2 x clip at -1": both(-1.0, 2.0),
    "TrOPD, forward KL and 0.3 x clip at -1": both(-1.0, 0.3),
    "TrOPD, forward KL and clip at -1, expected region": both(-1.0, 1.0, trust_region="expected"),
    "TrOPD, forward KL (the paper's)": FORWARD_KL,
    "TrOPD, clip at -1": outliers("clip", -1.0),
    "TrOPD, clip at -5": outliers("clip", -5.0),
    "forward KL everywhere": objective("forward_kl"),
    "OPD": OPD,
    "EOPD": objective("eopd"),
    "REOPOLD": objective("reopold"),
    "GKD, JSD": JSD,
    "GKD, forward KL": gkd(0.0),
    "GKD, reverse KL": gkd(1.0),
}
FINALISTS = [BOTH, FORWARD_KL, OPD, JSD]
# The forward KL on every token: beside TrOPD's other terms, and alone
NEWER = [EVERYWHERE, objective("forward_kl")]
SHORT: dict[str, Any] = {"updates": FEWER_UPDATES, "final": False, "group": "search"}
SEARCH = [
    *runs([BOTH, both(-2.0, 1.0), both(-3.0, 1.0), both(-2.0, 0.3), FORWARD_KL, OPD], FEWER_UPDATES, **SHORT),
    *runs([both(-1.0, 0.3), JSD], ("same-format",), **SHORT),
]
RATED = [EVERYWHERE, OPD, JSD]
SEARCHED_RATES = (0.3, 1.0, 3.0)  # times the pair's, on the validation problems
# One change each of the default: how many of the teacher's tokens (of 16), and the guidance's length over the run
SINGLE_CHANGES: dict[str, Method] = {
    "`forward_kl_and_clip`": BOTH,
    "`outlier_top_k=1`": both(-1.0, 1.0, outlier_top_k=1),
    "`outlier_top_k=4`": both(-1.0, 1.0, outlier_top_k=4),
    "guided by the teacher": GUIDED,
    "guided, `guidance_schedule='linear'`": both(-1.0, 1.0, guidance="teacher", guidance_schedule="linear"),
    "guided, `guidance_schedule='constant'`": both(-1.0, 1.0, guidance="teacher", guidance_schedule="constant"),
}
# On the validation problems of all three pairs, with the full number of updates and two seeds
COEFFICIENTS: dict[str, Method] = {
    "clip at -1": BOTH,
    "clip at -0.5": both(-0.5, 1.0),
    "clip at -2": both(-2.0, 1.0),
    "0.3 x clip at -1": both(-1.0, 0.3),
    "0.3 x clip at -2": both(-2.0, 0.3),
    "2 x clip at -1": both(-1.0, 2.0),
    "clip at -1, expected region": both(-1.0, 1.0, trust_region="expected"),
    "clip at -2, expected region": both(-2.0, 1.0, trust_region="expected"),
    "0.3 x clip at -2, expected region": both(-2.0, 0.3, trust_region="expected"),
}
# Beside the finalists, with fewer seeds
OTHERS = [objective("eopd"), objective("reopold"), gkd(0.0), gkd(1.0)]
# The same around the forward KL on every token
AROUND_EVERYWHERE: dict[str, Method] = {
    "clip at -1 (the default)": EVERYWHERE,
    "clip at -2": everywhere(-2.0, 1.0),
    "clip at -5": everywhere(-5.0, 1.0),
    "0.3 x clip at -1": everywhere(-1.0, 0.3),
    "clip at -1, expected region": everywhere(-1.0, 1.0, trust_region="expected"),
}
# As many updates on the teacher's own completions of the 6,000 training problems
TEACHER_SAMPLES: Method = "sft", {"teacher_samples": 6000}
BASE: Method = "tropd", {"objective": "opd"}  # 0 updates
NO_UPDATES = dict.fromkeys(PAIRS, 0)
RUNS = [
    *SEARCH,
    *runs([BASE], PAIRS, NO_UPDATES, copy="second", group="final"),
    *with_seeds(runs([*FINALISTS, GUIDED, *NEWER, GUIDED_EVERYWHERE], PAIRS, copy="second", group="final"), range(5)),
    *runs(SINGLE_CHANGES.values(), FEWER_UPDATES, copy="second", group="changes"),
    *with_seeds(runs(COEFFICIENTS.values(), PAIRS, copy="second", group="coefficients", final=False), (0, 1)),
    *with_seeds(runs(OTHERS, PAIRS, copy="second", group="others"), (0, 1)),
    *with_seeds(runs(AROUND_EVERYWHERE.values(), PAIRS, copy="second", group="around", final=False), (0, 1)),
    *[
        run
        for times in SEARCHED_RATES
        for run in runs(RATED, PAIRS, times_rate=times, copy="second", group="rates", final=False)
    ],
    *[
        run
        for times in SEARCHED_RATES
        for run in runs([TEACHER_SAMPLES], PAIRS, times_rate=times, copy="second", group="rates", final=False)
    ],
    *runs([TEACHER_SAMPLES], ("same-format",), times_rate=10.0, copy="second", group="rates", final=False),
]
MEASURES = ("accuracy", "accuracy_greedy", "kl_to_teacher")


def rows_of(pair: str, copy: str = "second") -> dict[str, Run]:
    before = {"before": runs([BASE], (pair,), NO_UPDATES, copy=copy)[0]}
    return before | {name: runs([method], (pair,), copy=copy)[0] for name, method in METHODS.items()}


def results_on(pair: str, copy: str = "second") -> str:
    return table("tropd", rows_of(pair, copy), measures=MEASURES, first="method")


def changes() -> str:
    rows = {
        f"`{pair}`: {name}": runs([method], (pair,), copy="second")[0]
        for pair in FEWER_UPDATES
        for name, method in SINGLE_CHANGES.items()
    }
    return table("tropd", rows, measures=MEASURES, first="pair: settings")


def search() -> str:
    """On the validation problems."""
    methods = [
        ("forward KL and clip at -1", BOTH),
        ("forward KL and clip at -2", both(-2.0, 1.0)),
        ("forward KL and clip at -3", both(-3.0, 1.0)),
        ("forward KL and 0.3 x clip at -2", both(-2.0, 0.3)),
        ("forward KL", FORWARD_KL),
        ("OPD", OPD),
    ]
    rows = {
        f"`{pair}`: {name}": runs([method], (pair,), FEWER_UPDATES)[0]
        for pair in FEWER_UPDATES
        for name, method in methods
    }
    return table("tropd", rows, "validation", MEASURES, first="pair: method")


def coefficients() -> str:
    """Accuracy on the validation problems, of as many seeds as there are."""
    lines = []
    rows = {f"forward KL everywhere, {name}": method for name, method in AROUND_EVERYWHERE.items()}
    rows |= {f"forward KL on outliers, {name}": method for name, method in COEFFICIENTS.items()}
    rows |= {"forward KL everywhere": objective("forward_kl"), "forward KL on outliers (the paper's)": FORWARD_KL}
    for name, method in {**rows, "OPD": OPD}.items():
        found = [summary("tropd", runs([method], (pair,), copy="second")[0], "validation") for pair in PAIRS]
        cells = [each.spread("accuracy", "validation") if each else "" for each in found]
        cells += [each.spread("accuracy_greedy", "validation") if each else "" for each in found[-1:]]
        lines.append([name, *cells, str(min(each.seeds if each else 0 for each in found))])
    return markdown_table(["terms", *(f"`{pair}`" for pair in PAIRS), "`other-format`, greedy", "seeds"], lines)


def rates() -> str:
    """Accuracy on the validation problems, one seed."""
    shown = {name: method for name, method in METHODS.items() if method in RATED}
    shown["fine-tuning on the teacher's samples"] = TEACHER_SAMPLES
    lines = [
        [
            f"`{pair}`, {times * LEARNING_RATES[pair]:.0e}",
            *(
                of_one_seed("tropd", runs([method], (pair,), times_rate=times, copy="second")[0], "validation")
                for method in shown.values()
            ),
        ]
        for pair in PAIRS
        for times in (*SEARCHED_RATES, *([10.0] if pair == "same-format" else []))
    ]
    return markdown_table(["pair, learning rate", *shown], lines)


def short(name: str) -> str:
    """For a picture."""
    name = name.replace("TrOPD, forward KL everywhere and clip at -1", "TrOPD (default)")
    name = name.replace("TrOPD, forward KL and clip at", "TrOPD, on outliers only,").replace(" only, -1", " only")
    return name.replace("TrOPD, forward KL (the paper's)", "TrOPD (the paper's)").replace(" by the teacher", "")


def draw_pairs(axis: Any) -> None:
    """The methods that were run on all pairs."""
    shown = [name for name, method in METHODS.items() if method in [*FINALISTS, *NEWER]]
    groups = {pair: {short(name): rows_of(pair)[name] for name in shown} for pair in PAIRS}
    dots_by_group(
        axis,
        "tropd",
        groups,
        "TrOPD: accuracy by pair of student and teacher",
        "accuracy",
    )


def picture(figure: Any) -> None:
    figure.suptitle("accuracy, sampled", fontsize=10)
    axes = figure.subplots(1, len(PAIRS))
    for axis, pair in zip(axes, PAIRS, strict=True):
        rows = {
            short(name): run for name, run in rows_of(pair).items() if "x clip" not in name and "expected" not in name
        }
        dots(axis, "tropd", rows, pair, "accuracy")


TABLES = {
    # The names of tables are one word
    **{pair.partition("-")[0]: partial(results_on, pair) for pair in PAIRS},
    **{f"first{pair.partition('-')[0]}": partial(results_on, pair, copy="") for pair in PAIRS},
    "changes": changes,
    "search": search,
    "coefficients": coefficients,
    "rates": rates,
}
PICTURES = {"tropd.png": picture}
