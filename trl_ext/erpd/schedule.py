"""The schedule of a run of ERPD: rounds, their phases, passes over the set, and the learning rate of each update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, get_scheduler
from trl import GRPOConfig

from trl_ext.losses.erpd import SIGNALS


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of one phase: its peak, and its schedule over the updates of the phase."""

    peak: float
    scheduler_type: str
    warmup_steps: float  # a number of updates, or a share of them if below 1, as in transformers

    def factors(self, steps: int, scheduler_kwargs: dict | None) -> Callable[[int], float]:
        """Maps an update of the phase to a share of the peak, as transformers does."""
        warmup = int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(steps * self.warmup_steps)
        # Some schedules have a minimum, which they divide by the learning rate of the optimizer
        placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=self.peak)
        schedule = get_scheduler(
            self.scheduler_type, placeholder, warmup, steps, scheduler_specific_kwargs=scheduler_kwargs or None
        )
        return schedule.lr_lambdas[0]


@dataclass(frozen=True)
class Phase:
    """Passes over the set of a round that train one policy, starting from the base policy of the round."""

    round: int  # from 1
    policy: str  # what is trained: "teacher", "unlearned" or "distilled"
    teacher: int  # the number of the teacher that this policy is for; 0 for "distilled"
    loss: str  # "sapo", "ce" or "mse", or "distillation"
    passes: int
    learning_rate: LearningRate

    @property
    def stage(self) -> int:
        """1: extraction; 2: distillation."""
        return 2 if self.policy == "distilled" else 1

    @property
    def name(self) -> str:
        """The name of the policy in logs and files, unique within a round."""
        return self.policy if self.stage == 2 else f"{self.policy}_{self.loss}"


class Schedule:
    """
    The phases of a run, and where each pass over the set belongs.

    Args:
        phases (`Sequence[Phase]`):
            In the order in which they run, round by round.
        steps_per_pass (`int`):
            Optimizer steps that one pass over the set takes.
    """

    def __init__(self, phases: Sequence[Phase], steps_per_pass: int) -> None:
        self.phases = list(phases)
        self.steps_per_pass = steps_per_pass
        self.passes = [(phase, number) for phase in self.phases for number in range(phase.passes)]

    @property
    def rounds(self) -> int:
        return self.phases[-1].round

    @property
    def steps(self) -> int:
        return len(self.passes) * self.steps_per_pass

    def at_step(self, step: int) -> Phase:
        """The phase that an optimizer step (from 0) belongs to; the last one at the end."""
        return self.passes[min(step // self.steps_per_pass, len(self.passes) - 1)][0]

    def before(self, phase: Phase) -> Phase | None:
        index = self.phases.index(phase)
        return self.phases[index - 1] if index else None

    def ends_phase(self, step: int) -> bool:
        """Whether `step` optimizer steps end with a phase."""
        return step >= self.steps or (step > 0 and self.at_step(step) != self.at_step(step - 1))

    def learning_rate(self, unit: float, scheduler_kwargs: dict | None = None) -> Callable[[int], float]:
        """Maps an optimizer step to the learning rate in multiples of `unit`. The schedule restarts in each phase."""
        pieces: list[tuple[int, float, Callable[[int], float]]] = []
        start = 0
        for phase in self.phases:
            steps = phase.passes * self.steps_per_pass
            rate = phase.learning_rate
            kwargs = scheduler_kwargs if phase.stage == 2 else None
            pieces.append((start, rate.peak / unit, rate.factors(steps, kwargs)))
            start += steps
        boundaries = [start for start, _, _ in pieces]

        def factor(step: int) -> float:
            index = max(i for i, boundary in enumerate(boundaries) if boundary <= step)
            start, peak, course = pieces[index]
            return peak * course(step - start)

        return factor


class LogWherePhasesEnd(TrainerCallback):
    """Logs at the end of each phase, so that no log mixes two phases."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.logging_strategy != "no" and self.schedule.ends_phase(state.global_step):
            control.should_log = True


class Teacher(NamedTuple):
    """One teacher of stage 1, and how stage 2 uses it."""

    loss: str
    signal: str
    weight: float


def teachers_of(args: GRPOConfig) -> list[Teacher]:
    """The teachers that the settings ask for."""
    losses, signals = as_list(args.extraction_loss), as_list(args.signal)
    signals = signals * len(losses) if len(signals) == 1 else signals
    weights = [1 / len(losses)] * len(losses) if args.signal_weights is None else args.signal_weights
    return [Teacher(*settings) for settings in zip(losses, signals, weights, strict=True)]


def phases_of(args: GRPOConfig, learning_rate: float) -> list[Phase]:
    """
    All phases of a run: in each round the policies that the signals need, then the distilled policy.

    `learning_rate` is the optimizer's.
    """
    peak = learning_rate if args.extraction_learning_rate is None else args.extraction_learning_rate
    course = as_text(args.extraction_lr_scheduler_type)
    if course == "constant" and args.extraction_warmup_steps:  # which transformers would leave out
        course = "constant_with_warmup"
    extraction = LearningRate(peak, course, args.extraction_warmup_steps)
    phases = []
    for number in range(1, args.rounds + 1):
        own_rate = learning_rate * args.distillation_learning_rate_decay ** (number - 1)
        distillation = LearningRate(own_rate, as_text(args.lr_scheduler_type), args.warmup_steps or 0)
        for index, teacher in enumerate(teachers_of(args)):
            for policy in ("teacher", "unlearned"):
                if policy in SIGNALS[teacher.signal]:
                    phases.append(Phase(number, policy, index, teacher.loss, args.extraction_passes, extraction))
        phases.append(Phase(number, "distilled", 0, "distillation", args.distillation_passes, distillation))
    return phases


def as_list(value: str | list[str]) -> list[str]:
    """A setting that may be one value or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def as_text(setting: Any) -> str:
    """A setting that may be a member of an enumeration, as a string."""
    return str(getattr(setting, "value", setting))
