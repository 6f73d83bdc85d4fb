r"""
Objectives that squeeze a fixed set of rollouts: stage 1 of [arXiv 2605.25582](https://huggingface.co/papers/2605.25582).

Notation: \\( \pi \\) current policy, \\( \pi_0 \\) the policy that sampled the set, \\( y \\) a completion,
\\( R(y) = \beta_r \sum_t \log \frac{\pi(y_t)}{\pi_0(y_t)} \\) its implicit reward. The paper names the three
objectives; what is known to us of it does not give their formulas, which but for SAPO's are our choice.

Common arguments of the functions below:

- `logps` (`torch.Tensor` of shape `(batch, time)`): \\( \log \pi \\) in nats, differentiable.
- `base_logps` (`torch.Tensor` of shape `(batch, time)`): \\( \log \pi_0 \\) in nats, a constant; a value that is not
  finite counts as ratio 1.
- `mask` (`torch.Tensor` of shape `(batch, time)`): non-zero for the tokens that count.

The two losses that judge a whole sequence spread its loss evenly over its tokens: **the sum over the tokens of a
sequence is its loss**, and the gradient of each token is that of the sequence's loss. So average the sums.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from trl_ext.losses.token_loss import Metrics, TokenLoss, at_least_float32, known_or_current, masked, policy_ratio


def sapo_loss(
    logps: torch.Tensor,
    base_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> TokenLoss:
    r"""
    Soft Adaptive Policy Optimization, [arXiv 2511.20347](https://huggingface.co/papers/2511.20347), as TRL has it,
    with \\( r = \pi / \pi_0 \\):

    $$ L = -\frac{4}{\tau}\, \sigma(\tau (r - 1))\, A, \qquad
    \tau = \tau_+ \text{ where } A > 0, \text{ else } \tau_- $$

    Its gradient is \\( -A r \, 4 \sigma (1 - \sigma) \nabla \log \pi \\): the policy gradient at \\( r = 1 \\), faded
    out smoothly on both sides. A loss a token, to be averaged like any other.

    Args:
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            \\( A \\), a constant.
        temperature_positive (`float`, defaults to `1.0`):
            \\( \tau_+ \\).
        temperature_negative (`float`, defaults to `1.05`):
            \\( \tau_- \\).
    """
    policy = policy_ratio(logps, base_logps, mask)
    advantages = at_least_float32(advantages).detach().expand_as(policy.ratio)
    temperature = torch.where(advantages > 0, temperature_positive, temperature_negative)
    gate = torch.sigmoid(temperature * (policy.ratio - 1))
    metrics: Metrics = {"extraction/gate": 4 * (gate * (1 - gate)).detach()}
    return TokenLoss(masked(-gate * 4 / temperature * advantages, policy.mask), metrics)


def reward_cross_entropy_loss(
    logps: torch.Tensor, base_logps: torch.Tensor, outcomes: torch.Tensor, mask: torch.Tensor, *, beta_r: float = 0.5
) -> TokenLoss:
    r"""
    Binary cross-entropy of the implicit reward with the outcome \\( o \\), which may lie between 0 and 1:

    $$ L(y) = -o \log \sigma(R(y)) - (1 - o) \log \sigma(-R(y)), \qquad
    \nabla L = (\sigma(R) - o)\, \beta_r \sum_t \nabla \log \pi(y_t) $$

    Args:
        outcomes (`torch.Tensor` of shape `(batch,)`):
            \\( o \\) from 0 (wrong) to 1 (right), see [`outcomes_of`]. A sequence of outcome NaN has no loss.
        beta_r (`float`, defaults to `0.5`):
            \\( \beta_r \\), in 1 / nats.
    """
    implicit_rewards = implicit_reward(logps, base_logps, mask, beta_r=beta_r)
    known = outcomes.isfinite()
    targets = torch.where(known, at_least_float32(outcomes), 0.0)
    losses = binary_cross_entropy_with_logits(implicit_rewards, targets.to(implicit_rewards), reduction="none")
    metrics: Metrics = {
        "extraction/implicit_reward_right": _where(implicit_rewards, targets > 0.5),
        "extraction/implicit_reward_wrong": _where(implicit_rewards, known & (targets <= 0.5)),
    }
    return TokenLoss(_spread(masked(losses, known), mask), metrics)


def reward_regression_loss(
    logps: torch.Tensor, base_logps: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, *, beta_r: float = 0.5
) -> TokenLoss:
    r"""
    Squared error of the implicit reward:

    $$ L(y) = (R(y) - A)^2, \qquad \nabla L = 2 (R - A)\, \beta_r \sum_t \nabla \log \pi(y_t) $$

    Args:
        targets (`torch.Tensor` of shape `(batch,)`):
            \\( A \\), the rewards, normalised within the rollouts of a prompt. A sequence of target NaN has no loss.
        beta_r (`float`, defaults to `0.5`):
            \\( \beta_r \\), in 1 / nats.
    """
    implicit_rewards = implicit_reward(logps, base_logps, mask, beta_r=beta_r)
    targets = at_least_float32(targets).detach()
    losses = masked((implicit_rewards - targets.nan_to_num()).square(), ~targets.isnan())
    metrics: Metrics = {
        "extraction/implicit_reward_right": _where(implicit_rewards, targets > 0),
        "extraction/implicit_reward_wrong": _where(implicit_rewards, targets < 0),
    }
    return TokenLoss(_spread(losses, mask), metrics)


def outcomes_of(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Any rewards as outcomes of [`reward_cross_entropy_loss`]: the affine map of their range to \\( [0, 1] \\),

    $$ o_i = \frac{r_i - \min_j r_j}{\max_j r_j - \min_j r_j} $$

    so that two rewards become exactly 0 and 1. NaN where a reward is not finite, and where all are equal.

    Args:
        rewards (`torch.Tensor` of any shape):
            Those of the whole fixed set, all processes.
    """
    rewards = rewards.double()
    known = rewards[rewards.isfinite()]
    if known.numel() == 0 or known.min() == known.max():
        return torch.full_like(rewards, torch.nan, dtype=torch.float32)
    outcomes = (rewards - known.min()) / (known.max() - known.min())
    return torch.where(rewards.isfinite(), outcomes, torch.nan).float()


def implicit_reward(
    logps: torch.Tensor, base_logps: torch.Tensor, mask: torch.Tensor, *, beta_r: float
) -> torch.Tensor:
    r"""
    \\( R(y) = \beta_r \sum_t \log \frac{\pi(y_t)}{\pi_0(y_t)} \\), of shape `(batch,)`, in float32 or wider.

    Not clamped: its gradient must not vanish where a sequence has drifted far, which is when it is needed.
    """
    logps = at_least_float32(logps)
    # An impossible token: -inf would make the loss of the whole batch inf, so it counts as e^-100
    logps = torch.where(logps == -torch.inf, logps.detach().clamp(min=-100.0), logps)
    log_ratio = masked(logps - known_or_current(base_logps, logps), mask.bool())
    return beta_r * log_ratio.sum(-1)


def _spread(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, time), such that each row sums to its loss. A row without tokens has none."""
    mask = mask.bool()
    per_token = losses / mask.sum(-1).clamp(min=1)
    return masked(per_token.unsqueeze(1).expand(mask.shape), mask)


def _where(values: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """`values`, detached, and NaN, which the reduction leaves out, where `condition` is False."""
    return torch.where(condition, values.detach(), torch.nan)
