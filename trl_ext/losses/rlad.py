r"""
Policy losses with a teacher in them: in the ratio itself (RLAD's TRRD), or beside it (KDRL).

Notation, per sampled token of the student's rollouts, all in nats: \\( S = \log \pi_\mathrm{student} \\) (current,
differentiable), \\( O = \log \pi_\mathrm{old} \\) and \\( T = \log \pi_\mathrm{teacher} \\) (constants);
\\( A \\) advantage.
"""

from typing import Literal

import torch

from trl_ext.losses.ppo_clip import clipped_surrogate
from trl_ext.losses.token_loss import MAX_LOG_RATIO, Metrics, TokenLoss, at_least_float32, known_or_current, masked


def trrd_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    alpha: float = 0.5,
    log_ratio_clip: float | None = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ratio_cap: float | None = None,
) -> TokenLoss:
    r"""
    Trust Region Ratio Distillation, Eq. 3-5 of [arXiv 2602.22495](https://huggingface.co/papers/2602.22495):

    $$ \log r = \alpha (S - O) + (1 - \alpha)\, \mathrm{clamp}(S - T, -c, c), \qquad
    L = -\min\left( r A,\; \mathrm{clip}(r, 1 - \epsilon_\mathrm{low}, 1 + \epsilon_\mathrm{high}) A \right) $$

    The ratio is against the geometric mixture \\( \pi_\mathrm{old}^\alpha \pi_\mathrm{teacher}^{1 - \alpha} \\), per
    token and not normalised over the vocabulary, and takes the place of GRPO's. With \\( \alpha = 1 \\) it is GRPO's.
    Beyond the clamp (Appendix B) the gradient comes from \\( S - O \\) alone; the paper does not say whether gradient
    passes the clamp, and this is its literal reading.

    A token whose `teacher_logps` is not finite is one that the teacher has no opinion of: its ratio is GRPO's.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            \\( S \\), differentiable.
        old_logps (`torch.Tensor` of shape `(batch, time)`):
            \\( O \\).
        teacher_logps (`torch.Tensor` of shape `(batch, time)`):
            \\( T \\), NaN where the teacher is to be neutral.
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            \\( A \\).
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for the tokens that count.
        alpha (`float`, defaults to `0.5`):
            \\( \alpha \\) in [0, 1], the old student's exponent in the mixture.
        log_ratio_clip (`float`, *optional*, defaults to `1.0`):
            \\( c \\) in nats, `None` for no clamp.
        epsilon_low (`float`, defaults to `0.2`):
            Clip range below ratio 1.
        epsilon_high (`float`, defaults to `0.2`):
            Clip range above ratio 1.
        ratio_cap (`float`, *optional*):
            Upper bound of the unclipped ratio, `GRPOConfig.delta` in TRL.
    """
    mask = mask.bool()
    logps = at_least_float32(logps)
    neutral = ~teacher_logps.isfinite()
    drift = masked(logps - known_or_current(old_logps, logps), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    teacher_log_ratio = masked(logps - known_or_current(teacher_logps, logps), mask)
    bound = MAX_LOG_RATIO if log_ratio_clip is None else log_ratio_clip
    mixture = alpha * drift + (1 - alpha) * teacher_log_ratio.clamp(-bound, bound)
    ratio = torch.where(neutral, drift, mixture).exp()

    advantages = at_least_float32(advantages).detach().expand_as(ratio)
    surrogate, low, high = clipped_surrogate(ratio, advantages, mask, epsilon_low, epsilon_high, ratio_cap)
    metrics = teacher_metrics(teacher_log_ratio, neutral)
    metrics["teacher/veto_positive"], metrics["teacher/veto_negative"] = high, low
    metrics["policy_drift"], metrics["policy_drift_abs"] = drift.detach(), drift.detach().abs()
    if log_ratio_clip is not None:
        metrics["teacher/clamped"] = (teacher_log_ratio.detach().abs() > log_ratio_clip).to(ratio.dtype)
    return TokenLoss(surrogate, metrics)


def kdrl_penalty(
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    estimator: Literal["k2", "k3"] = "k2",
) -> TokenLoss:
    r"""
    KDRL's distillation term, [arXiv 2506.02208](https://huggingface.co/papers/2506.02208), to be added to a policy
    loss with a coefficient:

    $$ k_2 = \tfrac{1}{2} (T - S)^2, \qquad k_3 = e^{T - S} - (T - S) - 1 $$

    The gradient of \\( k_2 \\), \\( (S - T) \nabla S \\), is on the student's own samples an unbiased gradient of
    \\( \mathrm{KL}(\pi_\mathrm{student} \| \pi_\mathrm{teacher}) \\). (That of the plain difference \\( S - T \\) has
    the expectation 0.) The gradient of \\( k_3 \\) is in expectation that of the forward KL.

    Args are those of `trrd_loss`; a token whose `teacher_logps` is not finite has no penalty.
    """
    mask = mask.bool()
    logps = at_least_float32(logps)
    neutral = ~teacher_logps.isfinite()
    log_ratio = masked(logps - known_or_current(teacher_logps, logps), mask & ~neutral)
    if estimator == "k2":
        penalty = 0.5 * log_ratio.square()
    else:
        penalty = torch.expm1(-log_ratio.clamp(min=-MAX_LOG_RATIO)) + log_ratio
    metrics = teacher_metrics(log_ratio, neutral)
    metrics["teacher/penalty"] = penalty.detach()
    return TokenLoss(penalty, metrics)


def teacher_metrics(teacher_log_ratio: torch.Tensor, neutral: torch.Tensor) -> Metrics:
    """What is worth logging of the student's and the teacher's log-probabilities, whatever the loss."""
    log_ratio = teacher_log_ratio.detach()
    return {
        "teacher/log_ratio": log_ratio,
        "teacher/log_ratio_abs": log_ratio.abs(),
        "teacher/neutral": neutral.to(log_ratio.dtype),
    }
