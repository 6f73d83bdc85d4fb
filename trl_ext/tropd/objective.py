"""
The objectives of on-policy distillation as one table, and the loss of every token of a completion, by who wrote it.

A new objective is a loss function in `trl_ext.losses.tropd` and one row of `OBJECTIVES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from trl.experimental.gkd import GKDConfig

from trl_ext.losses import (
    OUTLIER_LOSSES,
    TokenLoss,
    eopd_loss,
    forward_kl_loss,
    guidance_loss,
    off_policy_loss,
    opd_loss,
    reopold_loss,
    tropd_loss,
)
from trl_ext.losses.token_loss import Metrics, absolute_log_ratio


@dataclass(frozen=True)
class Objective:
    """
    The loss of the tokens that the student sampled, and what it reads.

    Args:
        loss (`Callable[..., TokenLoss]`):
            Called with `(logps, teacher_logps, mask)` and the keywords below.
        summary (`str`):
            One phrase for `--help`.
        options (`Mapping[str, str]`, *optional*):
            Name of a setting of the configuration -> keyword of the loss.
        tensors (`tuple[str, ...]`, *optional*):
            Tensors of the batch that the loss takes under the same keyword, `None` where the batch has none:
            `"teacher_entropy"`, which a teacher on a server does not give; `"draws"`, uniform in [0, 1);
            `"uncertain"`, the tokens of the step about which the student is least certain, from
            `reopold_switch_step` on.
        top_k (`str`, *optional*):
            The setting that says how many of the teacher's most likely tokens the loss takes, as `top_k_logps` and
            `teacher_top_k_logps`.
        other_settings (`tuple[str, ...]`, *optional*):
            Settings of this objective that its loss does not read.
    """

    loss: Callable[..., TokenLoss]
    summary: str
    options: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    top_k: str | None = None
    other_settings: tuple[str, ...] = ()

    @property
    def settings(self) -> set[str]:
        """All settings of this objective."""
        return {*self.options, *self.other_settings} | ({self.top_k} if self.top_k else set())


GKD_SETTINGS = {setting.name for setting in fields(GKDConfig)}
CLIP = {"outlier_clip_floor": "clip_floor", "outlier_clip_coef": "clip_coef"}

OBJECTIVES: dict[str, Objective] = {
    "tropd": Objective(
        tropd_loss,
        "trust region on-policy distillation",
        options={"outlier_loss": "outlier_loss", **CLIP},
        tensors=("draws",),
        top_k="outlier_top_k",
        other_settings=("trust_region",),
    ),
    "opd": Objective(opd_loss, "the sampled reverse KL on every token"),
    "forward_kl": Objective(forward_kl_loss, "GKD's forward KL on every token", top_k="outlier_top_k"),
    "eopd": Objective(
        eopd_loss,
        "OPD and a forward KL where the teacher is uncertain",
        options={"eopd_entropy_threshold": "entropy_threshold"},
        tensors=("teacher_entropy",),
        top_k="eopd_top_k",
    ),
    "reopold": Objective(
        reopold_loss,
        "OPD with a floor, later on uncertain tokens only",
        options={"reopold_floor": "floor"},
        tensors=("uncertain",),
        other_settings=("reopold_switch_step", "reopold_top_entropy_share"),
    ),
}


def objective_of(args: Any) -> Objective:
    """The row that `args` choose; TrOPD's without what its outlier loss and trust region do not read."""
    row = OBJECTIVES[args.objective]
    if "outlier_loss" not in row.options:
        return row
    terms = OUTLIER_LOSSES[args.outlier_loss]
    options = {name: word for name, word in row.options.items() if terms.clip or name not in CLIP}
    return replace(
        row,
        options=options,
        top_k=row.top_k if terms.forward_kl else None,
        tensors=row.tensors if args.trust_region == "sampled" else (),
    )


