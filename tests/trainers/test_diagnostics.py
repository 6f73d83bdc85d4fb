"""TrainingDiagnosticsCallback: runs that are made to go wrong, each in one way, and what is said of them."""

import logging
import math

import pytest
import tiny
import tiny_erpd
import tropd_runs
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_ext import (
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    RLADConfig,
    RLADTrainer,
    TrainingDiagnosticsCallback,
)
from trl_ext.diagnostics import CHECKS


class Tracker(TrainerCallback):
    """Sees what wandb and others see. Trackers are there before a user's callbacks."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def constant_reward(completions, **kwargs):
    return [0.0] * len(completions)


def digits(completions, **kwargs):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def drpo(path, tmp_path, reward=tiny.digits_reward, callbacks=(), rollout_func=None, **settings):
    args = DRPOConfig(**tiny.grpo_settings(tmp_path, **settings))
    return DRPOTrainer(path, reward, args, tiny.prompts(), callbacks=list(callbacks), rollout_func=rollout_func)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "trl_ext.diagnostics"]


def test_a_healthy_run_has_no_findings(path, tmp_path, caplog, capsys):
    diagnostics, tracker = TrainingDiagnosticsCallback(), Tracker()
    trainer = drpo(path, tmp_path, callbacks=[tracker, diagnostics], max_completion_length=200, learning_rate=1e-4)
    trainer.train()
    assert diagnostics.findings == {}
    assert warnings_of(caplog) == []
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("step ")] == [
        f"step {i}/4" for i in range(1, 5)
    ]
    assert "FAILED" not in out.split("Diagnostics of the run:")[1]
    # Trackers and log_history have them as metrics
    for logs in (tracker.seen[2], trainer.state.log_history[2]):  # num_iterations=2: there are new rollouts
        assert logs["diagnostics/findings"] == 0
        assert logs["diagnostics/cut_share"] == logs["completions/clipped_ratio"]
    first, second = (trainer.state.log_history[i]["entropy"] for i in (0, 1))
    assert tracker.seen[1]["diagnostics/entropy_share"] == pytest.approx(second / first)


def test_a_constant_reward_and_a_short_limit(path, tmp_path, caplog):
    diagnostics = TrainingDiagnosticsCallback()
    drpo(path, tmp_path, constant_reward, [diagnostics], max_completion_length=2, num_iterations=1).train()
    assert diagnostics.findings == {"groups_without_signal": 3, "cut_share": 3}
    groups, cut = warnings_of(caplog)  # each once, although the run continues for another step
    assert "Step 3: In 100% of the groups all completions have the same reward" in groups
    assert "check reward_funcs" in groups
    assert "are cut off at the length limit" in cut
    assert "Raise max_completion_length" in cut


def test_a_sampler_that_computes_another_policy(path, tmp_path, caplog):
    """Its log-probabilities are off by 0.3 |sin|, 0.19 on average; updates in between do not count."""
    diagnostics = TrainingDiagnosticsCallback(window=2, max_cut_share=None)
    trainer = drpo(path, tmp_path, callbacks=[diagnostics], rollout_func=tiny.rollout, learning_rate=3e-2)
    trainer.train()
    name = "sampling/fresh_log_ratio_abs"
    fresh = [log.get(name) for log in trainer.state.log_history[:4]]  # num_iterations=2: every other update is fresh
    assert [value is not None for value in fresh] == [True, False, True, False]
    assert fresh[0] == pytest.approx(0.19, abs=0.05)
    assert fresh[2] == pytest.approx(0.19, abs=0.05)
    assert list(diagnostics.findings) == ["fresh_log_ratio"]
    assert "they do not compute the same policy. Check that the sampler has" in warnings_of(caplog)[0]


def test_a_sampler_that_computes_another_policy_than_rlads(path, tmp_path, caplog):
    """RLAD's ratio is not against the sampler, but the difference is logged all the same, from the passes it makes."""
    diagnostics = TrainingDiagnosticsCallback(window=1, max_cut_share=None)
    args = RLADConfig(**tiny.grpo_settings(tmp_path, max_steps=3))
    trainer = RLADTrainer(
        path,
        tiny.digits_reward,
        args,
        tiny.prompts(),
        callbacks=[diagnostics],
        rollout_func=tiny.rollout,
        teacher_model=tiny.policy(1),
    )
    trainer.train()
    fresh = [log.get("sampling/fresh_log_ratio_abs") for log in trainer.state.log_history[:3]]
    assert fresh == [pytest.approx(0.19, abs=0.05), None, pytest.approx(0.19, abs=0.05)]
    assert "fresh_log_ratio" in diagnostics.findings


