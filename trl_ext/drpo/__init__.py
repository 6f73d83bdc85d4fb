"""Divergence Regularized Policy Optimization: [`DRPOTrainer`] and [`DRPOConfig`]."""

from typing import TYPE_CHECKING

from trl_ext._lazy import lazy_attributes


if TYPE_CHECKING:
    from trl_ext.drpo.drpo_config import DRPOConfig
    from trl_ext.drpo.drpo_trainer import DRPOTrainer

__all__ = ["DRPOConfig", "DRPOTrainer"]
__getattr__ = lazy_attributes(__name__, {"DRPOConfig": "drpo_config", "DRPOTrainer": "drpo_trainer"})
