"""ERPD: which settings win, and beside it GRPO and DRPO with the same 2,048 rollouts."""

from collections.abc import Callable
from itertools import product
from typing import Any

from studies.runs import Run, run, with_seeds
from studies.tables import Summary, summary, table


# Spelled out, whatever the trainer's defaults are. Updates of 64 rollouts: 32 in a pass over the set
CENTRE: dict[str, Any] = {
    "extraction_loss": "mse",
    "extraction_passes": 4,
    "extraction_learning_rate": 5e-5,
    "extraction_beta": 0.5,
    "signal": "teacher",
    "signal_clip": 2.0,
    "distillation_passes": 4,
    "learning_rate": 5e-5,
    "distillation_anchor": "base",
    "trust_region": "ppo_clip",
    "epsilon": 0.5,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "per_device_train_batch_size": 64,
    "steps_per_generation": 4,
}
LARGE_UPDATES = {"per_device_train_batch_size": 256, "steps_per_generation": 1}


def search(**changes: Any) -> Run:
    return run("erpd", {**CENTRE, **changes}, final=False, group="search")


def policy_gradient(method: str, phases: int, passes: int, **changes: Any) -> Run:
    """The same 2,048 rollouts in `phases` sampling phases, each gone over `passes` times, 64 rollouts an update."""
    settings = {
        "steps_per_generation": 32 // phases,
        "num_iterations": passes,
        "max_steps": 32 * passes,
        "learning_rate": 5e-5,
        **changes,
    }
    every = 64 if phases == 1 else None
    return run(method, settings, final=False, curve_every=every, group="policy gradient")


