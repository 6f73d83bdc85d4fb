"""
Writes docs/support.md from the tests: each test that shows that a trainer works in a situation says so with
`@pytest.mark.supports(trainer, situation)`, or with `refused=True` that the trainer refuses it in one sentence.

    python scripts/support_table.py           # after a test was added, renamed or removed
    python scripts/support_table.py --check   # exit status 1 where the page is not what the tests say
"""

import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
TRAINERS = {"drpo": "DRPOTrainer", "rlad": "RLADTrainer", "tropd": "TrOPDTrainer", "erpd": "ERPDTrainer"}

# Titles of the tables, and the situations of each in the order of its rows. A marker that names another one is an
# error.
LAYOUTS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, SHARDED_STATE_DICT", "FSDP1")
TABLES = {
    "Two processes train what one process trains": (
        *LAYOUTS,
        *(f"{layout}, LoRA" for layout in ("ZeRO-2", "ZeRO-3", "FSDP2")),
        "FSDP2, LoRA with a trained head",
        "FSDP1, LoRA",
    ),
    "Resuming, to the bit": (
        "one process: resuming",
        *(f"{layout}: resuming" for layout in LAYOUTS),
        *(f"{layout}, LoRA: resuming" for layout in ("ZeRO-2", "ZeRO-3", "FSDP2")),
        "vLLM colocated: resuming",
        "killed with SIGKILL",
    ),
    "vLLM": (
        "vLLM colocated, float32",
        "vLLM colocated, bfloat16",
        "vLLM colocated, LoRA",
        "vLLM colocated, two processes",
        "vLLM colocated, tensor parallel 2",
        "vLLM colocated, sleep mode",
        "vLLM server, weights through a file",
        "vLLM server, weights through NCCL",
        "vLLM as teacher server",
    ),
    "Precision": ("bfloat16 autocast", "float16 autocast"),
    "PEFT": (
        "LoRA (all-linear)",
        "DoRA",
        "rsLoRA",
        "LoRA, modules_to_save",
        "LoRA, an existing adapter",
        "LoRA, an adapter as teacher",
    ),
    "Rollouts": (
        "tool loop",
        "environment_factory",
        "multi-turn rollout_func",
        "vision-language model",
    ),
    "Devices": ("GPU",),
}

# Cells, or with `None` rows, that no test can fill.
NO_TEACHER = "has no teacher of this kind"
NOT_APPLICABLE = {
    ("vLLM as teacher server", "drpo"): NO_TEACHER,
    ("vLLM as teacher server", "erpd"): "has its own teachers",
    ("LoRA, an adapter as teacher", "drpo"): NO_TEACHER,
    ("LoRA, an adapter as teacher", "erpd"): "has its own teachers",
    ("tool loop", "tropd"): "no: GKDTrainer has none",
    ("environment_factory", "tropd"): "no: GKDTrainer has none",
    ("multi-turn rollout_func", "tropd"): "no: GKDTrainer has none",
    ("vLLM server, weights through NCCL", None): "not yet run: needs a GPU",
    ("vLLM colocated, sleep mode", None): "not yet run: needs a GPU",
    ("GPU", None): "not yet run",
}
NOT_RUN = "not run"

# What `scripts/test_versions.py` printed: the versions, and what was run with them.
VERSIONED = (
    *("torch", "trl", "transformers", "peft", "datasets", "accelerate", "deepspeed", "tests that passed", "date"),
)
VERSIONS = {
    "lowest": (
        *("2.10.0", "1.16.0", "5.23.0", "0.20.0", "4.7.0", "1.15.0", "0.18.6"),
        "2439, two of them in a second run, for the wording of an error",
        "2026-11-28",
    ),
    "newest": (
        *("2.14.1", "1.16.0", "5.24.0", "0.21.2", "5.2.0", "1.15.0", "0.19.8"),
        "2439, and none failed",
        "2026-11-28",
    ),
}

