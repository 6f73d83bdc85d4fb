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


def dots_by_group(axis: Any, study: str, groups: Mapping[str, Mapping[str, Run]], title: str, measure: str) -> None:
    """As `dots`, on the test problems, with a colour for each group: a task, or a pair of student and teacher."""
    methods = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    for index, (group, rows) in enumerate(groups.items()):
        for name, run in rows.items():
            if found := summary(study, run):
                values = found.values(measure)
                place = methods.index(name) + 0.2 * (index - (len(groups) - 1) / 2)
                label = group if name == methods[0] else None
                axis.plot(values, [place] * len(values), "o", color=f"C{index}", markersize=3)
                axis.plot(
                    sum(values) / len(values),
                    place,
                    "|",
                    color=f"C{index}",
                    markersize=10,
                    markeredgewidth=2,
                    label=label,
                )
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


OURS = {"DRPO", "RLAD", "TrOPD", "ERPD"}
