"""Saves the rollouts that are still to be trained on, so that a run resumes exactly between two generations."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file


logger = get_logger(__name__)

Batches = list[dict[str, Any]]  # one dict a micro-batch: tensors, lists of numbers, None


def save_rollouts(folder: str, batches: Batches, step: int, run: dict[str, Any], process_index: int) -> None:
    """
    Writes one process's rollouts to `folder/rollouts_{process_index}.safetensors`.

    Args:
        step (`int`):
            Number of micro-batches that the run has consumed, which says where in `batches` it stands.
        run (`dict[str, Any]`):
            What a run that goes on with these rollouts must have in common with this one.
    """
    try:
        write_batches(_path(folder, process_index), batches, {"step": str(step), "run": json.dumps(run)})
    except TypeError as error:
        logger.warning(
            f"The rollouts in use are not in this checkpoint, from which the run resumes but not exactly, because a "
            f"batch holds what is neither a tensor nor plain data ({error}): make it a tensor."
        )


def load_rollouts(
    folder: str, run: dict[str, Any], process_index: int, device: torch.device
) -> tuple[Batches, int] | None:
    """What `save_rollouts` wrote: the batches and the step. `None` where there is nothing that fits this `run`."""
    path = _path(folder, process_index)
    if not path.exists():
        return None
    theirs = json.loads(read_metadata(path)["run"])
    if theirs != run:
        changes = ", ".join(f"{k} {theirs.get(k)} -> {run.get(k)}" for k in run if theirs.get(k) != run.get(k))
        logger.warning(
            f"The checkpoint's rollouts do not fit this run ({changes}) and are sampled anew: it resumes, but not "
            "exactly."
        )
        return None
    return read_batches(path, device), int(read_metadata(path)["step"])


def remove_rollouts(folder: str, process_index: int) -> None:
    """Removes what an earlier run left in a folder that is used again."""
    _path(folder, process_index).unlink(missing_ok=True)


def _path(folder: str, process_index: int) -> Path:
    return Path(folder) / f"rollouts_{process_index}.safetensors"


def write_batches(path: Path, batches: Batches, metadata: dict[str, str]) -> None:
    """Writes batches of tensors and plain data, and whatever else is worth a string, as safetensors."""
    tensors, others = {}, []
    for i, batch in enumerate(batches):
        others.append({name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)})
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{i}/{name}"] = value.contiguous().clone()  # slices of one rollout batch share its memory
    metadata = {**metadata, "others": json.dumps(others)}
    path.parent.mkdir(parents=True, exist_ok=True)  # the main process may not have come to it yet
    save_file(tensors, path, metadata=metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that `write_batches` was given."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def read_batches(path: Path, device: torch.device) -> Batches:
    """The batches that `write_batches` was given."""
    with safe_open(path, framework="pt") as file:
        batches: Batches = json.loads(file.metadata()["others"])
        for key in file.keys():  # noqa: SIM118 - not a mapping
            index, name = key.split("/", 1)
            batches[int(index)][name] = file.get_tensor(key).to(device)
    return batches