HEAD = """\
# What was run

Written by [`scripts/support_table.py`](../scripts/support_table.py) from the markers of the tests; do not edit.

Each *runs* links to the test that trains in that situation and compares the result with what must come out; the title
of the link is the test's name. All of them run on a CPU, with models of a few thousand parameters and the real
DeepSpeed, FSDP and PEFT. The tests with vLLM itself need an environment of their own, which
[`scripts/vllm_environment.sh`](../scripts/vllm_environment.sh) makes, and are skipped elsewhere. *refused* links to
the test of the error, which says what to do instead. *runs (release)* is a test that takes longer and is run before a
release alone, with `pytest -m release`. *not run* means that no test has tried it.
"""


VERSIONS_HEAD = """\
## Versions

The lowest versions that `pyproject.toml` allows and the newest there are, by
[`scripts/test_versions.py`](../scripts/test_versions.py), with the whole suite. Every other run has the versions of
[`constraints.txt`](../constraints.txt), which lie in between. What was found below the bounds: with PyTorch 2.9 FSDP2
computes another norm of the gradient, and with 2.8 and older another gradient of a sharded LM head; with accelerate
1.10 FSDP2 trains something else, and with 1.13 LoRA does not resume exactly; PEFT 0.19 fails to import.

"""


class Evidence(NamedTuple):
    """A test: its file, its name, and what it shows."""

    path: str
    name: str
    word: str


class Collector:
    """Collects the markers of all tests without running them."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], list[Evidence]] = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for marker in item.iter_markers("supports"):
                trainer, situation = marker.args
                path = item.path.relative_to(ROOT).as_posix()
                word = "refused" if marker.kwargs.get("refused") else "runs"
                release = " (release)" if item.get_closest_marker("release") else ""
                test = Evidence(path, item.name.replace('"', "'"), word + release)
                if test not in self.cells[situation, trainer]:
                    self.cells[situation, trainer].append(test)


def collect() -> dict[tuple[str, str], list[Evidence]]:
    """The tests of each situation and trainer, those that are run before a release alone last."""
    collector = Collector()
    options = ["--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(ROOT / "tests")]
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(options, plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit("The tests cannot be collected: run `pytest --collect-only tests` to see why.")
    situations = {situation for rows in TABLES.values() for situation in rows}
    for situation, trainer in collector.cells:
        if situation not in situations or trainer not in TRAINERS:
            raise SystemExit(
                f"@pytest.mark.supports({trainer!r}, {situation!r}) is in no table of {Path(__file__).name}: "
                "correct it, or add the situation there."
            )
    return {key: sorted(tests, key=lambda test: "release" in test.word) for key, tests in collector.cells.items()}


def cell(tests: list[Evidence], situation: str, trainer: str) -> str:
    if not tests:
        default = NOT_APPLICABLE.get((situation, None), NOT_RUN)
        return NOT_APPLICABLE.get((situation, trainer), default)
    links = []
    for number, test in enumerate(tests[:3]):
        word = test.word if number == 0 else str(number + 1)
        links.append(f'[{word}](../{test.path} "{test.name}")')
    return " ".join(links)


def page() -> str:
    cells = collect()
    parts = [HEAD]
    for title, situations in TABLES.items():
        rows = {
            situation: [cell(cells.get((situation, trainer), []), situation, trainer) for trainer in TRAINERS]
            for situation in situations
        }
        parts.append(f"## {title}\n\n" + table([*TRAINERS.values()], rows))
    parts.append(VERSIONS_HEAD + "\n" + table(VERSIONED, VERSIONS))
    return "\n".join(parts)


def table(titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """In Markdown: a column for each title, after that of the rows' names."""
    lines = [("", *titles), ("---",) * (len(titles) + 1), *((name, *cells) for name, cells in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise SystemExit("docs/support.md is not what the tests say: run python scripts/support_table.py.")


if __name__ == "__main__":
    main()
