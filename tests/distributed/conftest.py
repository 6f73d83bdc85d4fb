"""Launches worker.py as a user would launch a script, once for all the tests that need a launch of that kind."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed_cases import CASES, LAYOUTS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "examples" / "accelerate_configs"


def run_worker(file: str, runs: list[tuple[str, str]], paths: Path, out: Path) -> str:
    """
    Runs `worker.py` and returns the end of what it wrote to stderr.

    Args:
        file (`str`):
            `"one"` for one process without accelerate's launcher, or the name of a file of examples/accelerate_configs
            for two.
        runs (`list[tuple[str, str]]`):
            Names of layouts and of cases of distributed_cases.py.
        paths (`Path`):
            Folder of the student and the teachers.
        out (`Path`):
            Folder to write to.
    """
    command = [sys.executable]
    if file != "one":
        command += ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{file}.yaml"]
        command += ["--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0]
    command += [HERE / "worker.py", "--paths", paths, "--out", out, "--runs", *map("/".join, runs)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900, env=environment)
    return "\n".join(result.stderr.splitlines()[-60:])


class Results:
    """
    What the runs under one layout have written.

    Args:
        out (`Path`):
            Folder of the layout.
        ending (`str`):
            The end of what their processes wrote to stderr.
    """

    def __init__(self, out: Path, ending: str) -> None:
        self.out, self.ending = out, ending

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


def save_adapter(model: Path, folder: Path) -> None:
    """A random adapter of the model, as `teacher_model` can name it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)


@pytest.fixture(scope="session")
def launch(request, tmp_path_factory) -> Callable[[str], Results]:
    """
    The results under a layout, of the cases that the selected tests ask for: `layout` and `case` are their parameters.
    Layouts with the same file of accelerate share one launch.
    """
    paths = tmp_path_factory.mktemp("models")
    tiny.save_policy(paths / "student")
    tiny.save_policy(paths / "teacher", seed=1, hidden_size=48, vocab_size=64)
    save_adapter(paths / "student", paths / "adapter")
    items = [item for item in request.session.items if HERE in item.path.parents and hasattr(item, "callspec")]
    selected = [item.callspec.params for item in items if "case" in item.callspec.params]
    runs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for params in selected:
        if CASES[params["case"]].fault is None:  # else there is nothing to compare
            runs["one"].append(("one", params["case"]))
        runs[LAYOUTS[params["layout"]].file].append((params["layout"], params["case"]))
    launches: dict[str, tuple[Path, str]] = {}

    def of(layout: str) -> Results:
        file = "one" if layout == "one" else LAYOUTS[layout].file
        if file not in launches:
            out = tmp_path_factory.mktemp(file)
            launches[file] = out, run_worker(file, [*dict.fromkeys(runs[file])], paths, out)
        out, ending = launches[file]
        return Results(out / layout, ending)

    return of
