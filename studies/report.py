"""
Makes the tables and pictures of docs/ from the results of the studies.

    python -m studies.report

A study module may have `TABLES`, functions that return Markdown, by name, and `PICTURES`, functions that draw on a
matplotlib figure, by file name. In docs/**/*.md the table `frontier` of `studies/erpd.py` stands between
`<!-- studies erpd frontier -->` and `<!-- end -->`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import studies  # noqa: F401, the path of the examples
from common.report import load_pyplot


DOCS = Path(__file__).parents[1] / "docs"
STUDIES = ("drpo", "rlad", "tropd", "erpd")
BLOCK = re.compile(r"(<!-- studies (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The page with its tables updated."""

    def updated(block: re.Match[str]) -> str:
        tables = importlib.import_module(f"studies.{block[2]}").TABLES
        return f"{block[1]}{tables[block[3]]()}\n{block[4]}"

    return BLOCK.sub(updated, text)


def draw(study: str, folder: Path) -> list[str]:
    """Names of the pictures of a study, drawn into `folder`."""
    plt = load_pyplot()
    if plt is None:
        raise ImportError("The pictures need matplotlib: pip install matplotlib")
    pictures: dict[str, Any] = getattr(importlib.import_module(f"studies.{study}"), "PICTURES", {})
    for name, drawing in pictures.items():
        figure = plt.figure(figsize=(10, 3.8), layout="constrained")
        drawing(figure)
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / name, dpi=100)
        plt.close(figure)
    return list(pictures)


def main() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if (new := with_tables(text)) != text:
            page.write_text(new)
            print(f"{page.name}: tables updated")
    for study in (*STUDIES, "overview"):
        if (Path(__file__).parent / f"{study}.py").is_file():
            for name in draw(study, DOCS / "images"):
                print(f"docs/images/{name}")


if __name__ == "__main__":
    main()
