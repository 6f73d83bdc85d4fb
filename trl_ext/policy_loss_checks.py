"""Checks of what a policy loss and a sampler return to [`PolicyLossTrainer`]."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from trl_ext.losses import TokenLoss


logger = get_logger(__name__)


def checked_token_loss(result: Any, logps: torch.Tensor, owner: str) -> TokenLoss:
    """
    What `policy_loss` returned, as a [`TokenLoss`]. Raises a `TypeError` or a `ValueError` if it would be broadcast or
    could not be trained on.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            The log-probabilities that it was given.
    """
    token_loss = TokenLoss(result) if isinstance(result, torch.Tensor) else result
    if not isinstance(token_loss, TokenLoss) or not isinstance(token_loss.loss, torch.Tensor):
        raise TypeError(
            f"{owner}.policy_loss returned a {type(result).__name__}: return a trl_ext.losses.TokenLoss, or a tensor "
            "with one loss per token."
        )
    loss = token_loss.loss
    if loss.shape != logps.shape:
        raise ValueError(
            f"{owner}.policy_loss returned a loss of shape {tuple(loss.shape)} for tokens of shape "
            f"{tuple(logps.shape)}: return one value per token, and leave the averaging to the trainer."
        )
    if torch.is_grad_enabled() and logps.requires_grad and not loss.requires_grad:
        raise ValueError(
            f"{owner}.policy_loss returned a loss without a gradient: compute it from per_token_logps, without "
            "detach() or torch.no_grad()."
        )
    for name, metric in token_loss.metrics.items():
        for values in metric if isinstance(metric, tuple) else (metric,):
            if not isinstance(values, torch.Tensor):
                raise TypeError(
                    f"{owner}.policy_loss returned the metric {name!r} as {type(values).__name__}: return a tensor."
                )
            pair = isinstance(metric, tuple)
            if values.shape not in ((logps.shape,) if pair else (logps.shape, logps.shape[:1], ())):
                what = "one value and one weight per token" if pair else "one value per token"
                or_else = "" if pair else f", or per sequence, {tuple(logps.shape[:1])}"
                raise ValueError(
                    f"{owner}.policy_loss returned the metric {name!r} in shape {tuple(values.shape)}: return {what}, "
                    f"{tuple(logps.shape)}{or_else}."
                )
    return token_loss


def check_sampler_logps(
    accelerator: Accelerator, completion_ids: list[list[int]], sampler_logps: list[list] | None, required: bool = False
) -> None:
    """
    Raises a `ValueError` on all processes for log-probabilities that cannot be the sampler's, or for missing ones
    where they are `required`.
    """
    fault = 0
    if sampler_logps is None:
        fault = 1
    elif [len(ids) for ids in completion_ids] != [len(logps) for logps in sampler_logps]:
        fault = 2
    elif all(logp == 0 for logps in sampler_logps for logp in logps):
        fault = 3
    # Either all processes raise or none does: otherwise some would wait for the others forever
    faults = accelerator.gather(torch.tensor([fault], device=accelerator.device)).tolist()
    if len(set(faults)) > 1 and {1} < set(faults):
        raise ValueError(
            "The rollouts of some processes have log-probabilities and those of others have none: return them "
            "from rollout_func on all, or None on all."
        )
    if required and 1 in faults:
        raise ValueError(
            "TRL's importance sampling correction needs the sampler's log-probabilities: return them from "
            "rollout_func as 'logprobs', or set vllm_importance_sampling_correction=False."
        )
    if 2 in faults:
        raise ValueError(
            "The rollouts' `logprobs` and `completion_ids` differ in length: return one log-probability per token "
            "(None for a token that has none), or logprobs=None for the trainer to compute them."
        )
    if 3 in faults:
        logger.warning_once(
            "All of the rollouts' `logprobs` are 0.0, which says that every token was certain to be sampled: "
            "return the sampler's, or logprobs=None for the trainer to compute them."
        )


@contextmanager
def without_advice(logger_name: str, words: str) -> Iterator[None]:
    """Drops a logger's messages that contain these words, for advice that does not apply here."""

    def other(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    adviser = logging.getLogger(logger_name)
    adviser.addFilter(other)
    try:
        yield
    finally:
        adviser.removeFilter(other)
