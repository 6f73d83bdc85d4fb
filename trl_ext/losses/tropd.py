r"""
Losses of on-policy distillation: TrOPD, and the baselines OPD, the forward KL divergence, EOPD and REOPOLD.

Notation, per token of the student's own rollouts, in nats: \\( S = \log \pi_S(x) \\) of the student (differentiable),
\\( T = \log \pi_T(x) \\) of the teacher (constant), \\( R = T - S \\) the reward (detached), \\( V_k \\) the teacher's
\\( k \\) most likely tokens.

The whole objective of TrOPD (Eq. 9 of [arXiv 2606.01249](https://huggingface.co/papers/2606.01249)), as a loss:

$$ L = 1[x \sim \pi_S] \left( M (-R) + (1 - M) \sum_{v \in V_k} \pi_T(v) \log \frac{\pi_T(v)}{\pi_S(v)} \right)
- 1[x \sim \pi_T]\, \beta_g \log \pi_S(x) $$

Its first part is [`tropd_loss`], its second [`guidance_loss`]; [`longest_prefix`] (Eq. 8) says how many tokens of a
rollout are the teacher's. [`off_policy_loss`] is GKD's: of completions that are not the student's at all.

A token whose \\( T \\) is NaN could not be scored by the teacher and has no loss.
"""

import math
from typing import NamedTuple

import torch

from trl_ext.losses.token_loss import MAX_LOG_RATIO, Metrics, TokenLoss, at_least_float32, masked


# Eq. 8: share of the longest prefix that is left at a share of the run
GUIDANCE_SCHEDULES = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def opd_loss(logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor) -> TokenLoss:
    r"""
    On-policy distillation: the reverse KL divergence through the sampled token (K1), as a policy gradient,

    $$ L = -R, \qquad \nabla L = -R\, \nabla S $$

    In expectation over the student's tokens, both are those of \\( \mathrm{KL}(\pi_S \| \pi_T) \\).

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            \\( S \\), differentiable.
        teacher_logps (`torch.Tensor` of shape `(batch, time)`):
            \\( T \\). \\( R \\) is clamped to ±20, which bounds the weight of an impossible token (-inf).
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for the tokens that the student sampled.
    """
    logps, reward, mask = _reward(logps, teacher_logps, mask)
    return TokenLoss(_policy_gradient(reward, logps, mask), _metrics(reward))


class OutlierTerms(NamedTuple):
    """The terms of an outlier loss."""

    forward_kl: bool  # the forward KL divergence on the teacher's top-k, differentiated
    clip: bool  # the policy gradient of the reward with a floor
    everywhere: bool = False  # whether the forward KL is on every token, and not on outliers alone


OUTLIER_LOSSES = {
    "forward_kl_everywhere_and_clip": OutlierTerms(forward_kl=True, clip=True, everywhere=True),
    "forward_kl": OutlierTerms(forward_kl=True, clip=False),
    "clip": OutlierTerms(forward_kl=False, clip=True),
    "forward_kl_and_clip": OutlierTerms(forward_kl=True, clip=True),
    "mask": OutlierTerms(forward_kl=False, clip=False),
}


