"""What to look for in the logs of a run, as a callback: one line per log, a sentence when something goes wrong."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from accelerate.logging import get_logger
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


logger = get_logger(__name__)


@dataclass(frozen=True)
class Check:
    """
    One thing that can go wrong, and how it shows.

    Args:
        name (`str`):
            Of its metric, `diagnostics/{name}`.
        label (`str`):
            In the line of a log.
        metrics (`tuple[str, ...]`):
            Logged metrics whose sum is the value; the check applies where one of them is logged.
        threshold (`str`):
            The setting of [`TrainingDiagnosticsCallback`] that bounds the value.
        sentence (`str`):
            What it means, with `{value}` and `{start}`, the value in the first log.
        remedy (`str`):
            The setting to change.
        extraction_remedy (`str`, *optional*):
            The setting to change in stage 1 of ERPD.
        per_start (`bool`, *optional*, defaults to `False`):
            Whether the value is divided by the first one that was logged.
        below (`bool`, *optional*, defaults to `False`):
            Whether values below the threshold are bad, and not those above.
    """

    name: str
    label: str
    metrics: tuple[str, ...]
    threshold: str
    sentence: str
    remedy: str
    extraction_remedy: str | None = None
    per_start: bool = False
    below: bool = False


FEWER_UPDATES = "lower learning_rate, num_iterations or steps_per_generation (in ERPD: distillation_passes)"
SAME_SAMPLING = (
    "check that the sampler has the current weights and the same precision, top_p=1.0 and top_k=0, and that "
    "temperature is not set in generation_kwargs"
)

ENTROPY = Check(
    "entropy_share",
    "entropy/start",
    ("entropy",),
    "min_entropy_share",
    "The entropy has collapsed to {value:.0%} of its value at the start, so that the rollouts hardly differ any more",
    "lower learning_rate or the number of updates per rollout batch, or raise entropy_coef or beta (not in TrOPD)",
    extraction_remedy="lower extraction_learning_rate or extraction_passes",
    per_start=True,
    below=True,
)
OUTSIDE = Check(
    "outside_share",
    "outside",
    ("outside_region/positive", "outside_region/negative"),
    "max_outside_share",
    "{value:.0%} of the tokens are outside the trust region ({start:.0%} at the start): the policy is far from the "
    "one that the region is around",
    f"{FEWER_UPDATES}; where the share was as high at the start, the sampler or the teacher is far from the policy: "
    "set trust_region_anchor='old_policy' in DRPO, or raise teacher_mixture_alpha in RLAD",
)
CLIPPED = Check(
    "outside_share",
    "clipped",
    ("clip_ratio/region_mean",),
    "max_outside_share",
    OUTSIDE.sentence,
    FEWER_UPDATES,
)
VETOES = Check(
    "veto_share",
    "vetoed",
    ("teacher/veto_positive", "teacher/veto_negative"),
    "max_veto_share",
    "The teacher vetoes {value:.0%} of the tokens, which therefore have no gradient: student and teacher write too "
    "differently",
    "raise teacher_mixture_alpha, lower teacher_log_ratio_clip, or choose a teacher of the same chat format",
)
OUTLIERS = Check(
    "veto_share",
    "outliers",
    ("outliers/share",),
    "max_veto_share",
    "The teacher is unreliable on {value:.0%} of the student's tokens: student and teacher write too differently",
    "set guidance='teacher' or 'dataset', or choose a teacher of the same chat format",
)
SAMPLER = Check(
    "fresh_log_ratio",
    "fresh |log ratio|",
    ("sampling/fresh_log_ratio_abs",),
    "max_fresh_log_ratio",
    "Before any update the trainer's log-probabilities differ from the sampler's by {value:.3f} nats per token on "
    "average: they do not compute the same policy",
    f"{SAME_SAMPLING}; for a sampler that must differ, such as a quantized one, set DRPO's "
    "trust_region_anchor='old_policy' with vllm_importance_sampling_mode='token_truncate'",
    extraction_remedy=f"{SAME_SAMPLING}; with stored rollouts of another policy this is expected",
)
GROUPS = Check(
    "groups_without_signal",
    "groups without signal",
    ("frac_reward_zero_std",),
    "max_groups_without_signal",
    "In {value:.0%} of the groups all completions have the same reward, so that they have no advantage: the prompts "
    "are too easy or too hard, or the reward function does not read the answers",
    "raise num_generations or temperature, choose other prompts, or check reward_funcs on a completion that you know",
)
CUT = Check(
    "cut_share",
    "cut",
    ("completions/clipped_ratio",),
    "max_cut_share",
    "{value:.0%} of the completions are cut off at the length limit, before their answer",
    "raise max_completion_length, or set mask_truncated_completions=True (in TrOPD: raise max_new_tokens)",
)
CHECKS = (ENTROPY, SAMPLER, OUTSIDE, CLIPPED, VETOES, OUTLIERS, GROUPS, CUT)
SHOWN = {"reward": "reward", "teacher/kl": "KL to teacher", "loss": "loss"}  # of each log, beside the checks


@dataclass
class Course:
    """The values of one check over the run."""

    start: float  # as it was logged first
    recent: deque[float]
    last: float = math.nan
    worst: float = math.nan
    found_at: int | None = None  # the update
    judged: bool = False  # whether there were ever enough values


@dataclass(eq=False)
class TrainingDiagnosticsCallback(TrainerCallback):
    r"""
    Watches the metrics of a run of any trainer of this package, or of [`~trl.GRPOTrainer`], for what goes wrong most
    often. It prints one line per log, warns once, in a sentence, of what has gone wrong, with the likely cause and the
    setting to change, and prints a summary at the end. The values are metrics too, `diagnostics/...`, and
    `diagnostics/findings` is the number of checks that have failed so far.

    A check fails when the mean of its last `window` values is beyond its threshold. A threshold of `None` switches the
    check off. Pass the callback to the trainer's constructor, as `callbacks=[...]`: one that is added later logs its
    metrics after the trackers have reported.

    Args:
        min_entropy_share (`float`, *optional*, defaults to `0.1`):
            Lower bound of the policy's entropy, as a share of its first value.
        max_fresh_log_ratio (`float`, *optional*, defaults to `0.04`):
            Bound of the mean \\( |\log \pi - \log \mu| \\), in nats per token, on rollouts that no update has followed
            yet. It is known where the sampler gives log-probabilities (vLLM, `rollout_func`, stored rollouts with
            `logprobs`).
        max_outside_share (`float`, *optional*, defaults to `0.3`):
            Bound of the share of tokens outside the trust region, or clipped.
        max_veto_share (`float`, *optional*, defaults to `0.5`):
            Bound of the share of tokens that the teacher vetoes (RLAD), or on which it is unreliable (TrOPD).
        max_groups_without_signal (`float`, *optional*, defaults to `0.8`):
            Bound of the share of groups whose completions all have the same reward.
        max_cut_share (`float`, *optional*, defaults to `0.3`):
            Bound of the share of completions that are cut off at the length limit.
        window (`int`, *optional*, defaults to `3`):
            How many logged values are averaged.
        verbose (`bool`, *optional*, defaults to `True`):
            Whether to print the line per log and the summary. The sentences are warnings of the logger in any case.

    Example:

    ```python
    >>> from trl_ext import DRPOTrainer, TrainingDiagnosticsCallback

    >>> trainer = DRPOTrainer(..., callbacks=[TrainingDiagnosticsCallback(max_cut_share=0.1)])
    ```
    """

    min_entropy_share: float | None = 0.1
    max_fresh_log_ratio: float | None = 0.04
    max_outside_share: float | None = 0.3
    max_veto_share: float | None = 0.5
    max_groups_without_signal: float | None = 0.8
    max_cut_share: float | None = 0.3
    window: int = 3
    verbose: bool = True
    courses: dict[Check, Course] = field(default_factory=dict, init=False, repr=False)
    _phase: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in {check.threshold for check in CHECKS}:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name}={value!r} must be a number of at least 0, or None to switch the check off.")
        if not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"window={self.window!r} must be a whole number of at least 1.")

    @property
    def findings(self) -> dict[str, int]:
        """The checks that have failed, each with the update at which it was said."""
        return {check.name: course.found_at for check, course in self.courses.items() if course.found_at is not None}

    def on_train_begin(self, args, state, control, **kwargs):
        self.courses.clear()
        self._phase = None
        for logs in state.log_history:  # of a run that is resumed: what it has warned of, it does not warn of again
            self._observe(logs, logs["step"], warns=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {} if logs is None else logs
        seen = self._observe(logs, state.global_step)
        if not seen:
            return
        metrics = {f"diagnostics/{check.name}": self.courses[check].last for check in seen}
        metrics["diagnostics/findings"] = len(self.findings)
        logs.update(metrics)  # for the trackers, which come after
        if state.log_history:
            state.log_history[-1].update(metrics)
        if self.verbose and state.is_world_process_zero:
            shown = [f"{label} {logs[name]:.3f}" for name, label in SHOWN.items() if _is_number(logs.get(name))]
            shown += [f"{check.label} {self.courses[check].last:.3f}" for check in seen]
            tqdm.write(f"step {state.global_step}/{state.max_steps}: {', '.join(shown)}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.verbose and state.is_world_process_zero and self.courses:
            tqdm.write(self.summary())

    def summary(self) -> str:
        """A line for each check that applied: its last and its worst value, its bound, and whether it failed."""
        lines = ["Diagnostics of the run:"]
        for check, course in self.courses.items():
            bound = getattr(self, check.threshold)
            allowed = "off" if bound is None else f"at {'least' if check.below else 'most'} {bound:g}"
            verdict = "ok" if course.judged else f"not judged: fewer than {self.window} logs"
            if course.found_at is not None:
                verdict = f"FAILED at step {course.found_at}"
            lines.append(
                f"  {check.label:<22} last {course.last:<6.3f} worst {course.worst:<6.3f} {allowed:<14} {verdict}"
            )
        return "\n".join(lines)

    def _observe(self, logs: dict[str, Any], step: int, warns: bool = True) -> list[Check]:
        """The checks whose values are in `logs`."""
        phase = logs.get("round"), logs.get("stage")
        if phase != self._phase:  # of ERPD, which then trains another policy
            self._phase = phase
            for course in self.courses.values():
                course.recent.clear()
        return [check for check in CHECKS if self._apply(check, logs, step, warns)]

    def _apply(self, check: Check, logs: dict[str, Any], step: int, warns: bool) -> bool:
        """Takes a check's value from `logs`, where it is logged, and warns once where the check fails."""
        parts = [logs[name] for name in check.metrics if _is_number(logs.get(name))]
        if not parts:
            return False
        value = sum(parts)
        course = self.courses.setdefault(check, Course(value, deque(maxlen=self.window)))
        if check.per_start:
            value = value / course.start if course.start > 0 else 1.0
        course.last = value
        course.worst = (min if check.below else max)(value, value if math.isnan(course.worst) else course.worst)
        course.recent.append(value)
        bound, mean = getattr(self, check.threshold), sum(course.recent) / len(course.recent)
        fails = bound is not None and (mean < bound if check.below else mean > bound)
        enough = len(course.recent) == self.window or "fixed_set/prompts" in logs  # of a whole set of ERPD, at once
        course.judged |= enough
        if fails and enough and course.found_at is None:
            course.found_at = step
            if warns:
                remedy = (check.extraction_remedy if logs.get("stage") == 1 else None) or check.remedy
                sentence = check.sentence.format(value=mean, start=course.start)
                remedy = f"{remedy[0].upper()}{remedy[1:]} ({check.threshold}={bound:g})"
                logger.warning(f"Step {step}: {sentence}. {remedy}.")
        return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def report_after_diagnostics(handler: CallbackHandler) -> None:
    """Puts [`TrainingDiagnosticsCallback`] before the trackers, so that they see its metrics."""
    handler.callbacks.sort(key=lambda callback: not isinstance(callback, TrainingDiagnosticsCallback))
