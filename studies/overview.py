"""One picture of all methods: a panel for each whose study says how to draw it."""

import importlib
from typing import Any


PANELS = {"erpd": "draw_frontier", "drpo": "draw_staleness", "tropd": "draw_pairs", "rlad": "draw_methods"}


def picture(figure: Any) -> None:
    drawings = []
    for study, name in PANELS.items():
        try:
            drawings.append(getattr(importlib.import_module(f"studies.{study}"), name))
        except (ImportError, AttributeError):
            continue
    figure.set_size_inches(10, 7.6)
    axes = figure.subplots(2, 2).ravel()
    for axis, drawing in zip(axes, drawings, strict=False):
        drawing(axis)
        axis.title.set_fontsize(7)
    for axis in axes[len(drawings) :]:
        axis.remove()


PICTURES = {"results.png": picture}