# A bound below 1 - epsilon for what the signal wants less likely, and more room above
HIGHER = {"epsilon": 0.3, "epsilon_high": 1.0, "learning_rate": 3e-5}
# Stage 1 in few passes with a larger learning rate
HASTY = {
    **LARGE_UPDATES,
    "extraction_learning_rate": 2e-4,
    "distillation_passes": 8,
    "epsilon": 1.0,
    "lr_scheduler_type": "linear",
}
UNLEARNED = {**HIGHER, "signal": "unlearned_reference"}
SEARCH = [
    search(**UNLEARNED),
    search(**HIGHER),
    search(**{**UNLEARNED, "epsilon": 0.2, "epsilon_high": 0.5}),
    search(**{**UNLEARNED, "extraction_beta": 0.2, "extraction_passes": 8}),
    search(**{**UNLEARNED, "epsilon_high": 2.0}, distillation_passes=8),
]
SMALL = [
    search(),
    search(trust_region="drpo", trust_region_radius=0.5),
    search(signal="unlearned_reference", epsilon=1.0),
    search(**HASTY, signal="unlearned_reference"),
]
# One change of these settings each, and then of those that were best
WIDE = {"prompts_per_round": 256, "num_generations": 8}
MIXED = {**WIDE, "outcome_advantage_weight": 0.5}
BEST = {**MIXED, "extraction_passes": 6, "distillation_passes": 8}
CHANGES: dict[str, dict[str, Any]] = {
    "128 prompts with 16 rollouts each": {},
    "`outcome_advantage_weight=0.5`": {"outcome_advantage_weight": 0.5},
    "`extraction_passes=8`": {"extraction_passes": 8},
    "`lr_scheduler_type='linear'`, from 5e-5": {"learning_rate": 5e-5, "lr_scheduler_type": "linear"},
    "256 prompts with 8 rollouts each": WIDE,
    "256 prompts, `outcome_advantage_weight=1`": {**WIDE, "outcome_advantage_weight": 1.0},
    "256 prompts, `outcome_advantage_weight=0.5`": MIXED,
    "the same, `distillation_passes=6`": {**MIXED, "distillation_passes": 6},
    "the same, `distillation_passes=8`": {**MIXED, "distillation_passes": 8},
    "the same, `distillation_passes=12`": {**MIXED, "distillation_passes": 12},
    "256 prompts, `outcome_advantage_weight=0.5`, `extraction_passes=6`": {**MIXED, "extraction_passes": 6},
    "256 prompts, `distillation_passes=8`": {**WIDE, "distillation_passes": 8},
    "256 prompts, `distillation_passes=8`, `extraction_passes=6`": {
        **WIDE,
        "distillation_passes": 8,
        "extraction_passes": 6,
    },
    "the default: `extraction_passes=6`, `distillation_passes=8`": BEST,
    "the default, `extraction_loss='ce'`": {**BEST, "extraction_loss": "ce"},
    "the default, 2 rounds of 1,024 rollouts": {**BEST, "rounds": 2, "prompts_per_round": 128},
}
CHANGED = {name: search(**{**UNLEARNED, **change}) for name, change in CHANGES.items()}
# One change each of the default in three rounds of 2,048 rollouts
THREE_ROUNDS: dict[str, dict[str, Any]] = {
    "one rate for all rounds": {},
    "`distillation_learning_rate_decay=0.5` (the default)": {"distillation_learning_rate_decay": 0.5},
    "`extraction_loss='ce'`": {"extraction_loss": "ce"},
    "`signal_clip=5`": {"signal_clip": 5.0},
    "`extraction_passes=12`": {"extraction_passes": 12},
    "clip 0.5/2.0 in stage 2": {"epsilon": 0.5, "epsilon_high": 2.0},
    "`learning_rate=6e-5`": {"learning_rate": 6e-5},
    "`outcome_advantage_weight=1`": {"outcome_advantage_weight": 1.0},
    "128 prompts with 16 rollouts each": {"prompts_per_round": 128, "num_generations": 16},
    "`extraction_loss='ce'`, `extraction_passes=12`": {"extraction_loss": "ce", "extraction_passes": 12},
    "`extraction_loss='ce'`, clip 0.2/0.5, `distillation_passes=12`": {
        "extraction_loss": "ce",
        "epsilon": 0.2,
        "epsilon_high": 0.5,
        "distillation_passes": 12,
    },
    "clip 0.2/0.5, `distillation_passes=12`": {"epsilon": 0.2, "epsilon_high": 0.5, "distillation_passes": 12},
    "`learning_rate=2e-5`, `distillation_passes=12`": {"learning_rate": 2e-5, "distillation_passes": 12},
    "stage 2 from 6e-5, linear": {"learning_rate": 6e-5, "lr_scheduler_type": "linear"},
    "both stages linear, from 1e-4 and 6e-5": {
        "extraction_learning_rate": 1e-4,
        "extraction_lr_scheduler_type": "linear",
        "learning_rate": 6e-5,
        "lr_scheduler_type": "linear",
    },
    "`outcome_advantage_weight=0`": {"outcome_advantage_weight": 0.0},
    "`scale_rewards='batch'`": {"scale_rewards": "batch"},
    "512 prompts with 4 rollouts each": {"prompts_per_round": 512, "num_generations": 4},
    "`distillation_passes=4`, `learning_rate=6e-5`": {"distillation_passes": 4, "learning_rate": 6e-5},
    "512 prompts with 8 rollouts each, twice the rollouts": {"prompts_per_round": 512},
}
IN_ROUNDS = {
    name: run(
        "erpd", {**CENTRE, **UNLEARNED, **BEST, "rounds": 3, **change}, final=False, group="rounds", copy="second"
    )
    for name, change in THREE_ROUNDS.items()
}
# Sampling phases -> passes over each
PHASES = {1: 8, 2: 4, 4: 4, 8: 2, 16: 2}
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
POLICY_GRADIENT = {
    (method, phases): policy_gradient(method, phases, passes)
    for phases, passes in PHASES.items()
    for method in ("grpo", "drpo")
}
BY_RATE = {
    (method, rate): policy_gradient(method, 8, 2, learning_rate=rate) for rate in RATES for method in ("grpo", "drpo")
}
# On another copy of the policy, each beside the default on the same copy
ELSEWHERE: dict[str, dict[str, Any]] = {
    "the default": {},
    "`extraction_loss='ce'`": {"extraction_loss": "ce"},
    "`extraction_loss='sapo'`": {"extraction_loss": "sapo"},
    "two teachers, `['ce', 'mse']`": {"extraction_loss": ["ce", "mse"]},
    "`distillation_anchor='pass'`": {"distillation_anchor": "pass"},
    "`trust_region='drpo'`, radius 0.5": {"trust_region": "drpo", "trust_region_radius": 0.5},
    "`trust_region='drpo'`, radius 0.15": {"trust_region": "drpo", "trust_region_radius": 0.15},
    "4 rounds of 512 rollouts": {"rounds": 4, "prompts_per_round": 64},
    "512 prompts with 4 rollouts each": {"prompts_per_round": 512, "num_generations": 4},
}
SECOND: dict[str, Run] = {
    **{
        f"ERPD, {name}": run("erpd", {**CENTRE, **UNLEARNED, **BEST, **change}, final=False)
        for name, change in ELSEWHERE.items()
    },
    **{
        f"{method.upper()}, {n} phase{'s' * (n > 1)}": run(method, found.stages[0].settings, final=False)
        for (method, n), found in POLICY_GRADIENT.items()
    },
}
SECOND = {name: Run(**{**vars(run), "copy": "second", "group": "second copy"}) for name, run in SECOND.items()}
# With five seeds, and on the test problems too
ON_TEST: dict[str, Any] = {"copy": "second", "group": "final"}
SLOWER = {"distillation_learning_rate_decay": 0.5}  # stage 2 of later rounds; one rate for all where it is left out
FINALISTS = {
    "ERPD": run("erpd", {**CENTRE, **UNLEARNED, **BEST}, **ON_TEST),
    "ERPD, three rounds": run("erpd", {**CENTRE, **UNLEARNED, **BEST, "rounds": 3, **SLOWER}, **ON_TEST),
    "ERPD, three rounds at one rate": run("erpd", {**CENTRE, **UNLEARNED, **BEST, "rounds": 3}, **ON_TEST),
}
# Each with its trainer's default trust region
DEFAULT_REGION: dict[str, dict[str, Any]] = {"grpo": {}, "drpo": {"trust_region_radius": 0.5}}


