"""Trainers that extend TRL: change one class name in a script that uses `GRPOTrainer` or `GKDTrainer`."""

from typing import TYPE_CHECKING

from trl_ext._lazy import lazy_attributes


__version__ = "0.1.0"

__all__ = [
    "DRPOConfig",
    "DRPOTrainer",
    "ERPDConfig",
    "ERPDTrainer",
    "PolicyLossTrainer",
    "RLADConfig",
    "RLADTrainer",
    "TrOPDConfig",
    "TrOPDTrainer",
    "TrainingDiagnosticsCallback",
]

if TYPE_CHECKING:
    from trl_ext.diagnostics import TrainingDiagnosticsCallback
    from trl_ext.drpo.drpo_config import DRPOConfig
    from trl_ext.drpo.drpo_trainer import DRPOTrainer
    from trl_ext.erpd.erpd_config import ERPDConfig
    from trl_ext.erpd.erpd_trainer import ERPDTrainer
    from trl_ext.policy_loss_trainer import PolicyLossTrainer
    from trl_ext.rlad.rlad_config import RLADConfig
    from trl_ext.rlad.rlad_trainer import RLADTrainer
    from trl_ext.tropd.tropd_config import TrOPDConfig
    from trl_ext.tropd.tropd_trainer import TrOPDTrainer


# Lazy: `import trl_ext` and the pure losses must not pay for importing TRL and transformers
__getattr__ = lazy_attributes(
    __name__,
    {
        "DRPOConfig": "drpo",
        "DRPOTrainer": "drpo",
        "ERPDConfig": "erpd",
        "ERPDTrainer": "erpd",
        "PolicyLossTrainer": "policy_loss_trainer",
        "RLADConfig": "rlad",
        "RLADTrainer": "rlad",
        "TrOPDConfig": "tropd",
        "TrOPDTrainer": "tropd",
        "TrainingDiagnosticsCallback": "diagnostics",
    },
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
