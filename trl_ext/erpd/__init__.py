"""Extreme region policy distillation: [`ERPDTrainer`] and [`ERPDConfig`]."""

from typing import TYPE_CHECKING

from trl_ext._lazy import lazy_attributes


if TYPE_CHECKING:
    from trl_ext.erpd.erpd_config import ERPDConfig
    from trl_ext.erpd.erpd_trainer import ERPDTrainer

__all__ = ["ERPDConfig", "ERPDTrainer"]
__getattr__ = lazy_attributes(__name__, {"ERPDConfig": "erpd_config", "ERPDTrainer": "erpd_trainer"})