def beside(method: str, phases: int, passes: int, **changes: Any) -> Run:
    settings = policy_gradient(method, phases, passes, **DEFAULT_REGION[method]).stages[0].settings
    return run(method, {**settings, **changes}, **ON_TEST)


# From the same rollouts in one phase, and in eight; from as many as ERPD's three rounds in 24
BESIDE = {
    f"{method.upper()}, {phases} phase{'s' * (phases > 1)}": beside(method, phases, passes)
    for phases, passes in ((8, 2), (1, 8))
    for method in ("drpo", "grpo")
}
BESIDE |= {f"{method.upper()}, 24 phases": beside(method, 8, 2, max_steps=192) for method in ("drpo", "grpo")}
# Twice the rollouts in a round, and GRPO from as many
LARGE = {**CENTRE, **UNLEARNED, **BEST, "rounds": 3, "prompts_per_round": 512}
LARGER = {
    "ERPD, three rounds of 4,096": run("erpd", {**LARGE, **SLOWER}, **ON_TEST),
    "ERPD, three rounds of 4,096 at one rate": run("erpd", LARGE, **ON_TEST),
    "GRPO, 48 phases": beside("grpo", 8, 2, max_steps=384),
}
# ERPD's rate falls from round to round: GRPO's beside it, from the start of the run to its end
FALLING = {
    f"GRPO, {steps // 8} phases, from {rate:g} to 0": beside(
        "grpo", 8, 2, max_steps=steps, learning_rate=rate, lr_scheduler_type="linear"
    )
    for steps in (64, 192, 384)
    for rate in (5e-5, 1e-4, 2e-4)
}
# The best of these, with one seed on the validation problems; in 8 phases none is better than one rate throughout
BEST_FALLING = {
    name: FALLING[name] for name in ("GRPO, 24 phases, from 0.0001 to 0", "GRPO, 48 phases, from 0.0002 to 0")
}
BASE = {"base policy": run("grpo", {"max_steps": 0}, **ON_TEST)}
RATES_BESIDE = {
    f"{method.upper()}, {phases} phase{'s' * (phases > 1)}, {rate:g}": Run(
        **{**vars(beside(method, phases, passes, learning_rate=rate)), "final": False, "group": "second copy"}
    )
    for phases, passes, methods in ((8, 2, ("drpo",)), (1, 8, ("drpo", "grpo")))
    for method in methods
    for rate in (2.5e-5, 5e-5, 1e-4)
}
ROWS = {**FINALISTS, **BESIDE}
RUNS = [
    *SEARCH,
    *SMALL,
    *CHANGED.values(),
    *IN_ROUNDS.values(),
    *SECOND.values(),
    *BASE.values(),
    *BY_RATE.values(),
    *RATES_BESIDE.values(),
    *with_seeds(ROWS.values(), range(5)),
    *with_seeds(LARGER.values(), range(5)),
    *FALLING.values(),
    *with_seeds(BEST_FALLING.values(), range(5)),
    *with_seeds([FALLING["GRPO, 48 phases, from 0.0001 to 0"]], range(5)),
]


