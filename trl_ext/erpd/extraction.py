"""The objectives of stage 1 as one table: a new one takes a function in `trl_ext/losses/erpd.py` and a row here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_ext.losses import TokenLoss, reward_cross_entropy_loss, reward_regression_loss, sapo_loss


@dataclass(frozen=True)
class Rollouts:
    """
    What an objective of stage 1 may read about a micro-batch of the fixed set.

    Args:
        logps, base_logps, behaviour_logps, mask (`torch.Tensor` of shape `(batch, time)`):
            Log-probabilities (nats) under the current policy, the base policy and the policy that sampled the tokens,
            and the tokens that count.
        advantages (`torch.Tensor` of shape `(batch,)`):
            Rewards, normalized within the rollouts of each prompt.
        outcomes (`torch.Tensor` of shape `(batch,)`):
            Rewards from 0 (incorrect) to 1 (correct), NaN for a rollout that the losses of sequences leave out.
    """

    logps: torch.Tensor
    base_logps: torch.Tensor
    behaviour_logps: torch.Tensor
    advantages: torch.Tensor
    outcomes: torch.Tensor
    mask: torch.Tensor

    def reversed(self) -> "Rollouts":
        """The same rollouts with reversed rewards, which the unlearned policy is trained on."""
        return replace(self, advantages=-self.advantages, outcomes=1 - self.outcomes)


@dataclass(frozen=True)
class Extraction:
    """
    One objective of stage 1.

    Args:
        loss (`Callable[[Rollouts, Any], TokenLoss]`):
            From the rollouts and the configuration to the per-token loss.
        of_sequences (`bool`):
            Whether the loss of a sequence is the sum over its tokens and is averaged over sequences, whatever
            `loss_type` says.
        compares_prompts (`bool`):
            Whether it learns also from a prompt whose rollouts all have the same reward.
        against_sampler (`bool`):
            Whether its ratio is against the sampler's log-probabilities, where the rollouts have them.
    """

    loss: Callable[[Rollouts, Any], TokenLoss]
    of_sequences: bool
    compares_prompts: bool
    against_sampler: bool


def _sapo(rollouts: Rollouts, args: Any) -> TokenLoss:
    return sapo_loss(
        rollouts.logps,
        rollouts.behaviour_logps,
        rollouts.advantages.unsqueeze(1),
        rollouts.mask,
        temperature_positive=args.sapo_temperature_pos,
        temperature_negative=args.sapo_temperature_neg,
    )


def _cross_entropy(rollouts: Rollouts, args: Any) -> TokenLoss:
    return reward_cross_entropy_loss(
        rollouts.logps, rollouts.base_logps, rollouts.outcomes, rollouts.mask, beta_r=args.extraction_beta
    )


def _regression(rollouts: Rollouts, args: Any) -> TokenLoss:
    targets = rollouts.advantages.masked_fill(rollouts.outcomes.isnan(), torch.nan)
    return reward_regression_loss(
        rollouts.logps, rollouts.base_logps, targets, rollouts.mask, beta_r=args.extraction_beta
    )


EXTRACTION_LOSSES: dict[str, Extraction] = {
    "sapo": Extraction(_sapo, of_sequences=False, compares_prompts=False, against_sampler=True),
    "ce": Extraction(_cross_entropy, of_sequences=True, compares_prompts=True, against_sampler=False),
    "mse": Extraction(_regression, of_sequences=True, compares_prompts=False, against_sampler=False),
}