def tropd_loss(
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    top_k_logps: torch.Tensor | None = None,
    teacher_top_k_logps: torch.Tensor | None = None,
    draws: torch.Tensor | None = None,
    outlier_loss: str = "forward_kl",
    clip_floor: float = -1.0,
    clip_coef: float = 1.0,
) -> TokenLoss:
    r"""
    Trust Region On-Policy Distillation, Eq. 6 and the first two terms of Eq. 9 of
    [arXiv 2606.01249](https://huggingface.co/papers/2606.01249), as a loss:

    $$ L = M (-R) + (1 - M)\, L_\mathrm{out}, \qquad M \sim \mathrm{Bernoulli}(\min(\pi_T(x) / \pi_S(x), 1)) $$

    \\( M \\) says whether the teacher is reliable at this token; the expected share of outliers at a prefix is the
    total variation between student and teacher. With `draws=None` the probability takes the place of \\( M \\): the
    same expectation with less variance. \\( L_\mathrm{out} \\) is, with `outlier_loss`

    - `"forward_kl"`: \\( F = \sum_{v \in V_k} \pi_T(v) (\log \pi_T(v) - \log \pi_S(v)) \\), differentiated. Neither
      side is renormalized on \\( V_k \\).
    - `"clip"`: \\( -c \max(R, \tau) \\), as a policy gradient. The paper gives no \\( \tau \\) and has
      \\( c = 1 \\).
    - `"forward_kl_and_clip"`: the sum of these two, which is ours and not the paper's.
    - `"forward_kl_everywhere_and_clip"`: `"clip"`, and \\( F \\) on every token, whatever \\( M \\) is, with the
      other tokens as one more (see `forward_kl_top_k`); ours too.
    - `"mask"`: 0.

    **Why the sum.** The gradient of each outlier is

    $$ \nabla L_\mathrm{out} = -\sum_{v \in V_k} \pi_T(v)\, \nabla \log \pi_S(v)
    \;-\; c \max(R, \tau)\, \nabla \log \pi_S(x) $$

    Its first term pulls toward what the teacher would write, however unlikely that is to the student, and is the same
    for every sampled \\( x \\); against a mistake of probability \\( p \\) its strength is only of the order of
    \\( p \\). The second pushes the sampled mistake itself down, by at most \\( -c \tau \\), so that no single token
    outweighs the others. With \\( c = 1 \\) the policy gradient of the whole loss is that of OPD wherever
    \\( R \ge \tau \\), whatever \\( M \\) is; below the floor its reward is, in expectation over \\( M \\),
    \\( e^R R + (1 - e^R) \tau \\).

    Args:
        logps, teacher_logps, mask:
            As in `opd_loss`.
        top_k_logps (`torch.Tensor` of shape `(batch, time, k)`, *optional*):
            \\( \log \pi_S(v) \\), differentiable. Needed for an outlier loss with a forward KL divergence.
        teacher_top_k_logps (`torch.Tensor` of shape `(batch, time, k)`, *optional*):
            \\( \log \pi_T(v) \\); -inf where there is no such token.
        draws (`torch.Tensor` of shape `(batch, time)`, *optional*):
            Uniform in [0, 1): \\( M \\) is 1 where they are below its probability.
        outlier_loss (`str`, defaults to `"forward_kl"`):
            Which \\( L_\mathrm{out} \\), a key of `OUTLIER_LOSSES`.
        clip_floor (`float`, defaults to `-1.0`):
            \\( \tau \\) in nats.
        clip_coef (`float`, defaults to `1.0`):
            \\( c \\).
    """
    terms = OUTLIER_LOSSES[outlier_loss]
    logps, reward, mask = _reward(logps, teacher_logps, mask)
    trust = reward.clamp(max=0).exp()
    if draws is not None:
        trust = (draws < trust).to(trust.dtype)
    outlier = masked(1 - trust, mask)
    loss = trust * _policy_gradient(reward, logps, mask)
    metrics = _metrics(reward) | {"outliers/share": outlier}
    if terms.forward_kl:
        if top_k_logps is None or teacher_top_k_logps is None:
            raise ValueError(f"outlier_loss={outlier_loss!r} needs top_k_logps and teacher_top_k_logps: pass both.")
        scope = mask.to(outlier.dtype) if terms.everywhere else outlier
        # `masked`, not only a product: a trusted token has no gradient even where a top-k log-probability is -inf
        forward_kl = forward_kl_top_k(top_k_logps, teacher_top_k_logps, with_tail=terms.everywhere)
        forward_kl = masked(forward_kl, scope > 0)
        loss = loss + scope * forward_kl
        metrics["outliers/forward_kl"] = (forward_kl.detach(), outlier)
    if terms.clip:
        loss = loss + clip_coef * outlier * _policy_gradient(reward.clamp(min=clip_floor), logps, mask)
        metrics["outliers/clipped_share"] = ((reward < clip_floor).to(logps.dtype), outlier)
    return TokenLoss(loss, metrics)


def guidance_loss(logps: torch.Tensor, mask: torch.Tensor, *, coef: float = 1e-3) -> TokenLoss:
    r"""
    The last term of Eq. 9 of TrOPD, on the tokens of a rollout that the teacher wrote:
    \\( L = -\beta_g \log \pi_S(x) \\).

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            \\( \log \pi_S(x) \\), differentiable.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for the teacher's tokens.
        coef (`float`, defaults to `1e-3`):
            \\( \beta_g \\).
    """
    return TokenLoss(-coef * masked(at_least_float32(logps), mask.bool()))


def longest_prefix(step: int, max_steps: int, max_length: int, schedule: str = "cosine") -> int:
    r"""
    The longest prefix at an optimizer step, in tokens, rounded down: Eq. 8 of TrOPD,
    \\( L(s) = L_\mathrm{max} (1 + \cos(\pi s / S)) / 2 \\) with `"cosine"`. `"linear"` and `"constant"` are ours:
    \\( L_\mathrm{max} (1 - s / S) \\) and \\( L_\mathrm{max} \\).

    Args:
        step (`int`):
            \\( s \\), the number of optimizer steps taken.
        max_steps (`int`):
            \\( S \\), that of the whole run.
        max_length (`int`):
            \\( L_\mathrm{max} \\).
        schedule (`str`, defaults to `"cosine"`):
            A key of `GUIDANCE_SCHEDULES`.
    """
    return int(max_length * GUIDANCE_SCHEDULES[schedule](min(step / max_steps, 1.0)))