def extreme_region(run: Run, split: str = "test") -> Summary | None:
    """The policy that the last round's stage 1 leaves in place of the run's result."""
    found, settings = summary("erpd", run, split), run.stages[0].settings
    results = []
    for result in found.results if found else ():
        if teachers := result["stages"][0].get("teachers"):
            passes = result["rollouts"] // settings["per_device_train_batch_size"]
            spent = {"updates": settings["extraction_passes"] * passes}
            results.append({**result, **next(iter(teachers.values())), **spent})
    return Summary(results) if results else None


def finalists() -> str:
    spent = ("rollouts", "sampling_phases", "updates")
    teacher = {"ERPD, its extreme region policy": extreme_region(FINALISTS["ERPD"])}
    return table("erpd", {**BASE, **teacher, **ROWS, **LARGER, **BEST_FALLING}, spent=spent)


def falling() -> str:
    return table("erpd", FALLING, "validation", first="GRPO, sampling phases and learning rate")


def wide_search() -> str:
    """What was looked at, on the validation problems."""
    rows = {describe(run): run for run in [*SEARCH, *SMALL]}
    return table("erpd", rows, "validation", first="stage 1; signal; stage 2", extra=OF_TEACHER)


def changes() -> str:
    return table("erpd", CHANGED, "validation", first="settings", extra=OF_TEACHER)


def rounds() -> str:
    return table("erpd", IN_ROUNDS, "validation", first="three rounds of 2,048 rollouts", extra=OF_TEACHER)


def second_copy() -> str:
    spent = ("sampling_phases", "updates")
    return table("erpd", SECOND, "validation", spent=spent)


def rates() -> str:
    rows = {f"{method.upper()}, {rate:g}": run for (method, rate), run in BY_RATE.items()}
    return table("erpd", rows, "validation", first="8 phases, learning rate")


def rates_beside() -> str:
    return table("erpd", RATES_BESIDE, "validation", first="learning rate")


OF_TEACHER: dict[str, Callable[[Summary], str]] = {
    f"teacher: {what}": lambda found, i=i: found.between_the_stages("teacher_")[i]  # type: ignore[misc]
    for i, what in enumerate(("accuracy", "KL"))
}


