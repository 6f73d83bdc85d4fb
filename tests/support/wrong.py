"""What the tests of wrong uses share: trainers that get nothing but the wrong argument, and what a clear error is."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trl_ext import (
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    RLADConfig,
    RLADTrainer,
    TrOPDConfig,
    TrOPDTrainer,
)


CONFIGS = {"drpo": DRPOConfig, "rlad": RLADConfig, "erpd": ERPDConfig, "tropd": TrOPDConfig}
TRAINERS = {"drpo": DRPOTrainer, "rlad": RLADTrainer, "erpd": ERPDTrainer, "tropd": TrOPDTrainer}
NOTHING = object()  # leaves an argument out


def config(method: str, **settings: Any) -> Any:
    return CONFIGS[method](**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", **settings})


def construct(method: str, **arguments: Any) -> Any:
    """A trainer whose model must not be loaded: no model has that name."""
    settings = arguments.pop("settings", {})
    given: dict[str, Any] = {"model": "no-such-policy", "train_dataset": tiny.prompts()}
    if "args" not in arguments:
        given["args"] = config(method, **settings)
    if method != "tropd":
        given["reward_funcs"] = tiny.digits_reward
    if method in ("rlad", "tropd"):
        given["teacher_model"] = "no-such-teacher"
    given |= arguments
    return TRAINERS[method](**{name: value for name, value in given.items() if value is not NOTHING})


def assert_clear(use: Callable[[], Any], message: str) -> None:
    """The use is refused in one or two sentences that match `message`, by code that knows what was asked for."""
    with pytest.raises((TypeError, ValueError, OSError, ImportError)) as caught:
        use()
    text = str(caught.value)
    assert re.search(message, text, re.S), text
    assert len(text) < 1000  # the longest lists all optimizers
    raised_in = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert "torch" not in raised_in.parts, f"a traceback of torch: {text}"
