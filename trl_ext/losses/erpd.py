r"""
ERPD, extreme region policy distillation ([arXiv 2605.25582](https://huggingface.co/papers/2605.25582)): the objectives
of stage 1, which squeeze a fixed set of rollouts, and the token-level signal of a teacher, which stage 2 distils.

Notation: \\( \pi \\) the current policy, \\( \pi_0 \\) the base policy, which sampled the set, \\( y \\) a completion,
\\( R(y) = \beta_r \sum_t \log \frac{\pi(y_t)}{\pi_0(y_t)} \\) its implicit reward, \\( \pi_E \\) the extreme region
policy, trained on the rewards, \\( \pi_U \\) the unlearned policy, trained on the reversed rewards. The paper names
the three objectives and the signals; except for SAPO's, the formulas below are our choice.

Common arguments of the losses:

- `logps` (`torch.Tensor` of shape `(batch, time)`): \\( \log \pi \\) in nats, differentiable.
- `base_logps` (`torch.Tensor` of shape `(batch, time)`): \\( \log \pi_0 \\) in nats, a constant; a value that is not
  finite counts as ratio 1.
- `mask` (`torch.Tensor` of shape `(batch, time)`): non-zero for the tokens that count.

The two losses of whole sequences spread a sequence's loss evenly over its tokens: **the sum over the tokens of a
sequence is its loss**, and the gradient is that of the sequence's loss. So average the sums.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from trl_ext.losses.token_loss import Metrics, TokenLoss, at_least_float32, known_or_current, masked, policy_ratio


# ---- the objectives of stage 1


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

    Its gradient is \\( -A r \, 4 \sigma (1 - \sigma) \nabla \log \pi \\): the policy gradient at \\( r = 1 \\), fading
    out smoothly on both sides. A per-token loss, to be averaged like any other.

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
            \\( o \\) from 0 (incorrect) to 1 (correct), see [`outcomes_of`]. A sequence of outcome NaN has no loss.
        beta_r (`float`, defaults to `0.5`):
            \\( \beta_r \\), in 1 / nats.
    """
    implicit_rewards = implicit_reward(logps, base_logps, mask, beta_r=beta_r)
    known = outcomes.isfinite()
    targets = torch.where(known, at_least_float32(outcomes), 0.0)
    losses = binary_cross_entropy_with_logits(implicit_rewards, targets.to(implicit_rewards), reduction="none")
    metrics: Metrics = {
        "extraction/implicit_reward_correct": _where(implicit_rewards, targets > 0.5),
        "extraction/implicit_reward_incorrect": _where(implicit_rewards, known & (targets <= 0.5)),
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
            \\( A \\), the rewards, normalized within the rollouts of a prompt. A sequence of target NaN has no loss.
        beta_r (`float`, defaults to `0.5`):
            \\( \beta_r \\), in 1 / nats.
    """
    implicit_rewards = implicit_reward(logps, base_logps, mask, beta_r=beta_r)
    targets = at_least_float32(targets).detach()
    losses = masked((implicit_rewards - targets.nan_to_num()).square(), ~targets.isnan())
    metrics: Metrics = {
        "extraction/implicit_reward_correct": _where(implicit_rewards, targets > 0),
        "extraction/implicit_reward_incorrect": _where(implicit_rewards, targets < 0),
    }
    return TokenLoss(_spread(losses, mask), metrics)


MIN_DIFFERENCE = 1e-6  # between two rewards


def outcomes_of(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Maps any rewards to outcomes for [`reward_cross_entropy_loss`], by the affine map of their range to \\( [0, 1] \\),

    $$ o_i = \frac{r_i - \min_j r_j}{\max_j r_j - \min_j r_j} $$

    so that two rewards become exactly 0 and 1. NaN where a reward is not finite, and where all are equal but for
    rounding (`MIN_DIFFERENCE`).

    Args:
        rewards (`torch.Tensor` of any shape):
            Those of the whole fixed set, all processes.
    """
    rewards = rewards.double()
    known = rewards[rewards.isfinite()]
    if known.numel() == 0 or known.max() - known.min() < MIN_DIFFERENCE:
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
    """`(batch,)` to `(batch, time)`, so that each row sums to its loss, or to 0 if it has no tokens."""
    mask = mask.bool()
    per_token = losses / mask.sum(-1).clamp(min=1)
    return masked(per_token.unsqueeze(1).expand(mask.shape), mask)


def _where(values: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """`values`, detached, where `condition` holds, else NaN, which the reduction leaves out."""
    return torch.where(condition, values.detach(), torch.nan)


# ---- the signal that stage 2 distils

# signal -> the two policies whose log-ratio it is: (numerator, denominator)
SIGNALS: dict[str, tuple[str, str]] = {
    "teacher": ("teacher", "base"),
    "unlearned_reference": ("teacher", "unlearned"),
    "unlearned_teacher": ("base", "unlearned"),
}
# In nats. Two passes of the same policy differ by about this much: below it, nothing was learned
MIN_SIGNAL_STD = 1e-5


def token_signal(signal: str, logps: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    r"""
    The raw signal, detached, in nats; 0 where masked, NaN where a policy gave no finite log-probability.

    | signal | \\( s_t \\) |
    |---|---|
    | `"teacher"` | \\( \log \pi_E - \log \pi_0 \\) |
    | `"unlearned_reference"` | \\( \log \pi_E - \log \pi_U \\) |
    | `"unlearned_teacher"` | \\( \log \pi_0 - \log \pi_U \\) |

    Args:
        logps (`dict[str, torch.Tensor]`):
            `"base"`, `"teacher"` and `"unlearned"`, those that the signal needs: each of shape `(batch, time)`.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Non-zero for the tokens that count.
    """
    numerator, denominator = (logps[name].detach().float() for name in SIGNALS[signal])
    difference = numerator - denominator
    return masked(torch.where(difference.isfinite(), difference, torch.nan), mask.bool())


def signal_moments(signal: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Count, sum and sum of squares over the unmasked tokens that have a signal, of shape `(3,)`, in float64. The moments
    of several batches add up.
    """
    values = signal[mask.bool() & ~signal.isnan()].double()
    return torch.stack([torch.tensor(float(values.numel()), dtype=torch.float64), values.sum(), values.square().sum()])


def mean_and_std(moments: Sequence[float] | torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation, in nats, of the tokens that `signal_moments` saw; (0, 0) if there were none."""
    count, total, squares = (float(x) for x in moments)
    if not count:
        return 0.0, 0.0
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0) ** 0.5


def normalize_signal(
    signal: torch.Tensor,
    mask: torch.Tensor,
    *,
    mean: float,
    std: float,
    normalization: str = "standardize",
    clip: float | None = 2.0,
) -> torch.Tensor:
    r"""
    \\( \mathrm{clamp}((s_t - m) / d, -c, c) \\), of shape `(batch, time)`, 0 where masked or NaN. Our
    choice.

    `"standardize"`: \\( m \\) mean and \\( d \\) standard deviation over the tokens of the whole set. The mean of
    `"teacher"` on the base's own samples is \\( -\mathrm{KL}(\pi_0 \| \pi_E) \le 0 \\): left in, it lowers the
    probability of every token. `"scale"`: only the division. `"none"`: neither. A signal whose spread is below
    `MIN_SIGNAL_STD` is rounding noise and becomes 0.

    Args:
        mean (`float`), std (`float`):
            Over the tokens of the whole set, all processes.
        clip (`float`, *optional*, defaults to `2.0`):
            \\( c \\). `None` for no bound.
    """
    known = mask.bool() & ~signal.isnan()
    if std < MIN_SIGNAL_STD:
        return torch.zeros_like(signal)
    if normalization == "standardize":
        signal = signal - mean
    if normalization != "none":
        signal = signal / std
    return masked(signal if clip is None else signal.clamp(-clip, clip), known)
