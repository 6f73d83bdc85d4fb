"""PPO's clipped surrogate, as `GRPOTrainer` computes it: the baseline that the other losses are measured against."""

import torch

from trl_ext.losses.token_loss import Metrics, TokenLoss, at_least_float32, masked, policy_ratio


def ppo_clip_loss(
    logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    ratio_cap: float | None = None,
) -> TokenLoss:
    r"""
    The clipped surrogate of PPO, Eq. 7 of [arXiv 1707.06347](https://huggingface.co/papers/1707.06347), with DAPO's
    two epsilons and INTELLECT-2's cap:

    $$ L = -\min\left( \min(r, C) A,\;
    \mathrm{clip}(r, 1 - \epsilon_\mathrm{low}, 1 + \epsilon_\mathrm{high}) A \right) $$

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            \\( \log \pi \\) in nats, differentiable.
        behaviour_logps (`torch.Tensor` of shape `(batch, time)`):
            \\( \log \pi_\mathrm{old} \\) in nats, a constant; a value that is not finite counts as ratio 1.
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            \\( A \\), a constant.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for the tokens that count.
        epsilon_low (`float`, defaults to `0.2`):
            Clip range below ratio 1.
        epsilon_high (`float`, *optional*):
            Clip range above ratio 1. `None`: `epsilon_low`.
        ratio_cap (`float`, *optional*):
            \\( C \\), `GRPOConfig.delta` in TRL. `None` for no cap.
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    policy = policy_ratio(logps, behaviour_logps, mask)
    advantages = at_least_float32(advantages).detach().expand_as(policy.ratio)
    loss, low, high = clipped_surrogate(policy.ratio, advantages, policy.mask, epsilon_low, epsilon_high, ratio_cap)
    tokens = policy.mask.sum(-1)  # a sequence without tokens is 0 / 0 = NaN, which the reduction leaves out
    metrics: Metrics = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "clip_ratio/low_min": low.sum(-1) / tokens,
        "clip_ratio/high_max": high.sum(-1) / tokens,
    }
    return TokenLoss(loss, metrics)


def clipped_surrogate(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    ratio_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Minus the clipped surrogate of any ratio, and where a clip took the gradient: below, above (0 or 1, detached).

    All tensors of shape `(batch, time)`; `mask` is bool.
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    ratio = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
    loss = masked(-torch.min(ratio * advantages, clipped * advantages), mask)
    low = (ratio.detach() < 1 - epsilon_low) & (advantages < 0) & mask
    high = (ratio.detach() > 1 + epsilon_high) & (advantages > 0) & mask
    return loss, low.to(loss.dtype), high.to(loss.dtype)
