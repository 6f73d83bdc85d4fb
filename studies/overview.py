"""The picture of results on the README's first screen: a panel for each method whose study says how to draw it."""

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
    for axis, drawing in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        drawing(axis)


PICTURES = {"results.png": picture}
