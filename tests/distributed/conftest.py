"""Launches worker.py as a user would launch a script, once for all the tests that need a launch of that kind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file


HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "examples" / "accelerate_configs"


class Launch:
    """
    What one launch has written of each of its cases.

    Args:
        layout (`str`):
            `"one"` for one process without accelerate's launcher, or the name of a file of examples/accelerate_configs
            for two.
        cases (`list[str]`):
            Names of `distributed_cases.CASES`.
        paths (`Path`):
            Folder of the student and the teacher.
        out (`Path`):
            Folder to write to.
    """

    def __init__(self, layout: str, cases: list[str], paths: Path, out: Path) -> None:
        self.out = out
        command = [sys.executable]
        if layout != "one":
            command += ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{layout}.yaml"]
            command += ["--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0]
        command += [HERE / "worker.py", "--paths", paths, "--out", out, "--cases", *cases]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900, env=environment)
        self.ending = "\n".join(result.stderr.splitlines()[-60:])

    def error(self, case: str) -> str | None:
        """The traceback of the first process on which the case has failed; `None` where it has not."""
        errors = sorted((self.out / case).glob("error_*.txt"))
        return errors[0].read_text() if errors else None

    def weights(self, case: str, folder: str = "final") -> dict[str, torch.Tensor]:
        """The weights that were saved: of the whole model, or of the adapter."""
        if (error := self.error(case)) is not None:
            pytest.fail(error, pytrace=False)
        files = list((self.out / case / folder).glob("*.safetensors"))
        assert files, f"{case} has not come to its end:\n{self.ending}"
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def logs(self, case: str) -> list[dict[str, Any]]:
        """What was logged at each step."""
        return torch.load(self.out / case / "logs.pt")


@pytest.fixture(scope="session")
def launch(request, tmp_path_factory) -> Callable[[str], Launch]:
    """The launch of a layout, made once, with the cases that the selected tests ask for: `case` is their parameter."""
    paths = tmp_path_factory.mktemp("models")
    tiny.save_policy(paths / "student")
    tiny.save_policy(paths / "teacher", seed=1, hidden_size=48, vocab_size=64)
    items = [item for item in request.session.items if HERE in item.path.parents and hasattr(item, "callspec")]
    selected = [item.callspec.params for item in items if "case" in item.callspec.params]
    launches: dict[str, Launch] = {}

    def of(layout: str) -> Launch:
        if layout not in launches:
            cases = [params["case"] for params in selected if layout in ("one", params["layout"])]
            launches[layout] = Launch(layout, [*dict.fromkeys(cases)], paths, tmp_path_factory.mktemp(layout))
        return launches[layout]

    return of
