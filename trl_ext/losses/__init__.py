"""Per-token losses in plain torch: tensors in, loss and metrics out. Nothing here knows TRL or transformers."""

from trl_ext.losses.divergence_regularized import dppo_loss, drpo_loss, spo_loss
from trl_ext.losses.extraction import reward_cross_entropy_loss, reward_regression_loss, sapo_loss
from trl_ext.losses.on_policy_distillation import (
    eopd_loss,
    forward_kl_top_k,
    least_of_top_share,
    opd_loss,
    reopold_loss,
    tropd_loss,
)
from trl_ext.losses.policy_clip import policy_clip_loss
from trl_ext.losses.ratio_distillation import kdrl_penalty, trrd_loss
from trl_ext.losses.signal import normalize_signal, token_signal
from trl_ext.losses.token_loss import TokenLoss


__all__ = [
    "TokenLoss",
    "dppo_loss",
    "drpo_loss",
    "eopd_loss",
    "forward_kl_top_k",
    "kdrl_penalty",
    "least_of_top_share",
    "normalize_signal",
    "opd_loss",
    "policy_clip_loss",
    "reopold_loss",
    "reward_cross_entropy_loss",
    "reward_regression_loss",
    "sapo_loss",
    "spo_loss",
    "token_signal",
    "tropd_loss",
    "trrd_loss",
]