def test_a_learning_rate_that_is_too_high(path, tmp_path, caplog):
    diagnostics = TrainingDiagnosticsCallback(
        window=1, min_entropy_share=0.7, max_outside_share=0.15, max_cut_share=None
    )
    settings = {"num_iterations": 8, "max_steps": 24, "learning_rate": 5e-2, "steps_per_generation": 1}
    drpo(path, tmp_path, digits, [diagnostics], **settings).train()
    assert {"outside_share", "entropy_share"} <= set(diagnostics.findings)
    said = " ".join(warnings_of(caplog))
    assert "of the tokens are outside the trust region (" in said
    assert "The entropy has collapsed to" in said
    assert "ower learning_rate" in said


def test_a_teacher_that_vetoes(path, tmp_path, caplog):
    diagnostics = TrainingDiagnosticsCallback(window=1, max_cut_share=None, max_veto_share=0.3)
    settings = {"teacher_mixture_alpha": 0.0, "teacher_mixture_alpha_end": None, "epsilon": 0.01, "max_steps": 2}
    args = RLADConfig(**tiny.grpo_settings(tmp_path, **settings))
    teacher = tiny.save_policy(tmp_path / "teacher", seed=1)
    trainer = RLADTrainer(
        path, tiny.digits_reward, args, tiny.prompts(), teacher_model=teacher, callbacks=[diagnostics]
    )
    trainer.train()
    assert "veto_share" in diagnostics.findings
    assert "Raise teacher_mixture_alpha" in " ".join(warnings_of(caplog))


def test_a_teacher_that_writes_otherwise(tmp_path, caplog):
    diagnostics, tracker = TrainingDiagnosticsCallback(window=1, max_cut_share=None), Tracker()
    tropd_runs.make_trainer(tmp_path, callbacks=[tracker, diagnostics], max_steps=2, temperature=0.3).train()
    assert "veto_share" in diagnostics.findings
    assert "Set guidance='teacher'" in " ".join(warnings_of(caplog))
    assert tracker.seen[0]["diagnostics/veto_share"] == tracker.seen[0]["outliers/share"]


def test_an_extraction_that_collapses(path, tmp_path, caplog):
    diagnostics = TrainingDiagnosticsCallback(window=2, min_entropy_share=0.9, max_cut_share=None)
    args = ERPDConfig(**tiny_erpd.settings(tmp_path, extraction_learning_rate=3e-2, extraction_passes=4))
    trainer = ERPDTrainer(path, tiny_erpd.right_or_wrong, args, tiny.prompts(), callbacks=[diagnostics])
    trainer.train()
    assert diagnostics.findings["entropy_share"] <= 16  # in stage 1
    assert "Lower extraction_learning_rate or extraction_passes" in " ".join(warnings_of(caplog))


def test_a_fixed_set_without_signal_is_noticed_at_once(path, tmp_path, caplog):
    diagnostics = TrainingDiagnosticsCallback(max_cut_share=None)
    args = ERPDConfig(**tiny_erpd.settings(tmp_path))
    ERPDTrainer(path, constant_reward, args, tiny.prompts(), callbacks=[diagnostics]).train()
    assert list(diagnostics.findings) == ["groups_without_signal"]


# ---- of the callback alone


@pytest.fixture(scope="module", autouse=True)
def accelerate_state():
    PartialState()  # without which accelerate's loggers refuse to log


def logged(diagnostics, *logs):
    state = TrainerState(max_steps=len(logs))
    for step, log in enumerate(logs, start=1):
        state.global_step = step
        diagnostics.on_log(None, state, TrainerControl(), logs=log)
    return logs


