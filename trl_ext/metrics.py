"""Means, minima and maxima of per-token values over micro-batches and processes, without a host synchronisation."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from trl_ext.losses.token_loss import Metrics


class TokenMetrics:
    """
    Collects per-token metrics on the device, and returns them as floats when they are logged.

    `update` adds a micro-batch, `reduce` ends an optimizer step (one small collective, which every process must
    reach), `pop` returns the values since the last `pop`: the only place that waits for the device. In a mean,
    every token has the same weight, whatever micro-batch or process it was in.
    """

    def __init__(self) -> None:
        self._local: dict[str, torch.Tensor] = {}  # name -> (2,): sum and count, or extreme and count
        self._reduced: list[dict[str, torch.Tensor]] = []

    def update(self, metrics: Metrics, mask: torch.Tensor) -> None:
        """
        Args:
            metrics (`dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]`):
                As in [`~trl_ext.losses.TokenLoss`]: of shape `(batch, time)` or `(batch,)`, or values and weights.
            mask (`torch.Tensor` of shape `(batch, time)`):
                Non-zero for the tokens that count.
        """
        mask = mask.bool()
        for name, values in metrics.items():
            if isinstance(values, tuple):
                values, weights = (torch.where(mask, part.detach(), 0.0) for part in values)
                # Not only a product: what has no weight may be infinite
                self._add(name, torch.where(weights > 0, values * weights, 0.0).sum(), weights.sum())
                continue
            values = values.detach()
            valid = mask if values.dim() == 2 else ~values.isnan()
            value = _FOLD[_reduction(name)](torch.where(valid, values, _NEUTRAL[_reduction(name)]).flatten())
            self._add(name, value, valid.sum())

    def _add(self, name: str, value: torch.Tensor, count: torch.Tensor) -> None:
        stats = torch.stack([value.float(), count.float()])
        if name in self._local:
            stats = _fold(name, torch.stack([self._local[name], stats]))
        self._local[name] = stats

    def reduce(self, accelerator: Accelerator) -> None:
        """Ends an optimizer step: folds what `update` saw on all processes."""
        if self._local:
            names = sorted(self._local)
            gathered = accelerator.gather(torch.stack([self._local[name] for name in names])[None])
            self._reduced.append({name: _fold(name, gathered[:, i]) for i, name in enumerate(names)})
            self._local = {}

    def pop(self) -> dict[str, float]:
        """Everything reduced since the last call, NaN for a metric that no token contributed to."""
        names = sorted({name for step in self._reduced for name in step})
        if not names:
            return {}
        stats = [_fold(name, torch.stack([step[name] for step in self._reduced if name in step])) for name in names]
        self._reduced = []
        values = torch.stack(stats).tolist()
        return {
            name: float("nan") if not count else value / count if _reduction(name) == "mean" else value
            for name, (value, count) in zip(names, values, strict=True)
        }


_FOLD: dict[str, Callable[..., torch.Tensor]] = {"mean": torch.sum, "min": torch.amin, "max": torch.amax}
_NEUTRAL = {"mean": 0.0, "min": float("inf"), "max": float("-inf")}


def _reduction(name: str) -> str:
    words = name.split("/")[-1].split("_")
    return next((word for word in (words[0], words[-1]) if word in ("min", "max")), "mean")


def _fold(name: str, stats: torch.Tensor) -> torch.Tensor:
    """(n, 2) values and counts -> (2,)."""
    return torch.stack([_FOLD[_reduction(name)](stats[:, 0]), stats[:, 1].sum()])
