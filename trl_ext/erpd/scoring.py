"""What the fixed set is measured by: the log-probabilities of each policy, and the signal that they make."""

import math
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger

from trl_ext.erpd.fixed_set import FixedSet
from trl_ext.erpd.host import Host
from trl_ext.erpd.measures import reduced
from trl_ext.erpd.schedule import teachers_of
from trl_ext.losses import normalize_signal, token_signal
from trl_ext.losses.erpd import MIN_SIGNAL_STD, SIGNALS, mean_and_std, signal_moments


logger = get_logger(__name__)

# In nats per token: on its own samples, a policy's cross-entropy is its entropy, on average
MAX_SURPRISE = 1.0


def score_set(host: Host, fixed_set: FixedSet, name: str) -> dict[str, float]:
    """
    Scores the set by the policy as it is: `{name}_logps` joins the batches.

    Returns the policy's `entropy` and `cross_entropy` (nats per token) on the set; the divergence KL(base || policy),
    estimated on the set, which the base policy has sampled, as `kl_per_sequence` and `kl_per_token`; and
    `log_ratio_of_correct`, the mean log-ratio to the base of the rollouts with a positive advantage, in nats.
    """
    accelerator, sums = host.trainer.accelerator, torch.zeros(8, dtype=torch.float64)
    with host.measuring():
        for batch, mask in fixed_set.masks():
            on_device = {name: value.to(accelerator.device) for name, value in batch.items()}
            logps, entropies = (values.float().cpu() for values in host.score(on_device))
            batch[f"{name}_logps"] = logps
            mask = mask.bool()
            log_ratio = (logps - batch["base_logps"]).masked_fill(~mask, 0).double().sum(1)
            good = (batch["advantages"] > 0) & mask.any(1)
            sums += torch.stack(
                [
                    entropies[mask].double().sum(),
                    mask.sum(),
                    -log_ratio.sum(),
                    mask.any(1).sum(),
                    log_ratio[good].sum(),
                    good.sum(),
                    logps[mask].isnan().sum(),
                    -logps[mask].double().sum(),
                ]
            )
    entropy, tokens, kl, sequences, good_log_ratio, good_count, broken, cross_entropy = reduced(accelerator, sums)
    if broken:
        raise ValueError(
            f"The log-probabilities of {name} are NaN on {broken:.0f} tokens of the set, so its training has failed: "
            "lower extraction_learning_rate (stage 1) or learning_rate (stage 2), or max_grad_norm."
        )
    return {
        "entropy": entropy / max(tokens, 1),
        "cross_entropy": cross_entropy / max(tokens, 1),
        "kl_per_sequence": kl / max(sequences, 1),
        "kl_per_token": kl / max(tokens, 1),
        "log_ratio_of_correct": good_log_ratio / good_count if good_count else math.nan,
    }


def log_ratio_to_sampler(host: Host, fixed_set: FixedSet) -> dict[str, float]:
    r"""
    What is worth logging about the tokens that the sampler has scored, if there are any: the means of \\( \log \pi_0
    - \log \mu \\) and of its absolute value, in nats per token.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for batch, mask in fixed_set.masks():
        if "sampling_per_token_logps" in batch:
            log_ratio = (batch["base_logps"] - batch["sampling_per_token_logps"]).double()
            known = mask.bool() & log_ratio.isfinite()
            sums += torch.stack([log_ratio[known].sum(), log_ratio[known].abs().sum(), known.sum()])
    total, absolute, count = reduced(host.trainer.accelerator, sums)
    if not count:
        return {}
    return {"base/log_ratio_to_sampler": total / count, "sampling/fresh_log_ratio_abs": absolute / count}


def warn_of_strange_rollouts(scores: dict[str, float]) -> None:
    """For rollouts that another policy may have sampled: `scores` are the base policy's, of `score_set`."""
    surprise = scores["cross_entropy"] - scores["entropy"]
    if surprise > MAX_SURPRISE:
        logger.warning(
            f"The base policy gives the stored rollouts next to no probability ({scores['cross_entropy']:.2f} nats "
            f"per token, where its own samples would have about {scores['entropy']:.2f}), so there is little that it "
            "could learn from them: check that their chat template and tokenizer are those of this model, or store "
            "rollouts of this model."
        )


def make_signal(host: Host, fixed_set: FixedSet) -> dict[str, float]:
    """What stage 2 distils joins the set, and what it was made of leaves it. Returns what is worth logging."""
    args = host.trainer.args
    logs: dict[str, float] = {}
    for batch in fixed_set.batches:
        batch["signal"] = torch.zeros_like(batch["base_logps"])
        batch["anchor_logps"] = batch["base_logps"]
    for teacher in teachers_of(args):
        signals, moments = [], torch.zeros(3, dtype=torch.float64)
        policies = SIGNALS[teacher.signal]
        names = {policy: "base" if policy == "base" else f"{policy}_{teacher.loss}" for policy in policies}
        for batch, mask in fixed_set.masks():
            logps = {policy: batch[f"{name}_logps"] for policy, name in names.items()}
            signals.append(token_signal(teacher.signal, logps, mask))
            moments += signal_moments(signals[-1], mask)
        mean, std = mean_and_std(reduced(host.trainer.accelerator, moments))
        normalized = partial(
            normalize_signal, mean=mean, std=std, normalization=args.signal_normalization, clip=args.signal_clip
        )
        for (batch, mask), signal in zip(fixed_set.masks(), signals, strict=True):
            batch["signal"] += teacher.weight * normalized(signal, mask)
        logs |= {f"signal_{teacher.loss}/mean": mean, f"signal_{teacher.loss}/std": std}
        if std < MIN_SIGNAL_STD:
            logger.warning(
                f"The signal of {teacher.loss} has a standard deviation of {std:.1e} nats, which is no more than "
                "rounding, so nothing of it is distilled: raise extraction_learning_rate or extraction_passes, or "
                "choose prompts whose rollouts differ in reward."
            )
    keep = {"base_logps", "anchor_logps", "sampling_per_token_logps"}
    for batch in fixed_set.batches:
        for name in [name for name in batch if name.endswith("_logps") and name not in keep]:
            del batch[name]
    return logs


def warn_of_collapse(round_number: int, loss: str, measures: dict[str, float], base: dict[str, float]) -> None:
    """
    Says in one sentence that a teacher is ruined: by its reward on held-out prompts, where there are any, else by the
    probability of the rollouts with a positive advantage.
    """
    rewards: Any = measures.get("reward", math.nan), base.get("reward", math.nan)
    if not any(map(math.isnan, rewards)):
        collapsed = not rewards[0] > rewards[1]
        finding = (
            f"is no better than the base policy (reward {rewards[0]:.3f} against {rewards[1]:.3f}, entropy "
            f"{measures['entropy']:.3f} against {base['entropy']:.3f} nats per token, "
            f"{measures['kl_per_sequence']:.1f} nats per sequence away from it)"
        )
    else:
        collapsed = measures["set_log_ratio_of_correct"] <= 0  # NaN where no rollout is better than another
        finding = (
            f"makes even the correct rollouts less likely than the base policy does (by "
            f"{-measures['set_log_ratio_of_correct']:.2f} nats per sequence)"
        )
    if collapsed:
        logger.warning(
            f"Round {round_number}: the extreme region policy trained with {loss} {finding}, so what is distilled of "
            "it may be noise: set signal='unlearned_reference', or lower extraction_passes or "
            "extraction_learning_rate."
        )
