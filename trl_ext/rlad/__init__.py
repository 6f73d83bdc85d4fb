"""Reinforcement-aware distillation: [`RLADTrainer`] and [`RLADConfig`]."""

from typing import TYPE_CHECKING

from trl_ext._lazy import lazy_attributes


if TYPE_CHECKING:
    from trl_ext.rlad.rlad_config import RLADConfig
    from trl_ext.rlad.rlad_trainer import RLADTrainer

__all__ = ["RLADConfig", "RLADTrainer"]
__getattr__ = lazy_attributes(__name__, {"RLADConfig": "rlad_config", "RLADTrainer": "rlad_trainer"})
