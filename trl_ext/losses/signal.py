r"""
What stage 2 of ERPD distils: the token-level signal of a teacher, on the tokens of a fixed set.

Notation, per token: \\( \pi_0 \\) the base policy, \\( \pi_E \\) the extreme region policy, trained on the set's
rewards, \\( \pi_U \\) the unlearned policy, trained on the reversed rewards.
"""

from collections.abc import Sequence

import torch

from trl_ext.losses.token_loss import masked


# signal -> the policies it is the log-ratio of: (numerator, denominator)
SIGNALS: dict[str, tuple[str, str]] = {
    "teacher": ("teacher", "base"),
    "unlearned_reference": ("teacher", "unlearned"),
    "unlearned_teacher": ("base", "unlearned"),
}
# Below this spread, in nats, a signal is what two passes of the same policy differ by: nothing was learned
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
    Count, sum and sum of squares over the unmasked tokens that have a signal: (3,) in float64. Moments of several
    batches add up.
    """
    values = signal[mask.bool() & ~signal.isnan()].double()
    return torch.stack([torch.tensor(float(values.numel()), dtype=torch.float64), values.sum(), values.square().sum()])


def mean_and_std(moments: Sequence[float] | torch.Tensor) -> tuple[float, float]:
    """Of the tokens that `signal_moments` saw: in nats. (0, 0) where there were none."""
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
    `"teacher"` on the base's own samples is \\( -\mathrm{KL}(\pi_0 \| \pi_E) \le 0 \\): left in, it pushes every
    token down. `"scale"`: only the division. `"none"`: neither. A spread below `MIN_SIGNAL_STD` would only amplify
    noise, and such a signal becomes 0.

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
