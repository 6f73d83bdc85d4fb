"""What an example writes to the console while it trains: a progress bar, and one line per event."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback


Line = Callable[[dict[str, Any]], str | None]  # of one log, with its `step`; `None`: nothing to say


class ProgressBar(ProgressCallback):
    """The progress bar alone."""

    def on_log(self, *args, **kwargs):
        pass


class Lines(TrainerCallback):
    """One line, made by `line`, in place of the whole dictionary of a log."""

    def __init__(self, line: Line) -> None:
        self.line = line

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (text := self.line({**(logs or {}), "step": state.global_step})):
            tqdm.write(text)


def quieten(trainer: Any, line: Line | None = None) -> None:
    """Replaces what the trainer prints by `line`. Trackers, and `trainer_state.json`, still have every metric."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar())
    if line is not None:
        trainer.add_callback(Lines(line))


TRLS_NAMES = "is_gradient_checkpointing|gradient_checkpointing_enable|gradient_checkpointing_disable"


def ignore_deprecated_names() -> None:
    """Hides the warnings of names that TRL uses and transformers deprecates: no setting avoids them."""
    warnings.filterwarnings("ignore", message=f"`({TRLS_NAMES})` is deprecated", category=FutureWarning)