def test_a_check_fails_by_the_mean_of_its_window():
    diagnostics = TrainingDiagnosticsCallback(window=2, max_cut_share=0.5, verbose=False)
    name = "completions/clipped_ratio"
    logged(diagnostics, {name: 0.9}, {name: 0.05}, {name: 0.9}, {name: 0.0}, {name: 1.0}, {name: 0.9})
    assert diagnostics.findings == {"cut_share": 6}  # the means are 0.475, 0.475, 0.45, 0.5, 0.95
    assert diagnostics.summary().splitlines()[1].split() == (
        ["cut", "last", "0.900", "worst", "1.000", "at", "most", "0.5", "FAILED", "at", "step", "6"]
    )


def test_values_that_are_missing_are_passed_over():
    diagnostics = TrainingDiagnosticsCallback(window=1, verbose=False)
    logs = logged(diagnostics, {"entropy": None}, {"entropy": math.nan}, {"train_runtime": 3.0})
    assert all(not any(name.startswith("diagnostics") for name in log) for log in logs)
    assert diagnostics.courses == {}


def test_an_erpd_phase_begins_a_new_window():
    diagnostics = TrainingDiagnosticsCallback(window=2, min_entropy_share=0.5, verbose=False)
    values = [(1, 1.0), (1, 0.4), (2, 0.4), (2, 0.3)]
    logged(diagnostics, *({"round": 1, "stage": stage, "entropy": entropy} for stage, entropy in values))
    assert diagnostics.findings == {"entropy_share": 4}  # 0.7 in stage 1; 0.35 of stage 2 alone


@pytest.mark.parametrize("setting", sorted({check.threshold for check in CHECKS}))
def test_a_check_is_switched_off_by_none_and_its_threshold_is_checked(setting, caplog):
    check = next(check for check in CHECKS if check.threshold == setting)
    bad = [{check.metrics[0]: 1.0}, {check.metrics[0]: 0.01 if check.below else 1.0}]
    diagnostics = TrainingDiagnosticsCallback(**{setting: None, "window": 1, "verbose": False})
    logged(diagnostics, *map(dict, bad))
    assert diagnostics.findings == {}
    diagnostics = TrainingDiagnosticsCallback(window=1, verbose=False)
    with caplog.at_level(logging.WARNING):
        logged(diagnostics, *map(dict, bad))
    assert list(diagnostics.findings) == [check.name]
    for value in (-0.1, "0.1", math.nan):
        with pytest.raises(ValueError, match=f"{setting}=.* must be a number"):
            TrainingDiagnosticsCallback(**{setting: value})


def test_the_window_is_checked():
    with pytest.raises(ValueError, match="window=0 must be a whole number of at least 1"):
        TrainingDiagnosticsCallback(window=0)


def test_a_check_with_too_few_values_is_not_called_ok():
    diagnostics, state = TrainingDiagnosticsCallback(window=2, verbose=False), TrainerState()
    for verdict in ("not judged: fewer than 2 logs", "FAILED at step 0"):
        diagnostics.on_log(None, state, TrainerControl(), logs={"frac_reward_zero_std": 1.0})
        assert diagnostics.summary().splitlines()[1].endswith(verdict)


def test_a_resumed_run_knows_what_was_logged_before(caplog):
    """The entropy at the start, the values in the window, and what it has warned of."""
    diagnostics = TrainingDiagnosticsCallback(window=2, verbose=False)
    before = [{"entropy": 2.0, "completions/clipped_ratio": 1.0}, {"entropy": 1.8, "completions/clipped_ratio": 1.0}]
    history = [{**log, "step": step} for step, log in enumerate([*before, {"entropy": 0.1}], start=1)]
    state = TrainerState(max_steps=5, global_step=3, log_history=history)
    diagnostics.on_train_begin(None, state, TrainerControl())
    assert diagnostics.findings == {"cut_share": 2}
    assert warnings_of(caplog) == []
    state.global_step = 4
    diagnostics.on_log(None, state, TrainerControl(), logs={"entropy": 0.1, "completions/clipped_ratio": 1.0})
    assert diagnostics.findings == {"cut_share": 2, "entropy_share": 4}  # 0.05 on average
    (said,) = warnings_of(caplog)
    assert "Step 4: The entropy has collapsed to 5%" in said
    diagnostics.on_train_begin(None, TrainerState(), TrainerControl())  # another run
    assert diagnostics.findings == {}
