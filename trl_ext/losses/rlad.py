r"""
Policy losses with a teacher in them: in the ratio itself (RLAD's TRRD), or beside it (KDRL's penalty).

Notation, per sampled token of the student's rollouts, all in nats: \\( S = \log \pi_\mathrm{student} \\) (current,
differentiable), \\( O = \log \pi_\mathrm{old} \\) and \\( T = \log \pi_\mathrm{teacher} \\) (constants);
\\( A \\) advantage.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from trl_ext.losses.ppo_clip import ppo_clip_loss
from trl_ext.losses.token_loss import MAX_LOG_RATIO, Metrics, TokenLoss, at_least_float32, known_or_current, masked


class DistillationTerms(NamedTuple):
    """The places where a teacher enters a policy loss."""

    mixture: bool  # in the ratio: TRRD
    penalty: bool  # beside the policy loss: KDRL


# Where the teacher alone takes a token's gradient
VETOES = {"clip_ratio/high_mean": "teacher/veto_positive", "clip_ratio/low_mean": "teacher/veto_negative"}

DISTILLATIONS = {
    "trrd": DistillationTerms(mixture=True, penalty=False),
    "kdrl": DistillationTerms(mixture=False, penalty=True),
    "trrd_and_kdrl": DistillationTerms(mixture=True, penalty=True),
}


def trrd_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    alpha: float = 0.5,
    log_ratio_clip: float | None = 1.0,
    region: Callable[..., TokenLoss] = ppo_clip_loss,
) -> TokenLoss:
    r"""
    Trust Region Ratio Distillation, Eq. 3-5 of [arXiv 2602.22495](https://huggingface.co/papers/2602.22495):

    $$ \log r = \alpha (S - O) + (1 - \alpha)\, \mathrm{clamp}(S - T, -c, c), \qquad
    L = -\min\left( r A,\; \mathrm{clip}(r, 1 - \epsilon_\mathrm{low}, 1 + \epsilon_\mathrm{high}) A \right) $$

    The ratio is against the geometric mixture \\( m = \pi_\mathrm{old}^\alpha \pi_\mathrm{teacher}^{1 - \alpha} \\),
    per token and not normalized over the vocabulary, and takes the place of GRPO's. With \\( \alpha = 1 \\) it is
    GRPO's. Beyond the clamp (Appendix B) the gradient comes from \\( S - O \\) alone; the paper does not say whether
    gradient passes the clamp, and this is its literal reading.

    `region` puts another trust region around the same mixture (ours, not the paper's). DRPO's, with radius
    \\( \delta \\),

    $$ L = -\left( r A - \frac{|A|}{2 \delta} m (r - 1)^2 \right), \qquad
    \nabla L = -r A \left( 1 - \mathrm{sign}(A) \frac{\pi - m}{\delta} \right) \nabla \log r $$

    pulls toward the teacher where the clip only stops: a token of positive advantage that the teacher finds likelier
    is raised faster than with the clip, and one that it finds less likely is pulled back once \\( \pi - m \\) exceeds
    the radius, which on policy is at most \\( 1 - e^{-(1 - \alpha) c} \\) (0.39 at first).

    A token whose `teacher_logps` is not finite has no teacher score: its ratio is GRPO's.

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
        region (`Callable`, defaults to `ppo_clip_loss`):
            The loss of the trust region, called with `(logps, m, advantages, mask)`; \\( m \\) in nats.
    """
    mask = mask.bool()
    logps = at_least_float32(logps)
    neutral = ~teacher_logps.isfinite()
    drift = masked(logps - known_or_current(old_logps, logps), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    teacher_log_ratio = masked(logps - known_or_current(teacher_logps, logps), mask)
    bound = MAX_LOG_RATIO if log_ratio_clip is None else log_ratio_clip
    gap = teacher_log_ratio.clamp(-bound, bound)
    log_ratio = torch.where(neutral, drift, alpha * drift + (1 - alpha) * gap)

    # The mixture as it stands to the current policy; the gradient is that of the log-ratio, beyond the clamp too
    current = logps.detach().clamp(min=torch.finfo(logps.dtype).min)
    token_loss = region(current + (log_ratio - log_ratio.detach()), current - log_ratio.detach(), advantages, mask)

    metrics = teacher_metrics(teacher_log_ratio, neutral)
    clips = {name: share for name, share in token_loss.metrics.items() if name.startswith("clip_ratio/")}
    metrics |= {name: values for name, values in token_loss.metrics.items() if name not in clips}
    if clips:  # what is clipped in GRPO too, whose ratio is the drift's, is not the teacher's doing
        with torch.no_grad():
            without_teacher = region(current, current - drift, advantages, mask).metrics
        for name, share in clips.items():
            anyway = without_teacher[name]
            if name.endswith("_mean") and isinstance(share, torch.Tensor) and isinstance(anyway, torch.Tensor):
                metrics[name] = share * anyway
                if name in VETOES:
                    metrics[VETOES[name]] = share * (1 - anyway)
    metrics["policy_drift"], metrics["policy_drift_abs"] = drift.detach(), drift.detach().abs()
    if log_ratio_clip is not None:
        metrics["teacher/clamped"] = (teacher_log_ratio.detach().abs() > log_ratio_clip).to(drift.dtype)
    return TokenLoss(token_loss.loss, metrics)


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

    The gradient of \\( k_2 \\), \\( (S - T) \nabla S \\), is on samples of the current student an unbiased gradient of
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
        bounded = log_ratio.clamp(min=-MAX_LOG_RATIO)  # both terms: beyond, the gradient is 0, and not away from T
        penalty = torch.expm1(-bounded) + bounded
    metrics = teacher_metrics(log_ratio, neutral)
    metrics["teacher/penalty"] = penalty.detach()
    return TokenLoss(penalty, metrics)


def kdrl_coefficient(step: int, start: float, decay: float, minimum: float) -> float:
    r"""KDRL's annealing: \\( \max(c_0 - s d, c_\mathrm{min}) \\), the coefficient at optimizer step \\( s \\)."""
    return max(start - step * decay, minimum)


def kdrl_mask(rewards: torch.Tensor, mask: str, correct_reward: float, group_size: int) -> torch.Tensor:
    """
    KDRL's reward-guided masking: True for the completions that have the penalty, of shape `(rollouts,)`.

    Args:
        rewards (`torch.Tensor` of shape `(rollouts,)`):
            Group by group. NaN, for a completion without a reward, counts as incorrect.
        mask (`str`):
            `"none"`: all have it. `"response"`: all but the correct ones. `"group"`: those of groups without a correct
            one.
        correct_reward (`float`):
            Least reward of a correct completion.
        group_size (`int`):
            Number of completions per prompt.
    """
    correct = rewards >= correct_reward
    if mask == "none":
        correct = torch.zeros_like(correct)
    elif mask == "group":
        correct = correct.view(-1, group_size).any(dim=1).repeat_interleave(group_size)
    return ~correct


def teacher_metrics(teacher_log_ratio: torch.Tensor, neutral: torch.Tensor) -> Metrics:
    """Metrics of the student's and the teacher's log-probabilities, whatever the loss: means over the known ones."""
    log_ratio = teacher_log_ratio.detach()
    known = (~neutral).to(log_ratio.dtype)
    return {
        "teacher/log_ratio": (log_ratio, known),
        "teacher/log_ratio_abs": (log_ratio.abs(), known),
        "teacher/neutral": 1 - known,
    }
