"""What an example shows at the end: a small table and a picture of the curves, of one run or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """What is reported of one training run."""

    name: str
    log_history: list[dict[str, Any]]  # `trainer.state.log_history`
    measures: dict[str, tuple[float, float]]  # what was measured -> (before, after)
    updates: int = 0
    seconds: float = 0.0  # of training alone
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One plot: the logged values `keys`, each with its label, over the updates."""

    title: str
    keys: Mapping[str, str]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers as `0.123`, columns padded so that the table reads in a terminal too."""
    cells = [list(header)]
    cells += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def results_table(runs: Sequence[Run]) -> str:
    """A line for every run and measure, and the settings of each run below."""
    rows = [
        [run.name, measure, *values, run.updates, f"{run.seconds:.0f}"]
        for run in runs
        for measure, values in run.measures.items() or [("(not evaluated)", ("", ""))]
    ]
    table = markdown_table(["run", "measure", "before", "after", "updates", "seconds"], rows)
    settings = [
        f"{run.name}: " + ", ".join(f"{name}={value}" for name, value in run.settings.items())
        for run in runs
        if run.settings
    ]
    return "\n".join([table, *settings])


NO_MATPLOTLIB = "No picture was drawn, because matplotlib is not installed: pip install matplotlib"


def load_pyplot() -> Any:
    """`matplotlib.pyplot` for writing files, without a display, or `None` where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_curves(runs: Sequence[Run], path: str | Path, panels: Sequence[Panel]) -> str:
    """
    Writes a PNG with those panels of which something was logged, and says so: returns the sentence to print.

    A run keeps its colour in all panels; the values of a panel differ by line style.
    """
    plt = load_pyplot()
    if plt is None:
        return NO_MATPLOTLIB
    panels = [p for p in panels if any(_curve(run, key)[0] for run in runs for key in p.keys)]
    if not panels:
        return "No picture was drawn, because nothing was logged: lower logging_steps below the number of updates."
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(4.6 * columns, 3.2 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for index, run in enumerate(runs):
            for (key, label), style in zip(panel.keys.items(), ("-", "--", ":", "-."), strict=False):
                steps, values = _curve(run, key)
                if steps:
                    name = ", ".join([run.name] * (len(runs) > 1) + [label] * (len(panel.keys) > 1))
                    marker = "." if len(steps) == 1 else None
                    axis.plot(steps, values, style, color=f"C{index}", label=name or None, marker=marker)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Curves: {path}"


def _curve(run: Run, key: str) -> tuple[list[float], list[float]]:
    points = [(log["step"], log[key]) for log in run.log_history if log.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]
