"""Every per-token loss behind one signature, and random policies to try them on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_ext.losses import (
    TokenLoss,
    dppo_loss,
    drpo_loss,
    eopd_loss,
    forward_kl_loss,
    guidance_loss,
    kdrl_penalty,
    off_policy_loss,
    opd_loss,
    ppo_clip_loss,
    reopold_loss,
    reward_cross_entropy_loss,
    reward_regression_loss,
    sapo_loss,
    spo_loss,
    tropd_loss,
    trrd_loss,
)


@dataclass
class Inputs:
    """Of a batch; all but the mask in one dtype. Log-probabilities and the entropy are in nats."""

    logps: torch.Tensor  # (batch, time): of the policy, differentiable
    behaviour: torch.Tensor  # (batch, time): of the policy that sampled the tokens
    teacher: torch.Tensor  # (batch, time)
    top_k: torch.Tensor  # (batch, time, k): of the policy, differentiable
    teacher_top_k: torch.Tensor  # (batch, time, k)
    teacher_entropy: torch.Tensor  # (batch, time)
    advantages: torch.Tensor  # (batch, 1)
    draws: torch.Tensor  # (batch, time): uniform in [0, 1)
    mask: torch.Tensor  # (batch, time)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another precision, their differentiable ones as new leaves."""
        cast = {
            name: value.detach().to(dtype) if value.is_floating_point() else value
            for name, value in vars(self).items()
        }
        for name in ("logps", "top_k"):
            cast[name].requires_grad_()
        return Inputs(**cast)

    @property
    def targets(self) -> torch.Tensor:
        """One value per sequence."""
        return self.advantages.squeeze(1)


def _top_k(x: Inputs) -> dict[str, torch.Tensor]:
    return {"top_k_logps": x.top_k, "teacher_top_k_logps": x.teacher_top_k}


LOSSES: dict[str, Callable[[Inputs], TokenLoss]] = {
    "ppo_clip": lambda x: ppo_clip_loss(x.logps, x.behaviour, x.advantages, x.mask, ratio_cap=5.0),
    "drpo": lambda x: drpo_loss(x.logps, x.behaviour, x.advantages, x.mask),
    "spo": lambda x: spo_loss(x.logps, x.behaviour, x.advantages, x.mask),
    "dppo_tv": lambda x: dppo_loss(x.logps, x.behaviour, x.advantages, x.mask, radius=0.15, ratio_cap=5.0),
    "dppo_kl": lambda x: dppo_loss(x.logps, x.behaviour, x.advantages, x.mask, radius=0.05, divergence="kl"),
    "trrd": lambda x: trrd_loss(x.logps, x.behaviour, x.teacher, x.advantages, x.mask, log_ratio_clip=None),
    "trrd_drpo": lambda x: trrd_loss(x.logps, x.behaviour, x.teacher, x.advantages, x.mask, region=drpo_loss),
    "kdrl_k2": lambda x: kdrl_penalty(x.logps, x.teacher, x.mask, estimator="k2"),
    "kdrl_k3": lambda x: kdrl_penalty(x.logps, x.teacher, x.mask, estimator="k3"),
    "opd": lambda x: opd_loss(x.logps, x.teacher, x.mask),
    "tropd": lambda x: tropd_loss(x.logps, x.teacher, x.mask, draws=x.draws, **_top_k(x)),
    "tropd_expected": lambda x: tropd_loss(
        x.logps, x.teacher, x.mask, outlier_loss="forward_kl_and_clip", **_top_k(x)
    ),
    "tropd_everywhere": lambda x: tropd_loss(
        x.logps, x.teacher, x.mask, outlier_loss="forward_kl_everywhere_and_clip", draws=x.draws, **_top_k(x)
    ),
    "forward_kl": lambda x: forward_kl_loss(x.logps, x.teacher, x.mask, **_top_k(x)),
    "guidance": lambda x: guidance_loss(x.logps, x.mask),
    "off_policy": lambda x: off_policy_loss(x.top_k, x.teacher_top_k, x.mask),
    "eopd": lambda x: eopd_loss(x.logps, x.teacher, x.mask, teacher_entropy=x.teacher_entropy, **_top_k(x)),
    "reopold": lambda x: reopold_loss(x.logps, x.teacher, x.mask),
    "sapo": lambda x: sapo_loss(x.logps, x.behaviour, x.advantages, x.mask),
    "cross_entropy": lambda x: reward_cross_entropy_loss(x.logps, x.behaviour, (x.targets > 0).to(x.logps), x.mask),
    "regression": lambda x: reward_regression_loss(x.logps, x.behaviour, x.targets, x.mask),
}


def random_inputs(
    batch: int = 4, time: int = 6, vocabulary: int = 151_936, k: int = 8, distance: float = 0.1, seed: int = 0
) -> Inputs:
    """
    Three random policies over `vocabulary` tokens in float64. The logits of the sampler and of the teacher differ from
    the policy's by noise of standard deviation `distance`. The policy and the sampler take turns to draw the tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = 2 * normal(batch, time, vocabulary)
    policy = logits.log_softmax(-1)
    behaviour = (logits + distance * normal(*logits.shape)).log_softmax(-1)
    writer = torch.where((torch.arange(time) % 2 == 0)[:, None], policy, behaviour)  # of ratios above 1, and below
    tokens = writer.exp().view(-1, vocabulary).multinomial(1, generator=generator).view(batch, time, 1)
    teacher = (logits + distance * normal(*logits.shape)).log_softmax(-1)
    teacher_top_k, ids = teacher.topk(k, dim=-1)
    mask = torch.ones(batch, time, dtype=torch.long)
    mask[0, -2:] = 0
    return Inputs(
        logps=policy.gather(2, tokens).squeeze(2),
        behaviour=behaviour.gather(2, tokens).squeeze(2),
        teacher=teacher.gather(2, tokens).squeeze(2),
        top_k=policy.gather(2, ids),
        teacher_top_k=teacher_top_k,
        teacher_entropy=-(teacher.exp() * teacher).sum(-1),
        advantages=normal(batch, 1),
        draws=torch.rand(batch, time, generator=generator, dtype=torch.float64),
        mask=mask,
    )
