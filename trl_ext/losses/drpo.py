r"""
Policy losses that keep the policy near the one that sampled the tokens by a smooth regularizer or a divergence mask.

Notation, per sampled token: \\( \pi \\) current probability, \\( \mu \\) probability under the policy that sampled the
token, \\( r = \pi / \mu \\), \\( A \\) advantage. All are written to be minimized: loss = -objective.

Common arguments of the functions below:

- `logps` (`torch.Tensor` of shape `(batch, time)`): \\( \log \pi \\) in nats, differentiable.
- `behaviour_logps` (`torch.Tensor` of shape `(batch, time)`): \\( \log \mu \\) in nats, a constant; a value that is
  not finite (the sampler could not score the token) counts as ratio 1.
- `advantages` (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`): \\( A \\), a constant.
- `mask` (`torch.Tensor` of shape `(batch, time)`): non-zero for the tokens that count.

All compute in float32 or wider and clamp the log-ratio to ±20, where its gradient vanishes.
"""

from typing import Literal

import torch

from trl_ext.losses.token_loss import Metrics, PolicyRatio, TokenLoss, at_least_float32, masked, policy_ratio


# Probabilities nearer to 0 or 1 than this cannot be told from them in float32
PROBABILITY_MARGIN = 1e-7


def drpo_loss(
    logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    radius: float = 0.5,
) -> TokenLoss:
    r"""
    Divergence Regularized Policy Optimization, Eq. 8 of [arXiv 2606.09821](https://huggingface.co/papers/2606.09821):

    $$ L = -\left( r A - \frac{|A|}{2 \delta} \mu (r - 1)^2 \right) $$

    Its gradient (Eq. 9) is \\( -r A w \nabla \log \pi \\) with \\( w = 1 - \mathrm{sign}(A) (\pi - \mu) / \delta \\)
    in \\( [1 - 1/\delta, 1 + 1/\delta] \\): a move away from \\( \mu \\) is damped, gets weight 0 exactly where
    \\( |\pi - \mu| = \delta \\) and is pulled back beyond; a move back toward \\( \mu \\) gets more than 1.

    Args:
        radius (`float`, defaults to `0.5`):
            \\( \delta \\), the radius of the trust region in absolute probability. The paper's setting of 12.5 never
            binds, because \\( |\pi - \mu| \le 1 \\); docs/drpo.md has what the default is based on.
    """
    policy = policy_ratio(logps, behaviour_logps, mask)
    shift = policy.probability - policy.behaviour_probability
    return _regularized_loss(policy, advantages, policy.behaviour_probability, shift, radius)


def spo_loss(
    logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    radius: float = 0.2,
) -> TokenLoss:
    r"""
    Simple Policy Optimization, [arXiv 2401.16025](https://huggingface.co/papers/2401.16025):

    $$ L = -\left( r A - \frac{|A|}{2 \epsilon} (r - 1)^2 \right) $$

    Its gradient is \\( -r A w \nabla \log \pi \\) with \\( w = 1 - \mathrm{sign}(A) (r - 1) / \epsilon \\), which is
    unbounded as \\( \mu \to 0 \\), which DRPO avoids.

    Args:
        radius (`float`, defaults to `0.2`):
            \\( \epsilon \\), the radius of the trust region in \\( |r - 1| \\).
    """
    policy = policy_ratio(logps, behaviour_logps, mask)
    return _regularized_loss(policy, advantages, torch.ones_like(policy.ratio), policy.ratio.detach() - 1, radius)


def dppo_loss(
    logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    radius: float,
    divergence: Literal["tv", "kl"] = "tv",
    ratio_cap: float | None = None,
) -> TokenLoss:
    r"""
    Divergence PPO, [arXiv 2602.04879](https://huggingface.co/papers/2602.04879): a mask in place of PPO's clip.

    $$ L = -M r A, \qquad M = 0 \iff D > \delta \text{ and } ((A > 0 \text{ and } \pi > \mu) \text{ or } (A \le 0
    \text{ and } \pi < \mu)) $$

    with the binary divergence between sampled token and all others, \\( D = |\pi - \mu| \\) (`"tv"`) or
    \\( D = \mu \log \frac{\mu}{\pi} + (1 - \mu) \log \frac{1 - \mu}{1 - \pi} \\) in nats (`"kl"`).

    Args:
        radius (`float`):
            \\( \delta \\), in probability for `"tv"`, in nats for `"kl"`.
        divergence (`str`, defaults to `"tv"`):
            `"tv"` or `"kl"`.
        ratio_cap (`float`, *optional*):
            \\( C \\) of the authors' code, which weights \\( \nabla \log \pi \\) with \\( \min(r, C) \\) instead of
            \\( r \\). `None` leaves the ratio as it is.
    """
    policy = policy_ratio(logps, behaviour_logps, mask)
    advantages = _constant(advantages, policy)
    shift = policy.probability - policy.behaviour_probability
    distance = shift.abs() if divergence == "tv" else binary_kl(policy.behaviour_probability, policy.probability)
    outside = distance > radius
    leaving = torch.where(advantages > 0, shift > 0, shift < 0)
    dropped = outside & leaving

    ratio = policy.ratio
    if ratio_cap is not None:
        capped = ratio.detach().clamp(max=ratio_cap)
        ratio = capped * (ratio / ratio.detach())  # value min(r, C), gradient min(r, C) grad log pi
    loss = masked(-ratio * advantages, policy.mask & ~dropped)
    metrics = _common_metrics(policy, advantages, outside)
    metrics["masked/positive"] = (dropped & (advantages > 0)).to(loss.dtype)
    metrics["masked/negative"] = (dropped & (advantages < 0)).to(loss.dtype)
    return TokenLoss(loss, metrics)


def binary_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    r"""
    \\( \mathrm{KL}(\mathrm{Bernoulli}(p) \| \mathrm{Bernoulli}(q)) \\) in nats, for probabilities `first` \\( p \\)
    and `second` \\( q \\) of any one shape. Both are held at 1e-7 from 0 and 1, where float32 cannot tell them apart.
    """
    p, q = (x.clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN) for x in (first, second))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _regularized_loss(
    policy: PolicyRatio, advantages: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, radius: float
) -> TokenLoss:
    """-(r A - |A| weight (r - 1)^2 / (2 radius)); `shift` is weight (r - 1), what the radius bounds."""
    advantages = _constant(advantages, policy)
    regularizer = advantages.abs() * weight * (policy.ratio - 1).square() / (2 * radius)
    loss = masked(regularizer - policy.ratio * advantages, policy.mask)
    metrics = _common_metrics(policy, advantages, shift.abs() > radius)
    metrics["gradient_weight/mean"] = metrics["gradient_weight/min"] = 1 - advantages.sign() * shift / radius
    metrics["regularizer"] = regularizer.detach()
    return TokenLoss(loss, metrics)


def _constant(advantages: torch.Tensor, policy: PolicyRatio) -> torch.Tensor:
    return at_least_float32(advantages).detach().expand_as(policy.ratio)


def _common_metrics(policy: PolicyRatio, advantages: torch.Tensor, outside: torch.Tensor) -> Metrics:
    ratio = policy.ratio.detach()
    shift = (policy.probability - policy.behaviour_probability).abs()
    return {
        "ratio/mean": ratio,
        "ratio/min": ratio,
        "ratio/max": ratio,
        "probability_shift/mean": shift,
        "probability_shift/max": shift,
        "outside_region/positive": (outside & (advantages > 0)).to(ratio.dtype),
        "outside_region/negative": (outside & (advantages < 0)).to(ratio.dtype),
    }
