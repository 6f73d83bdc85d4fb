"""An optimizer step without gradients, in fp16 too."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


class StepsWithoutGradients(TrainerCallback):
    """
    A skipped round makes its steps without gradients, at which fp16's scaler stops the run: for such a step a disabled
    one takes its place.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._left_out: list[tuple[Any, Any]] = []  # who has a scaler, and which

    def begin(self, optimizer: Any) -> None:
        """Leaves the scaler out of the step that is being made. `optimizer` is the trainer's."""
        if self.accelerator.scaler is None or self._left_out:
            return
        for owner in (self.accelerator, optimizer):
            self._left_out.append((owner, owner.scaler))
            owner.scaler = torch.amp.GradScaler(enabled=False)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for owner, scaler in self._left_out:
            owner.scaler = scaler
        self._left_out = []
