"""
The trust regions that a policy can be trained in, as one table: a new per-token loss becomes available to every
trainer with a `trust_region` setting by one row here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from trl import GRPOConfig

from trl_ext.arguments import changed_settings, check_choice, in_code
from trl_ext.losses import TokenLoss, dppo_loss, drpo_loss, ppo_clip_loss, spo_loss


@dataclass(frozen=True)
class TrustRegion:
    """
    What keeps the policy near the one that sampled the tokens: a per-token loss and the settings it reads.

    Args:
        loss (`Callable[..., TokenLoss]`):
            Called with `(logps, behaviour_logps, advantages, mask)`, `radius=` where the region has one, and the
            keywords of `options`.
        summary (`str`):
            One phrase for `--help`.
        radius (`float`, *optional*):
            Default of `trust_region_radius`. `None` for a loss that takes no `radius`.
        unit (`str`, *optional*, defaults to `""`):
            What the radius is measured in.
        largest_shift (`float`, *optional*, defaults to `inf`):
            The most that a token can move in that unit: a radius of this size or more never binds.
        options (`Mapping[str, str]`, *optional*):
            Name of a setting of the configuration -> keyword of the loss. A configuration that lacks the setting
            takes the default of the loss.
    """

    loss: Callable[..., TokenLoss]
    summary: str
    radius: float | None = None
    unit: str = ""
    largest_shift: float = math.inf
    options: Mapping[str, str] = field(default_factory=dict)


GRPO_SETTINGS = {setting.name for setting in fields(GRPOConfig)}
CLIPPING = {"epsilon": "epsilon_low", "epsilon_high": "epsilon_high", "delta": "ratio_cap"}
RATIO_CAP = {"dppo_ratio_cap": "ratio_cap"}
PROBABILITY: dict[str, Any] = {"unit": "absolute probability", "largest_shift": 1.0}

TRUST_REGIONS: dict[str, TrustRegion] = {
    "drpo": TrustRegion(drpo_loss, "DRPO's smooth regularizer on the shift of the probability", 0.5, **PROBABILITY),
    "spo": TrustRegion(spo_loss, "SPO's smooth regularizer on the ratio", 0.2, unit="|ratio - 1|"),
    "dppo_tv": TrustRegion(
        partial(dppo_loss, divergence="tv"),
        "DPPO's mask by binary total variation",
        0.15,
        **PROBABILITY,
        options=RATIO_CAP,
    ),
    "dppo_kl": TrustRegion(
        partial(dppo_loss, divergence="kl"), "DPPO's mask by binary KL", 0.05, unit="nats", options=RATIO_CAP
    ),
    "ppo_clip": TrustRegion(ppo_clip_loss, "PPO's clip, as in GRPO", options=CLIPPING),
}


def trust_region_loss(
    args: Any,
    logps: torch.Tensor,
    behaviour_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    region: str | None = None,
) -> TokenLoss:
    """
    The loss of `args.trust_region` (or of `region`) with the settings in `args`, for tensors of shape `(batch, time)`;
    `advantages` may be of shape `(batch, 1)`.
    """
    row = TRUST_REGIONS[region or args.trust_region]
    keywords = {word: getattr(args, name) for name, word in row.options.items() if hasattr(args, name)}
    if row.radius is not None:
        keywords["radius"] = trust_region_radius(args)
    return row.loss(logps, behaviour_logps, advantages, mask, **keywords)


def trust_region_radius(args: Any) -> float | None:
    """The radius in use: `args.trust_region_radius`, or the default of the chosen region (`None` if it has none)."""
    return TRUST_REGIONS[args.trust_region].radius if args.trust_region_radius is None else args.trust_region_radius


def check_trust_region(args: Any) -> None:
    """Raises a `ValueError` for an unknown region, a radius that is not one, or settings of another region."""
    name, radius = args.trust_region, args.trust_region_radius
    check_choice("trust_region", name, TRUST_REGIONS)
    row = TRUST_REGIONS[name]
    if radius is not None and row.radius is None:
        instead = f" and set {' and '.join(row.options)}" if row.options else ""
        raise ValueError(
            f"trust_region_radius={radius} has no meaning for trust_region={name!r}: remove it{instead}, or choose "
            "another trust_region."
        )
    if radius is not None and not (math.isfinite(radius) and radius > 0):
        raise ValueError(
            f"trust_region_radius={radius} must be positive and finite: set a positive number, or None for {name}'s "
            f"default of {row.radius} ({row.unit})."
        )
    for setting, value in changed_settings(args, _settings_of_others(row) - GRPO_SETTINGS).items():
        takers = [repr(other) for other, description in TRUST_REGIONS.items() if setting in description.options]
        raise ValueError(
            f"{setting}={value} has no meaning for trust_region={name!r}: remove it, or set trust_region to "
            f"{' or '.join(takers)}."
        )


def _settings_of_others(row: TrustRegion) -> set[str]:
    """Names of the settings that only other trust regions read."""
    return {setting for other in TRUST_REGIONS.values() for setting in other.options} - set(row.options)


def trust_region_warnings(args: Any) -> list[str]:
    """One sentence for each setting of a trust region that is legal but has no effect."""
    row, warnings = TRUST_REGIONS[args.trust_region], []
    # GRPO's own settings are not refused, because a script that is changed from GRPOTrainer may set them
    if unused := changed_settings(args, _settings_of_others(row) & GRPO_SETTINGS):
        fix = "remove it" if row.radius is None else "set trust_region_radius instead"
        warnings.append(f"{in_code(unused)} has no effect with trust_region={args.trust_region!r}: {fix}.")
    radius = trust_region_radius(args)
    if radius is not None and radius >= row.largest_shift:
        warnings.append(
            f"trust_region_radius={radius} is in {row.unit}, which cannot shift by more than {row.largest_shift:g}, "
            f"so that the trust region never binds: set it below {row.largest_shift:g}, e.g. {row.radius}."
        )
    return warnings
