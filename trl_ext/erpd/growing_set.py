"""The rollouts of a round on disk while they are sampled, so that an interrupted run keeps what it has."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from trl_ext.erpd.fixed_set import Row
from trl_ext.rollout_checkpoint import read_batches, read_metadata, write_batches


logger = get_logger(__name__)


class GrowingSet:
    """
    One folder for each generation of a round, each with one file per process, which exists only once it is whole.

    Args:
        run_folder (`str`):
            The run's output directory. The rollouts go to `run_folder/_rollouts/round-{number}`.
        round_number (`int`):
            From 1.
        identity (`dict[str, Any]`):
            What a run must have in common with the one that sampled these rollouts to continue with them.
        accelerator ([`~accelerate.Accelerator`]):
            Says which process this is.
    """

    def __init__(self, run_folder: str, round_number: int, identity: dict[str, Any], accelerator: Accelerator) -> None:
        self.folder = rollouts_folder(run_folder, round_number)
        self.identity = json.loads(json.dumps(identity))  # in the form in which it is read again
        self.accelerator = accelerator

    def begin(self, resume_from: str | None) -> int:
        """
        Prepares the folder, and returns the number of generations that need not be sampled again.

        Args:
            resume_from (`str`, *optional*):
                Output directory of the run that is resumed. `None` for a run from the start, which sets aside what an
                earlier run left.
        """
        if resume_from is None:
            self._set_aside("of an earlier run, which resume_from_checkpoint=True would continue with, ")
            return 0
        source = rollouts_folder(resume_from, int(self.folder.name.split("-")[1]))
        if source.resolve() != self.folder.resolve():
            if self.accelerator.is_local_main_process and source.exists():
                shutil.copytree(source, self.folder, dirs_exist_ok=True)
            self.accelerator.wait_for_everyone()
        whole = 0
        while self._file(whole).exists():
            whole += 1
        differing = self._differing_settings() if whole else ""
        counts = torch.tensor([[whole, 0 if differing else whole]], device=self.accelerator.device)
        found, usable = self.accelerator.gather(counts).T.tolist()
        if max(found) and not min(usable):  # the same on all processes
            self._set_aside(f"that do not fit this run ({differing or 'on another process'}) ")
        return min(usable)

    def write(self, number: int, rows: list[Row], rewards: torch.Tensor, progress: dict[str, Any]) -> None:
        """Adds this process's `rows` of a generation, and the rewards of all processes, in one atomic step."""
        file = self._file(number)
        unfinished = file.with_suffix(".unfinished")
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(progress)}
        write_batches(unfinished, [{"rewards": rewards.cpu()}, *rows], metadata)
        os.replace(unfinished, file)

    def read(self, number: int) -> tuple[list[Row], torch.Tensor, dict[str, Any]]:
        """What `write` was given."""
        first, *rows = read_batches(self._file(number), torch.device("cpu"))
        return rows, first["rewards"], json.loads(read_metadata(self._file(number))["progress"])

    def generation_folder(self, number: int) -> str:
        return str(self.folder / f"generation-{number:05d}")

    def _file(self, number: int) -> Path:
        return Path(self.generation_folder(number)) / f"rollouts_{self.accelerator.process_index}.safetensors"

    def _differing_settings(self) -> str:
        theirs = json.loads(read_metadata(self._file(0))["identity"])
        names = [name for name in self.identity if theirs.get(name) != self.identity[name]]
        return ", ".join(f"{name} {theirs.get(name)} -> {self.identity[name]}" for name in names)

    def _set_aside(self, what: str) -> None:
        if self.accelerator.is_local_main_process:
            set_aside(self.folder, what)
        self.accelerator.wait_for_everyone()


def set_aside(folder: Path, what: str) -> None:
    """Renames a folder of rollouts, which are not to be used."""
    taken = folder.with_name(f"{folder.name}.{uuid4().hex}")
    try:
        folder.rename(taken)
    except FileNotFoundError:  # there is none, or another machine has renamed it
        return
    old = folder.with_name(f"{folder.name}.old")
    logger.warning(f"Rollouts {what}are kept in {old}, and the prompts are sampled again.")
    shutil.rmtree(old, ignore_errors=True)
    taken.rename(old)


def set_aside_later_rounds(run_folder: str, accelerator: Accelerator) -> None:
    """What a run leaves of later rounds must not be taken for those of a run that starts anew in its folder."""
    if accelerator.is_local_main_process:
        for folder in rollouts_folder(run_folder, 1).parent.glob("round-*"):
            if folder.suffix == "" and folder != rollouts_folder(run_folder, 1):
                set_aside(folder, "of a later round of an earlier run ")
    accelerator.wait_for_everyone()


def rollouts_folder(run_folder: str, round_number: int) -> Path:
    """Below a folder whose name begins with `_`, which transformers does not push to the Hub."""
    return Path(run_folder) / "_rollouts" / f"round-{round_number}"


def has_rollouts(run_folder: str, accelerator: Accelerator) -> bool:
    """Whether a run in this folder was interrupted while or after it sampled its first set. Same on all processes."""
    found = any(rollouts_folder(run_folder, 1).glob(f"generation-00000/rollouts_{accelerator.process_index}.*"))
    return bool(accelerator.gather(torch.tensor([found], device=accelerator.device)).all())


def remove_rollouts(run_folder: str, round_number: int, accelerator: Accelerator) -> None:
    """Removes the rollouts of a round that is over, and its folder if nothing else is in it."""
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        folder = rollouts_folder(run_folder, round_number)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # it is gone, or something else is in it
            folder.parent.rmdir()