def off_policy_loss(top_k_logps: torch.Tensor, teacher_top_k_logps: torch.Tensor, mask: torch.Tensor) -> TokenLoss:
    """
    The forward KL divergence on the teacher's top-k and, as one more, all other tokens (`forward_kl_top_k`), on tokens
    of completions that are not the student's: the ratio of a token says nothing where the student did not sample it.

    Args:
        top_k_logps, teacher_top_k_logps (`torch.Tensor` of shape `(batch, time, k)`):
            As in `tropd_loss`.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for those tokens.
    """
    forward_kl = masked(forward_kl_top_k(top_k_logps, teacher_top_k_logps, with_tail=True), mask.bool())
    return TokenLoss(forward_kl, {"off_policy/forward_kl": forward_kl.detach()})


def forward_kl_loss(
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    top_k_logps: torch.Tensor,
    teacher_top_k_logps: torch.Tensor,
) -> TokenLoss:
    r"""
    The forward KL divergence on the student's own tokens, differentiated: that of GKD
    ([2306.13649](https://huggingface.co/papers/2306.13649)) with `beta=0` and `lmbda=1`, on the teacher's top-k,

    $$ L = \sum_{v \in V_k} \pi_T(v) (\log \pi_T(v) - \log \pi_S(v)) + (1 - m_T) \log \frac{1 - m_T}{1 - m_S} $$

    The last term is that of all other tokens together, see `forward_kl_top_k`.

    Args:
        logps, teacher_logps, mask:
            As in `opd_loss`. They are not differentiated.
        top_k_logps, teacher_top_k_logps (`torch.Tensor` of shape `(batch, time, k)`):
            As in `tropd_loss`.
    """
    _, reward, mask = _reward(logps, teacher_logps, mask)
    forward_kl = masked(forward_kl_top_k(top_k_logps, teacher_top_k_logps, with_tail=True), mask)
    return TokenLoss(forward_kl, _metrics(reward) | {"teacher/forward_kl": forward_kl.detach()})


def eopd_loss(
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    top_k_logps: torch.Tensor,
    teacher_top_k_logps: torch.Tensor,
    teacher_entropy: torch.Tensor,
    entropy_threshold: float = 0.8,
) -> TokenLoss:
    r"""
    Entropy-aware OPD, [arXiv 2603.07079](https://huggingface.co/papers/2603.07079): where the teacher is uncertain, a
    forward KL divergence is added,

    $$ L = -R + 1[H(\pi_T) > h] \sum_{v \in V_k} q(v) (\log q(v) - \log \pi_S(v)), \qquad
    q = \pi_T / \textstyle\sum_{V_k} \pi_T $$

    Args:
        logps, teacher_logps, mask:
            As in `opd_loss`.
        top_k_logps, teacher_top_k_logps (`torch.Tensor` of shape `(batch, time, k)`):
            As in `tropd_loss`; the paper's k is 16.
        teacher_entropy (`torch.Tensor` of shape `(batch, time)`):
            \\( H(\pi_T) \\) in nats.
        entropy_threshold (`float`, defaults to `0.8`):
            \\( h \\) in nats.
    """
    logps, reward, mask = _reward(logps, teacher_logps, mask)
    uncertain = (teacher_entropy > entropy_threshold) & mask
    forward_kl = masked(
        forward_kl_top_k(top_k_logps, at_least_float32(teacher_top_k_logps).log_softmax(-1)), uncertain
    )
    metrics, share = _metrics(reward), uncertain.to(logps.dtype)
    metrics |= {"uncertain/share": share, "uncertain/forward_kl": (forward_kl.detach(), share)}
    return TokenLoss(_policy_gradient(reward, logps, mask) + forward_kl, metrics)


