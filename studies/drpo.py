"""DRPO: which trust region, and which radius, once rollouts are stale or come from a sampler of lower precision."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from studies.runs import UNSCORED, Run, run, with_seeds
from studies.tables import markdown_table, of_one_seed, summary, table


# name -> (method, settings). DRPO's radius from where hardly anything may move to where the region never binds
REGIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO, clip 0.2": ("grpo", {"epsilon": 0.2}),
    "GRPO, clip 0.2/0.28": ("grpo", {"epsilon": 0.2, "epsilon_high": 0.28}),
    **{
        f"DRPO, {radius:g}": ("drpo", {"trust_region": "drpo", "trust_region_radius": radius})
        for radius in (0.02, 0.05, 0.15, 0.5, 2.5, 12.5)
    },
    "SPO, 0.2": ("drpo", {"trust_region": "spo", "trust_region_radius": 0.2}),
    "DPPO-TV, 0.15": ("drpo", {"trust_region": "dppo_tv", "trust_region_radius": 0.15}),
    "DPPO-KL, 0.05": ("drpo", {"trust_region": "dppo_kl", "trust_region_radius": 0.05}),
    "none": ("drpo", {"trust_region": "drpo", "trust_region_radius": 1e6}),
}
# Where the sampler is another policy: TRL's corrections, its default and the token-level one
CORRECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO, sequence mask": ("grpo_corrected", {"epsilon": 0.2, "vllm_importance_sampling_mode": "sequence_mask"}),
    "GRPO, token truncate": ("grpo_corrected", {"epsilon": 0.2, "vllm_importance_sampling_mode": "token_truncate"}),
}


# The same correction, and DRPO's region around the trainer's old log-probabilities
DECOUPLED: dict[str, tuple[str, dict[str, Any]]] = {
    f"DRPO, {radius:g}, old policy, token truncate": (
        "drpo_corrected",
        {
            "trust_region": "drpo",
            "trust_region_radius": radius,
            "trust_region_anchor": "old_policy",
            "vllm_importance_sampling_mode": "token_truncate",
        },
    )
    for radius in (0.15, 0.5)
}
# Around the trainer's old log-probabilities, the sampler's left out: vllm_importance_sampling_correction=False
OWN = "DRPO, 0.15, own log-probs"


def stale(name: str, updates: int, learning_rate: float = 1e-4, **others: Any) -> Run:
    """4,096 rollouts. 1 update per batch of 64; or 4, 8, 16 on a batch of 256, in one, two or four passes."""
    method, settings = REGIONS[name]
    sizes = {"steps_per_generation": min(updates, 4), "num_iterations": max(updates // 4, 1)}
    sizes["max_steps"] = 64 * sizes["num_iterations"]
    settings = {**settings, **sizes, "learning_rate": learning_rate, "logging_steps": updates}
    return run(method, settings, **{"final": False, "group": "staleness", **others})


def low_precision(name: str, sampler: str, learning_rate: float = 1e-4, **others: Any) -> Run:
    """4,096 rollouts, 4 updates per batch of 256."""
    sampler += UNSCORED * (name == OWN)
    method, settings = {**REGIONS, **CORRECTED, **DECOUPLED, OWN: REGIONS["DRPO, 0.15"]}[name]
    sizes = {"steps_per_generation": 4, "max_steps": 64, "logging_steps": 4, "learning_rate": learning_rate}
    return run(method, {**settings, **sizes}, sampler=sampler, **{"final": False, "group": "precision", **others})


STALENESS = {name: stale(name, 16) for name in REGIONS}
MISMATCHED = ["GRPO, clip 0.2", "GRPO, token truncate", *(f"DRPO, {r:g}" for r in (0.15, 0.5, 2.5, 12.5)), OWN]
MISMATCHED += ["SPO, 0.2", "DPPO-TV, 0.15", "none"]
PRECISION = {
    sampler: {name: low_precision(name, sampler) for name in names}
    for sampler, names in {
        "4 bits": MISMATCHED,
        "5 bits": ["DRPO, 0.15", "DRPO, 0.5"],
        "6 bits": ["GRPO, clip 0.2", "DRPO, 0.15", "DRPO, 0.5"],
    }.items()
}
TOO_FAST = {name: low_precision(name, "4 bits", 3e-4) for name in ("GRPO, clip 0.2", "DRPO, 0.15")}
# Which anchor, on another copy of the policy: all that is compared is made with it
ANCHORS = {
    f"{sampler}: {name}": low_precision(name, sampler, copy="second", group="anchors")
    for sampler in ("4 bits", "5 bits")
    for name in ("GRPO, token truncate", *DECOUPLED, "DRPO, 0.5", "GRPO, clip 0.2")
}
# The same small search of the learning rate for each, on the second copy. 1e-4, that of the tables above, is too high
BY_RATE: dict[str, Any] = {"copy": "second", "group": "learning rate"}
RATES = (2.5e-5, 5e-5, 1e-4)
STALE_FINALISTS = ("GRPO, clip 0.2", "GRPO, clip 0.2/0.28", "DRPO, 0.15", "DRPO, 0.5")
STALE_RATES = {f"{name}, {rate:g}": stale(name, 16, rate, **BY_RATE) for name in STALE_FINALISTS for rate in RATES}
CORRECTED_OLD = "DRPO, 0.15, old policy, token truncate"
PRECISION_FINALISTS = ("GRPO, clip 0.2", "GRPO, token truncate", CORRECTED_OLD, "DRPO, 0.5", "none")
PRECISION_RATES = {
    f"{name}, {rate:g}": low_precision(name, "4 bits", rate, **BY_RATE)
    for name in PRECISION_FINALISTS
    for rate in (*RATES, 2e-4)
}
# Fewer updates per batch. With one, before which nothing is stale, all regions are the same
FEWER_UPDATES = {
    f"{updates} updates: {name}, {rate:g}": stale(name, updates, rate, copy="second", group="fewer updates")
    for updates in (4, 8)
    for name in STALE_FINALISTS
    for rate in RATES
}
# Every region at the best rate and, where that rate might favour the one that never binds, at twice it
REGION: dict[str, Any] = {"copy": "second", "group": "region"}
STALE_REGIONS = {f"{name}, {rate:g}": stale(name, 16, rate, **REGION) for rate in (2.5e-5, 5e-5) for name in REGIONS}
SEEN_AGAIN = [
    stale(name, 16, rate, **BY_RATE) for rate in (2.5e-5, 5e-5) for name in ("DRPO, 0.05", "DRPO, 12.5", "none")
]
PRECISION_REGIONS = {
    name: low_precision(name, "4 bits", 5e-5, **REGION) for name in [*REGIONS, *CORRECTED, *DECOUPLED, OWN]
}
# Samplers from far to hardly another policy, at the best of these rates
OTHER_SAMPLERS = {
    f"{sampler}: {name}": low_precision(name, sampler, 5e-5, copy="second", group="other samplers")
    for sampler in ("4 bits", "5 bits", "8 bits", "bfloat16")
    for name in ("GRPO, clip 0.2", "DRPO, 0.15", "DRPO, 0.5")
}
# With more seeds, and on the test problems too, at the best rates of each: they are the same for all
ON_TEST: dict[str, Any] = {"copy": "second", "group": "final", "final": True}
FINALISTS = {f"16 updates: {name}": stale(name, 16, 2.5e-5, **ON_TEST) for name in STALE_FINALISTS} | {
    f"4 bits: {name}": low_precision(name, "4 bits", 5e-5, **ON_TEST)
    for name in PRECISION_FINALISTS
    if name != "GRPO, clip 0.2"
}
RUNS = [*(run for runs in PRECISION.values() for run in runs.values()), *STALENESS.values(), *TOO_FAST.values()]
RUNS += with_seeds(ANCHORS.values(), (0, 1, 2))
RUNS += with_seeds(FINALISTS.values(), range(5))
RUNS += OTHER_SAMPLERS.values()
RUNS += [*STALE_REGIONS.values(), *PRECISION_REGIONS.values(), *FEWER_UPDATES.values()]
RUNS += with_seeds([*STALE_RATES.values(), *SEEN_AGAIN], (0, 1))
RUNS += PRECISION_RATES.values()


DIPS = {"worst dip": lambda found: f"{found.worst_dip():.2f}"}


def regions_table(split: str = "validation") -> str:
    """Staleness and low precision, side by side would be too wide: one table each."""
    return table("drpo", STALENESS, split, first="region", extra=DIPS)


def precision_table(split: str = "validation") -> str:
    rows = {f"{sampler}: {name}": run for sampler, runs in PRECISION.items() for name, run in runs.items()}
    rows |= {f"4 bits, learning rate 3e-4: {name}": run for name, run in TOO_FAST.items()}
    return table("drpo", rows, split, first="sampler: region", extra=DIPS)


def finalists() -> str:
    return table("drpo", FINALISTS, first="mismatch: region", extra=DIPS)


def stale_rates() -> str:
    return table("drpo", STALE_RATES, "validation", first="region, learning rate", extra=DIPS)


def precision_rates() -> str:
    return table("drpo", PRECISION_RATES, "validation", first="region, learning rate", extra=DIPS)


def other_samplers() -> str:
    return table("drpo", OTHER_SAMPLERS, "validation", first="sampler: region", extra=DIPS)


def stale_regions() -> str:
    return table("drpo", STALE_REGIONS, "validation", first="region, learning rate", extra=DIPS)


def precision_regions() -> str:
    return table("drpo", PRECISION_REGIONS, "validation", first="region", extra=DIPS)


def fewer_updates() -> str:
    """Accuracy on the validation problems, one seed."""
    lines = [
        [
            f"{updates} updates: {name}",
            *(of_one_seed("drpo", stale(name, updates, rate, copy="second"), "validation") for rate in RATES),
        ]
        for updates in (4, 8, 16)
        for name in STALE_FINALISTS
    ]
    return markdown_table(["updates per batch: region", *(f"{rate:g}" for rate in RATES)], lines)


def anchors() -> str:
    return table("drpo", ANCHORS, "validation", first="sampler: region", extra=DIPS)


def draw_rates(axis: Any, rows: Mapping[str, Run], title: str) -> None:
    """Accuracy over the learning rate on the validation problems: a line for each region, a dot for each seed."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for name, row in rows.items():
        if found := summary("drpo", row, "validation"):
            region, _, rate = name.rpartition(", ")
            lines.setdefault(region, []).append((float(rate), found.values("accuracy", "validation")))
    for index, (region, points) in enumerate(lines.items()):
        colour = f"C{index}"
        axis.plot([x for x, _ in points], [fmean(values) for _, values in points], color=colour, label=region)
        for x, values in points:
            axis.plot([x] * len(values), values, "o", color=colour, markersize=3)
    axis.set(xscale="log", xlabel="learning rate")
    rates = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def draw_staleness(axis: Any) -> None:
    draw_rates(axis, STALE_RATES, "DRPO: 16 updates per batch, accuracy by learning rate")


def picture(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    draw_staleness(left)
    draw_rates(right, PRECISION_RATES, "a sampler of 4 bits, accuracy by learning rate")


TABLES = {
    "finalists": finalists,
    "staleness": regions_table,
    "precision": precision_table,
    "anchors": anchors,
    "stalerates": stale_rates,
    "precisionrates": precision_rates,
    "samplers": other_samplers,
    "staleregions": stale_regions,
    "precisionregions": precision_regions,
    "fewerupdates": fewer_updates,
}
PICTURES = {"drpo.png": picture}
