"""What must hold at every boundary between ERPD's phases, on every process."""

from types import MethodType
from typing import Any

import torch

from trl_ext.erpd.base_policy import WeightsCopy


def watch_boundaries(trainer: Any) -> None:
    """Stops `trainer` where the base policy was not restored to the bit, or the optimizer remembers something."""
    stages = trainer._stages
    begin, start = stages._begin_phase, {}

    def begin_phase(self, phase, new_round):
        begin(phase, new_round)
        weights = WeightsCopy(trainer).take().tensors
        assert all(map(torch.equal, weights, self.base.tensors)) or not self.base.tensors
        full = full_weights(trainer)
        if new_round:
            start.clear()
            start.update(full)
        assert all(torch.equal(full[name], expected) for name, expected in start.items()), phase
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        assert not optimizer.state, phase

    stages._begin_phase = MethodType(begin_phase, stages)


def full_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """As the forward pass sees them: gathered where they are sharded."""
    parameters = dict(trainer.model.named_parameters())
    if trainer.is_deepspeed_enabled and trainer.args.deepspeed_plugin.zero_stage == 3:
        from deepspeed import zero

        with zero.GatheredParameters(list(parameters.values())):
            return {name: p.detach().clone() for name, p in parameters.items()}
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in parameters.items()
    }
