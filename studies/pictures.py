"""The two kinds of picture: a measure by method as dots, and accuracy against divergence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.runs import Run
from studies.tables import summary


def dots(axis: Any, study: str, rows: Mapping[str, Run], title: str, measure: str, split: str = "test") -> None:
    """A line for each method: every seed as a dot, the mean as a bar. Our own methods come first, in colour."""
    found = [(name, s.values(measure, split)) for name, run in rows.items() if (s := summary(study, run, split))]
    for place, (name, values) in enumerate(found):
        colour = "C0" if name.split(",")[0].split()[0] in OURS else "0.45"
        axis.plot(values, [place] * len(values), "o", color=colour, markersize=4)
        axis.plot(sum(values) / len(values), place, "|", color=colour, markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)


OURS = {"DRPO", "RLAD", "TrOPD", "ERPD"}


def frontier(axis: Any, study: str, curves: Mapping[str, Mapping[str, Run]], title: str, split: str = "test") -> None:
    """Accuracy over KL to the base: the runs of a curve in the order given, each with its label."""
    for index, (name, rows) in enumerate(curves.items()):
        found = [(label, s) for label, run in rows.items() if (s := summary(study, run, split))]
        points = [(s.mean("kl_to_base", split), s.mean("accuracy", split)) for _, s in found]
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), "o-", color=f"C{index}", label=name, markersize=5, alpha=0.9)
        for (label, _), point in zip(found, points, strict=True):
            axis.annotate(label, point, fontsize=7, xytext=(4, -3), textcoords="offset points")
    axis.set(xlabel="KL to base, nats per sequence", ylabel="accuracy, sampled")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
