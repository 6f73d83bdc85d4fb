"""Trust region on-policy distillation: [`TrOPDTrainer`] and [`TrOPDConfig`]."""

from typing import TYPE_CHECKING

from trl_ext._lazy import lazy_attributes


if TYPE_CHECKING:
    from trl_ext.tropd.tropd_config import TrOPDConfig
    from trl_ext.tropd.tropd_trainer import TrOPDTrainer

__all__ = ["TrOPDConfig", "TrOPDTrainer"]
__getattr__ = lazy_attributes(__name__, {"TrOPDConfig": "tropd_config", "TrOPDTrainer": "tropd_trainer"})
