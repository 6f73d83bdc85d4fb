"""What every loss function returns, and the guarded log-ratio that they all start from."""

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch


# e^20 = 4.9e8: far outside any trust region, and its square still fits into float32
MAX_LOG_RATIO = 20.0

Metrics: TypeAlias = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TokenLoss:
    """
    A per-token loss, and what is worth logging about it.

    Args:
        loss (`torch.Tensor` of shape `(batch, time)`):
            Loss to minimize, in float32 or wider. Exactly 0, with an exactly zero gradient, wherever the mask is 0.
        metrics (`dict[str, torch.Tensor]`, *optional*):
            Detached values, of shape `(batch, time)` for one value per token or `(batch,)` for one per sequence. If
            its name begins or ends with `min` or `max`, a metric is reduced with that, else with the mean over the
            unmasked tokens (or over the sequences whose value is not NaN) of all processes.
            A pair holds one value per token and its weight in that mean.
    """

    loss: torch.Tensor
    metrics: Metrics = field(default_factory=dict)


class PolicyRatio(NamedTuple):
    """Current policy against the policy that sampled the tokens; float tensors of shape `(batch, time)`."""

    ratio: torch.Tensor  # r = pi / mu, differentiable
    probability: torch.Tensor  # pi, detached
    behaviour_probability: torch.Tensor  # mu, a constant
    mask: torch.Tensor  # bool, True for the tokens that count


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def policy_ratio(logps: torch.Tensor, behaviour_logps: torch.Tensor, mask: torch.Tensor) -> PolicyRatio:
    r"""
    The probability ratio \\( r = \pi / \mu = \exp(\log \pi - \log \mu) \\) and both probabilities, safe for any input.

    - The log-ratio is clamped to ±20, where its gradient is 0.
    - A token whose `behaviour_logps` is not finite (the sampler could not score it) has ratio 1 and \\( \mu = \pi \\),
      and keeps the gradient of an on-policy token.
    - A masked token has ratio 1 and an exactly zero gradient, whatever its log-probabilities.
    - A NaN of the current policy is not hidden: it makes the loss NaN.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            Log-probabilities (nats) of the sampled tokens under the current policy.
        behaviour_logps (`torch.Tensor` of shape `(batch, time)`):
            Log-probabilities (nats) under the policy that sampled the tokens. NaN where unknown.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for the tokens that count.
    """
    mask = mask.bool()
    logps = at_least_float32(logps)
    behaviour = known_or_current(behaviour_logps, logps)
    # `masked` rather than a product with the mask: 0 * inf is NaN, in the backward pass too
    ratio = masked(logps - behaviour, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return PolicyRatio(ratio, masked(logps.detach(), mask).exp(), masked(behaviour, mask).exp(), mask)


def known_or_current(other_logps: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """`other_logps` as constants, and `logps`, detached, where they are not finite. Both of shape `(batch, time)`."""
    other_logps = at_least_float32(other_logps).detach()
    # -inf - -inf is NaN, so an impossible token stands for itself only down to the smallest float
    current = logps.detach().clamp(min=torch.finfo(logps.dtype).min)
    return torch.where(other_logps.isfinite(), other_logps, current)


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where `mask` is True, else exactly 0, with an exactly zero gradient."""
    return torch.where(mask, values, torch.zeros_like(values))


def bounded_behaviour_logps(logps: torch.Tensor, behaviour_logps: torch.Tensor) -> torch.Tensor:
    """
    `behaviour_logps` where the log-ratio to `logps` is within ±20, else what makes it so: 0 where it is unknown.

    For code that takes `exp(logps - behaviour_logps)` without a guard. Both of shape `(batch, time)`, in nats.
    """
    behaviour = known_or_current(behaviour_logps, at_least_float32(logps))
    current = at_least_float32(logps.detach()).clamp(min=torch.finfo(torch.float32).min)
    log_ratio = current - behaviour
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(bounded == log_ratio, behaviour, current - bounded)


def absolute_log_ratio(logps: torch.Tensor, other_logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    \\( |\log \pi - \log \mu| \\) in nats, detached, and the weights 1 where it is known and 0 where it is not.

    Both arguments, and both results, of shape `(batch, time)`.
    """
    difference = (at_least_float32(logps) - at_least_float32(other_logps)).detach().abs()
    known = difference.isfinite()
    return masked(difference, known), known.to(difference.dtype)