def unused_settings(args: Any) -> set[str]:
    """Settings of objectives and outlier losses that the chosen one does not read. Those of GKD have other readers."""
    used = objective_of(args).settings | ({"outlier_top_k"} if args.lmbda < 1 else set())
    return {name for row in OBJECTIVES.values() for name in row.settings} - used - GKD_SETTINGS


def teacher_top_k(args: Any) -> int:
    """How many of the teacher's most likely tokens a run needs; 0 for none."""
    top_k = objective_of(args).top_k
    return max(getattr(args, top_k) if top_k else 0, args.outlier_top_k if args.lmbda < 1 else 0)


def completion_loss(
    args: Any,
    training: bool,
    all_logps: torch.Tensor,
    entropy: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, list[tuple[Metrics, torch.Tensor]]]:
    """
    - The student's own tokens have the loss of `args.objective`.
    - Guided tokens, the teacher's prefix, have `guidance_loss`.
    - Tokens of completions that are not the student's at all (`lmbda` below 1) have `off_policy_loss`.

    Args:
        args ([`TrOPDConfig`]):
            Settings.
        training (`bool`):
            Whether there can be tokens that are not the student's.
        all_logps (`torch.Tensor` of shape `(batch, time, 1 + k)`):
            The student's log-probabilities (nats) of the completion's tokens and of the teacher's most likely ones.
        entropy (`torch.Tensor` of shape `(batch, time)`):
            The student's entropy, in nats.
        inputs (`dict[str, torch.Tensor]`):
            A batch of [`collate`], with the teacher's scores.

    Returns:
        `tuple`: the loss, of shape `(batch, time)`, and metrics, each with the mask of the tokens it is averaged over.
    """
    logps, top_k_logps = all_logps[..., 0], all_logps[..., 1:]
    own = own_mask(inputs)
    token_loss = _own_loss(args, logps, top_k_logps, own, inputs)
    general: Metrics = {"entropy": entropy}
    if "teacher_entropy" in inputs:
        general["teacher/entropy"] = inputs["teacher_entropy"]
    if "sampler_logps" in inputs and training:  # every rollout is used for one update, of the policy that sampled it
        general["sampling/fresh_log_ratio_abs"] = absolute_log_ratio(logps, inputs["sampler_logps"])
    if "top_k_logps" in inputs:
        token_loss.metrics["teacher/top_k_mass"] = inputs["top_k_logps"].exp().sum(-1)
    loss = token_loss.loss
    metrics = [(token_loss.metrics, own & ~inputs["teacher_logps"].isnan()), (general, own)]
    if training and args.guidance != "none":
        loss = loss + guidance_loss(logps, inputs["guided_mask"], coef=args.guidance_coef).loss
    if training and args.lmbda < 1:
        k, mask = args.outlier_top_k, inputs["off_policy_mask"].bool() & ~inputs["teacher_logps"].isnan()
        off_policy = off_policy_loss(top_k_logps[..., :k], inputs["top_k_logps"][..., :k], mask)
        loss = loss + off_policy.loss
        metrics.append((off_policy.metrics, mask))
    return loss, metrics


def own_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """True for the tokens that the student sampled, of shape `(batch, time)`."""
    others = inputs["guided_mask"].bool() | inputs["off_policy_mask"].bool()
    return inputs["completion_mask"].bool() & ~others


def _own_loss(
    args: Any,
    logps: torch.Tensor,
    top_k_logps: torch.Tensor,
    mask: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> TokenLoss:
    """The objective's loss of the student's own tokens."""
    objective = objective_of(args)
    keywords: dict[str, Any] = {word: getattr(args, name) for name, word in objective.options.items()}
    keywords |= {name: inputs.get(name) for name in objective.tensors}
    if objective.top_k:
        k = getattr(args, objective.top_k)
        keywords |= {"top_k_logps": top_k_logps[..., :k], "teacher_top_k_logps": inputs["top_k_logps"][..., :k]}
    return objective.loss(logps, inputs["teacher_logps"], mask, **keywords)
