"""A measure by method, as dots."""

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