def reopold_loss(
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    floor: float = -1.72,
    uncertain: torch.Tensor | None = None,
) -> TokenLoss:
    r"""
    Relaxed on-policy distillation, [arXiv 2603.11137](https://huggingface.co/papers/2603.11137): the reward has a
    floor, and in the second phase only the tokens count about which the student is least certain,

    $$ L = -\max(R, c)\; 1[H(\pi_S) \ge Q_{1 - \beta}(H(\pi_S))] $$

    Args:
        logps, teacher_logps, mask:
            As in `opd_loss`.
        floor (`float`, defaults to `-1.72`):
            \\( c \\) in nats. The sources disagree: -1.72 or -0.85.
        uncertain (`torch.Tensor` of shape `(batch, time)`, *optional*):
            Bool, for the second phase: the tokens that count, see `least_of_top_share`. `None` for the first phase, in
            which all tokens count.
    """
    logps, reward, mask = _reward(logps, teacher_logps, mask)
    metrics = _metrics(reward)
    metrics["floored/share"] = (reward < floor).to(logps.dtype)
    loss = _policy_gradient(reward.clamp(min=floor), logps, mask)
    if uncertain is not None:
        loss = masked(loss, uncertain)
    return TokenLoss(loss, metrics)


def least_of_top_share(entropies: torch.Tensor, share: float) -> torch.Tensor:
    r"""
    \\( Q_{1 - \beta}(H) \\), a scalar: the lowest entropy among the share \\( \beta \\) of the least certain tokens.

    Args:
        entropies (`torch.Tensor` of any shape):
            \\( H \\) in nats, NaN for padding.
        share (`float`):
            \\( \beta \\).

    NaN where there are no tokens. Between two entropies it is the higher one, to which the same tokens belong.
    """
    if not entropies.numel():
        return entropies.new_full((), float("nan"))
    # With NaN at the end. torch.nanquantile takes no more than 16M values
    ordered = at_least_float32(entropies).flatten().sort().values
    last = (~ordered.isnan()).sum() - 1
    place = ((1 - share) * last.double() - 1e-6).ceil().long().clamp(min=0)
    return ordered.gather(0, place[None])[0]


def forward_kl_top_k(
    top_k_logps: torch.Tensor, teacher_top_k_logps: torch.Tensor, with_tail: bool = False
) -> torch.Tensor:
    r"""
    \\( \sum_{v \in V_k} \pi_T(v) (\log \pi_T(v) - \log \pi_S(v)) \\) of shape `(batch, time)`, in nats.

    Differentiable in the student's `top_k_logps`. Both of shape `(batch, time, k)`; a teacher's -inf or NaN adds 0.

    `with_tail` adds what is left of both, as one more token: \\( (1 - m_T) (\log(1 - m_T) - \log(1 - m_S)) \\) with
    \\( m = \sum_{V_k} \pi(v) \\). Without it the gradient is not 0 where the student equals its teacher, but moves
    probability into \\( V_k \\). It is 1 minus a sum in float32: where the student leaves less than about 1e-5, its
    gradient is uncertain (half to three times as large, say), and below 1e-6 it may be 0.
    """
    teacher, student = at_least_float32(teacher_top_k_logps).detach(), at_least_float32(top_k_logps)
    known = teacher.isfinite()
    teacher_probabilities = torch.where(known, teacher, float("-inf")).exp()
    forward_kl = (teacher_probabilities * torch.where(known, teacher - student, 0.0)).sum(-1)
    if with_tail:
        least = torch.finfo(torch.float32).eps  # the least that can be left of a mass of 1
        left, students = (_left(torch.where(known, logps, float("-inf"))) for logps in (teacher, student))
        tail = left * (left.clamp(min=least).log() - students.clamp(min=least).log())
        forward_kl = forward_kl + masked(tail, left > least)
    return forward_kl


def _left(logps: torch.Tensor) -> torch.Tensor:
    """1 minus the probabilities in the last dimension, the greatest first, because 1 minus it can be exact."""
    greatest, place = logps.max(-1, keepdim=True)
    return -torch.expm1(greatest.squeeze(-1)) - logps.scatter(-1, place, float("-inf")).exp().sum(-1)


def _reward(
    logps: torch.Tensor, teacher_logps: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S, R (detached, within ±20, 0 where masked) and the mask without the tokens that have no teacher score."""
    logps = at_least_float32(logps)
    teacher_logps = at_least_float32(teacher_logps).detach()
    mask = mask.bool() & ~teacher_logps.isnan()
    # The student's -inf becomes the smallest float, so that -inf - -inf never happens
    current = logps.detach().clamp(min=torch.finfo(logps.dtype).min)
    return logps, masked((teacher_logps - current).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask), mask


def _policy_gradient(reward: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-R in value, with the gradient -R dS: it reports a divergence and descends it."""
    return -reward * (1 + masked(logps - logps.detach(), mask & logps.isfinite()))


def _metrics(reward: torch.Tensor) -> Metrics:
    return {"teacher/kl": -reward}
