"""Trainers that extend TRL: change one class name in a script that uses `GRPOTrainer` or `GKDTrainer`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_MODULES = {
    "DRPOConfig": "trl_ext.drpo.drpo_config",
    "DRPOTrainer": "trl_ext.drpo.drpo_trainer",
    "ERPDConfig": "trl_ext.erpd.erpd_config",
    "ERPDTrainer": "trl_ext.erpd.erpd_trainer",
    "PolicyLossTrainer": "trl_ext.policy_loss_trainer",
    "RLADConfig": "trl_ext.rlad.rlad_config",
    "RLADTrainer": "trl_ext.rlad.rlad_trainer",
    "TrOPDConfig": "trl_ext.tropd.tropd_config",
    "TrOPDTrainer": "trl_ext.tropd.tropd_trainer",
}
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
]

if TYPE_CHECKING:
    from trl_ext.drpo.drpo_config import DRPOConfig
    from trl_ext.drpo.drpo_trainer import DRPOTrainer
    from trl_ext.erpd.erpd_config import ERPDConfig
    from trl_ext.erpd.erpd_trainer import ERPDTrainer
    from trl_ext.policy_loss_trainer import PolicyLossTrainer
    from trl_ext.rlad.rlad_config import RLADConfig
    from trl_ext.rlad.rlad_trainer import RLADTrainer
    from trl_ext.tropd.tropd_config import TrOPDConfig
    from trl_ext.tropd.tropd_trainer import TrOPDTrainer


def __getattr__(name: str) -> Any:
    # Lazy: `import trl_ext` and the pure losses must not pay for importing TRL and transformers
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
