"""Per-token losses in plain torch: tensors in, loss and metrics out. Nothing here knows TRL or transformers."""

from trl_ext.losses.drpo import dppo_loss, drpo_loss, spo_loss
from trl_ext.losses.erpd import (
    normalize_signal,
    outcomes_of,
    reward_cross_entropy_loss,
    reward_regression_loss,
    sapo_loss,
    token_signal,
)
from trl_ext.losses.ppo_clip import ppo_clip_loss
from trl_ext.losses.rlad import DISTILLATIONS, kdrl_coefficient, kdrl_mask, kdrl_penalty, trrd_loss
from trl_ext.losses.token_loss import TokenLoss
from trl_ext.losses.tropd import (
    GUIDANCE_SCHEDULES,
    OUTLIER_LOSSES,
    eopd_loss,
    forward_kl_loss,
    forward_kl_top_k,
    guidance_loss,
    least_of_top_share,
    longest_prefix,
    off_policy_loss,
    opd_loss,
    reopold_loss,
    tropd_loss,
)


__all__ = [
    "DISTILLATIONS",
    "GUIDANCE_SCHEDULES",
    "OUTLIER_LOSSES",
    "TokenLoss",
    "dppo_loss",
    "drpo_loss",
    "eopd_loss",
    "forward_kl_loss",
    "forward_kl_top_k",
    "guidance_loss",
    "kdrl_coefficient",
    "kdrl_mask",
    "kdrl_penalty",
    "least_of_top_share",
    "longest_prefix",
    "normalize_signal",
    "off_policy_loss",
    "opd_loss",
    "outcomes_of",
    "ppo_clip_loss",
    "reopold_loss",
    "reward_cross_entropy_loss",
    "reward_regression_loss",
    "sapo_loss",
    "spo_loss",
    "token_signal",
    "tropd_loss",
    "trrd_loss",
]