def describe(run: Run) -> str:
    s = {"lr_scheduler_type": "constant", "trust_region_radius": None, "epsilon_high": None, **run.stages[0].settings}
    if s["trust_region"] == "ppo_clip":
        region = f"clip {s['epsilon']:g}" + (f"/{s['epsilon_high']:g}" if s["epsilon_high"] else "")
    else:
        region = f"{s['trust_region']} {s['trust_region_radius']:g}"
    schedule = "" if s["lr_scheduler_type"] == "constant" else f" {s['lr_scheduler_type']}"
    size = s["per_device_train_batch_size"]
    first = f"{s['extraction_loss']}, {s['extraction_passes']} passes at {s['extraction_learning_rate']:g}"
    if s["extraction_beta"] != 0.5:
        first += f", beta {s['extraction_beta']:g}"
    second = f"{region}, {s['distillation_passes']} passes at {s['learning_rate']:g}{schedule}"
    return f"{first}; `{s['signal']}`; {second}; updates of {size}"


def draw_frontier(axis: Any) -> None:
    """Accuracy over divergence on the test problems, a dot for each seed."""
    from_one, from_many = {"marker": "o"}, {"marker": "s", "markerfacecolor": "none"}
    drawn: dict[str, tuple[Summary | None, dict[str, Any]]] = {
        "ERPD, 1 phase": (summary("erpd", FINALISTS["ERPD"]), {**from_one, "color": "C0"}),
        "ERPD, its extreme region policy": (extreme_region(FINALISTS["ERPD"]), {"marker": "*", "color": "C0"}),
    }
    for (method, colour), (phases, marker) in product(
        (("DRPO", "C2"), ("GRPO", "0.4")), (("1 phase", from_one), ("8 phases", from_many))
    ):
        name = f"{method}, {phases}"
        drawn[name] = summary("erpd", BESIDE[name]), {**marker, "color": colour}
    for name, (found, style) in drawn.items():
        if found:
            axis.plot(found.values("kl_to_base"), found.values("accuracy"), linestyle="", label=name, **style)
    axis.set(xlabel="KL to base, nats per sequence", ylabel="accuracy, sampled", ylim=(0.52, None))
    axis.set_title("ERPD: 2,048 rollouts on sums, a dot for each seed", fontsize=9)
    axis.legend(fontsize=6, loc="lower right", ncols=2)
    axis.grid(alpha=0.3)


# Where the rollouts are sampled at once, or in rounds and phases of the same size
BY_ROLLOUTS: dict[str, list[Run]] = {
    "ERPD: 1, 3 and 3 sampling phases": [
        *(FINALISTS[name] for name in ("ERPD", "ERPD, three rounds")),
        LARGER["ERPD, three rounds of 4,096"],
    ],
    "GRPO: 8, 24 and 48, the latter at a falling rate": [BESIDE["GRPO, 8 phases"], *BEST_FALLING.values()],
    "DRPO: 8 and 24": [BESIDE["DRPO, 8 phases"], BESIDE["DRPO, 24 phases"]],
}


def draw_rollouts(axis: Any) -> None:
    """Accuracy over the number of rollouts on the test problems: a line of means, a dot for each seed."""
    for (name, runs), colour in zip(BY_ROLLOUTS.items(), ("C0", "0.4", "C2"), strict=True):
        found = [each for each in (summary("erpd", run) for run in runs) if each]
        means = [each.mean("accuracy") for each in found]
        axis.plot([each.spent("rollouts") for each in found], means, color=colour, label=name)
        for each in found:
            values = each.values("accuracy")
            axis.plot([each.spent("rollouts")] * len(values), values, "o", color=colour, markersize=4)
    axis.set(xlabel="rollouts", ylabel="accuracy, sampled")
    axis.set_title("ERPD: accuracy by the number of rollouts", fontsize=9)
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.3)


def picture(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    draw_frontier(left)
    draw_rollouts(right)


TABLES = {
    "finalists": finalists,
    "search": wide_search,
    "changes": changes,
    "rates": rates,
    "ratesbeside": rates_beside,
    "rounds": rounds,
    "falling": falling,
    "second": second_copy,
}
PICTURES = {"erpd.png": picture}
