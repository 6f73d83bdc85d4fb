"""
Ranges of settings that TRL and transformers do not check themselves. Out of range, they would fail only after a model
has been loaded or rollouts have been sampled, or would train wrongly without an error.
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """
    The numbers from `low` to `high`.

    Args:
        low (`float`, defaults to `-inf`), high (`float`, defaults to `inf`):
            Bounds, inclusive.
        above (`float`, *optional*):
            Another lower bound, exclusive.
        whole (`bool`, defaults to `False`):
            Whether the number must be whole.
        optional (`bool`, defaults to `False`):
            Whether `None` is allowed.
        because (`str`, defaults to `""`):
            Why, for the message.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    whole: bool = False
    optional: bool = False
    because: str = ""

    def __contains__(self, value: Any) -> bool:
        if value is None:
            return self.optional
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and value > self.above  # type: ignore[operator]

    def __str__(self) -> str:
        words = "a whole number" if self.whole else "a number"
        if self.high < math.inf and self.above > -math.inf:
            words += f" above {self.above:g}, up to {self.high:g}"
        elif self.high < math.inf:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.above > -math.inf:
            words += f" above {self.above:g}"
        elif self.low > -math.inf:
            words += f" of at least {self.low:g}"
        words += " or None" if self.optional else ""
        return words + (f", because {self.because}" if self.because else "")


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


COUNT = Range(low=1, whole=True)

TRAINING: dict[str, Range | Choice] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "learning_rate": Range(low=0),
    "max_steps": Range(whole=True),
    "num_train_epochs": Range(above=0),
    "max_grad_norm": Range(low=0, optional=True),
    "teacher_server_timeout": Range(above=0),
    "vllm_gpu_memory_utilization": Range(above=0, high=1),
    "vllm_tensor_parallel_size": COUNT,
}
GRPO: dict[str, Range | Choice] = {
    **TRAINING,
    "num_generations": Range(low=2, whole=True, because="the rollouts of a prompt are compared with each other"),
    "num_generations_eval": Range(low=1, whole=True, optional=True),
    "num_iterations": COUNT,
    "steps_per_generation": Range(low=1, whole=True, optional=True),
    "generation_batch_size": Range(low=1, whole=True, optional=True),
    "max_completion_length": Range(low=1, whole=True, optional=True),
    "temperature": Range(above=0, because="the log-probabilities are divided by it"),
    "top_p": Range(above=0, high=1),
    "min_p": Range(low=0, high=1, optional=True),
    "repetition_penalty": Range(above=0),
    "beta": Range(low=0, because="less would push the policy away from the reference"),
    "epsilon": Range(low=0),
    "epsilon_high": Range(low=0, optional=True),
    "delta": Range(above=0, optional=True),
    "top_entropy_quantile": Range(low=0, high=1),
    "scale_rewards": Choice((True, False, "group", "batch", "none")),
    "multi_objective_aggregation": Choice(("sum_then_normalize", "normalize_then_sum")),
    "vllm_mode": Choice(("server", "colocate")),
}


def check_ranges(args: Any, ranges: dict[str, Range | Choice]) -> None:
    """Raises a `ValueError` for the first setting of `args` that is out of its range."""
    names = {setting.name for setting in fields(args)}
    for name, allowed in ranges.items():
        if name in names and getattr(args, name) not in allowed:
            raise ValueError(f"{name}={getattr(args, name)!r} must be {allowed}.")
