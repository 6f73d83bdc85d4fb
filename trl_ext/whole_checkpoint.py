"""
Runs resume from whole checkpoints only: a run may be killed, or the disk be full, while one is written.

Used by every trainer: [`WholeCheckpoints`] comes first among its bases, as in
`class TrOPDTrainer(WholeCheckpoints, GKDTrainer)`, and replaces any search of its own for a checkpoint to resume from.
A trainer that needs files of its own to resume names them in `_required_files`.
"""

import errno
import json
import logging
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from trl_ext.adapters import adapters_kept, check_trains_something, load_active_adapters


logger = logging.getLogger(__name__)  # used by the main process alone

WRITE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip


# By transformers, accelerate, PEFT, DeepSpeed and us, without what a callback may add
WRITTEN = (
    "trainer_state.json", "*model*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*",
    "*_optim_states*", "rollouts_*", "fixed_set_*", "base_policy*", "training_args*", "*config*", "tokenizer*",
)  # fmt: skip


class WholeCheckpoints(Trainer):
    """
    A [`~transformers.Trainer`] that resumes from whole checkpoints only.

    - `train(resume_from_checkpoint=True)` takes the newest whole checkpoint in `args.output_dir` and warns of those it
      passes over. A path must be that of a whole checkpoint.
    - `trainer_state.json` is written when all processes have written everything else, so that a checkpoint that has it
      was finished.
    - A checkpoint that cannot be written (full disk, read-only folder) stops the run with an `OSError` that names the
      one to resume from.
    """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        check_trains_something(self.model, type(self).__name__)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _required_files(self) -> list[str]:
        """Files that a checkpoint must have beside TRL's own."""
        return []

    def _whole_checkpoint(self, wanted: Any) -> str:
        found: list[str | None] = [None, None]  # the checkpoint, or what is wrong: the same on all processes
        if self.accelerator.is_main_process:
            try:
                if wanted is True:
                    found[0] = newest_whole_checkpoint(str(self.args.output_dir), self._required_files())
                else:
                    check_checkpoint(str(wanted), self._required_files())
                    found[0] = str(wanted)
            except ValueError as error:
                found[1] = str(error)
        folder, fault = broadcast_object_list(found)
        if fault is not None:
            raise ValueError(fault)
        return folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # an earlier run's, in a folder used again
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_write_error(error):
                raise
            whole = next((str(path) for path in newest_first(run_folder) if fault_of(path) is None), None)
            resume = f"resume_from_checkpoint=True, from {whole}" if whole else "no checkpoint, from the start"
            raise OSError(
                f"The checkpoint {folder} could not be written ({error}): make room on the disk, or make the folder "
                f"writable, and train again with {resume}."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_sharded or not load_renamed_weights(self.model, resume_from_checkpoint):
            with adapters_kept(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        if self._is_sharded or not (
            load_renamed_weights(self.model, folder) or load_active_adapters(self.model, folder)
        ):
            super()._load_best_model()

    @property
    def _is_sharded(self) -> bool:
        """Whether the weights are loaded by what shards them, in its own way."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the main process writes trainer_state.json next


def load_renamed_weights(model: Any, folder: str) -> bool:
    """
    Loads a checkpoint of a model that transformers saves under other names than its parameters have: mixtures of
    experts and several vision-language models. Its trainer looks for the parameters' own names alone, and leaves what
    it does not find as it is. Returns whether this was such a checkpoint; of others nothing is loaded.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files:  # an adapter
        return False
    saved: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as content:
            saved |= set(content.keys())
    if saved <= set(model.state_dict()):
        return False
    loaded = type(model).from_pretrained(folder, dtype="auto", device_map="cpu")
    model.load_state_dict(loaded.state_dict())
    return True


def newest_whole_checkpoint(output_dir: str, required: list[str] | tuple[str, ...] = ()) -> str:
    """The newest checkpoint in `output_dir` that was written whole. Raises a `ValueError` if there is none."""
    for folder in newest_first(Path(output_dir)):
        if fault := fault_of(folder, required):
            logger.warning(f"{folder} is passed over, because {fault}: an earlier checkpoint is resumed from.")
            continue
        return str(folder)
    raise ValueError(f"There is no whole checkpoint in {output_dir} to resume from: train from the start.")


def check_checkpoint(path: str, required: list[str] | tuple[str, ...] = ()) -> None:
    """Raises a `ValueError` that names the file and a way out, where a checkpoint cannot be resumed from."""
    folder = Path(path)
    fault = fault_of(folder, required) if folder.is_dir() else "there is no such folder"
    if fault:
        or_delete = ", or delete that file to sample new rollouts" if "rollouts_" in fault else ""
        raise ValueError(
            f"The run cannot resume from {path}, because {fault}: name another checkpoint, or pass "
            f"resume_from_checkpoint=True for the newest whole one in output_dir{or_delete}."
        )


def newest_first(run_folder: Path) -> list[Path]:
    """The `checkpoint-{step}` folders of a run."""
    folders = [folder for folder in run_folder.glob("checkpoint-*") if folder.name[11:].isdigit() and folder.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True)


def fault_of(folder: Path, required: list[str] | tuple[str, ...] = ()) -> str | None:
    """Why a checkpoint is not whole, as a clause with the file's name, or `None`: no file is read beyond its index."""
    for name in (TRAINER_STATE_NAME, *required):
        if not (folder / name).exists():
            why = "the run was stopped while it wrote it, had save_only_model=True, or is another trainer's"
            return f"{name} is missing ({why})"
    for file in sorted(folder.rglob("*")):
        if file.suffix not in _READERS or not any(fnmatch(file.name, pattern) for pattern in WRITTEN):
            continue
        try:
            _READERS[file.suffix](file)
        except _Missing as missing:
            return f"{missing} is missing"
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError):
            return f"{file.relative_to(folder)} is cut short or damaged"
    return None


def is_write_error(error: Exception) -> bool:
    """Whether the disk or the folder is at fault. torch and safetensors have errors of their own for that."""
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "os error" in str(error)
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRORS
    return any(words in str(error) for words in ("PytorchStreamWriter", "inline_container", "Parent directory"))


class _Missing(Exception):
    pass


def _read_json(file: Path) -> None:
    content = json.loads(file.read_bytes())
    if file.name.endswith(".index.json"):  # of weights in several files
        for name in sorted(set(content["weight_map"].values())):
            if not (file.parent / name).exists():
                raise _Missing(name)


def _read_safetensors(file: Path) -> None:
    with safe_open(file, framework="pt"):
        pass  # compares the file's length with its index


def _read_torch(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(2)
    if start in (b"", b"PK"):  # torch's own format is a zip file, whose index is at its end
        zipfile.ZipFile(file).close()


_READERS: dict[str, Callable[[Path], None]] = {
    ".json": _read_json,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}
