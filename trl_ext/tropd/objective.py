"""The loss of each token of a completion, by who wrote it: Eq. 9 of TrOPD (arXiv 2606.01249), or a baseline."""

from typing import Any

import torch

from trl_ext.losses import TokenLoss, eopd_loss, forward_kl_top_k, opd_loss, reopold_loss, tropd_loss
from trl_ext.losses.token_loss import Metrics, masked


def completion_loss(
    args: Any,
    training: bool,
    all_logps: torch.Tensor,
    entropy: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, list[tuple[Metrics, torch.Tensor]]]:
    """
    - The student's own tokens have the loss of `args.objective`.
    - Guided tokens, the teacher's prefix, have `guidance_coef` times their negative log-likelihood.
    - Tokens of completions that are someone else's whole (`lmbda` below 1) have the forward KL divergence to the
      teacher on its top-k: a sampled token's ratio says nothing there, because the student did not sample it.

    Args:
        args ([`TrOPDConfig`]):
            Settings.
        training (`bool`):
            Whether there can be tokens that are not the student's.
        all_logps (`torch.Tensor` of shape `(batch, time, 1 + k)`):
            The student's log-probabilities (nats) of the tokens that came and of the teacher's likeliest.
        entropy (`torch.Tensor` of shape `(batch, time)`):
            The student's entropy, in nats.
        inputs (`dict[str, torch.Tensor]`):
            A batch of [`collate`], with the teacher's scores.

    Returns:
        `tuple`: the loss, of shape `(batch, time)`, and metrics with the mask of the tokens that they are of.
    """
    logps, top_k_logps = all_logps[..., 0], all_logps[..., 1:]
    guided, off_policy = inputs["guided_mask"].bool(), inputs["off_policy_mask"].bool()
    own = own_mask(inputs)
    token_loss = _objective(args, logps, top_k_logps, own, inputs)
    general: Metrics = {"entropy": entropy}
    if "teacher_entropy" in inputs:
        general["teacher/entropy"] = inputs["teacher_entropy"]
    if "top_k_logps" in inputs:
        general["teacher/top_k_mass"] = inputs["top_k_logps"].exp().sum(-1)
    metrics = [(token_loss.metrics, own & ~inputs["teacher_logps"].isnan()), (general, own)]
    loss = token_loss.loss
    if training and args.guidance != "none":
        loss = loss - args.guidance_coef * masked(logps, guided)
    if training and args.lmbda < 1:
        forward_kl = masked(forward_kl_top_k(top_k_logps, inputs["top_k_logps"]), off_policy)
        metrics.append(({"off_policy/forward_kl": forward_kl}, off_policy))
        loss = loss + forward_kl
    return loss, metrics


def own_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """True for the tokens that the student sampled, of shape `(batch, time)`."""
    others = inputs["guided_mask"].bool() | inputs["off_policy_mask"].bool()
    return inputs["completion_mask"].bool() & ~others


def _objective(
    args: Any,
    logps: torch.Tensor,
    top_k_logps: torch.Tensor,
    mask: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> TokenLoss:
    teacher_logps = inputs["teacher_logps"]
    if args.objective == "opd":
        return opd_loss(logps, teacher_logps, mask)
    if args.objective == "eopd":
        return eopd_loss(
            logps,
            teacher_logps,
            mask,
            top_k_logps=top_k_logps[..., : args.eopd_top_k],
            teacher_top_k_logps=inputs["top_k_logps"][..., : args.eopd_top_k],
            teacher_entropy=inputs["teacher_entropy"],
            entropy_threshold=args.eopd_entropy_threshold,
        )
    if args.objective == "reopold":
        return reopold_loss(logps, teacher_logps, mask, floor=args.reopold_floor, uncertain=inputs.get("uncertain"))
    return tropd_loss(
        logps,
        teacher_logps,
        mask,
        top_k_logps=top_k_logps,
        teacher_top_k_logps=inputs.get("top_k_logps"),
        draws=inputs["draws"] if args.trust_region == "sampled" else None,
        outlier_loss=args.outlier_loss,
        clip_floor=args.outlier_clip_floor,
        clip_coef=args.outlier_clip_coef,
    )
