"""What an example writes to the console while it trains: a progress bar, and a line when there is something to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback


Line = Callable[[dict[str, Any]], str | None]  # of one log, which has its `step`; `None`: nothing to say


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


def quieten(trainer: Any, line: Line) -> None:
    """Replaces what the trainer prints by `line`. Trackers, and `trainer_state.json`, still have every metric."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar())
    trainer.add_callback(Lines(line))


def metrics_line(**names: str) -> Line:
    """A line with those of the metrics (label -> name of the metric) that were logged."""

    def line(logs: dict[str, Any]) -> str | None:
        shown = [f"{label.replace('_', ' ')} {logs[name]:.3f}" for label, name in names.items() if name in logs]
        return f"step {logs['step']}: {', '.join(shown)}" if shown else None

    return line
