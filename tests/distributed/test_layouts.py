"""
Two processes train what one process trains: under DDP, ZeRO-1, 2 and 3, FSDP2 and FSDP1, launched with the files of
examples/accelerate_configs.
"""

import importlib.util
import itertools
import math

import pytest
import torch
from distributed_cases import CASES, LAYOUTS


# Of every weight, and of every number that is logged
RELATIVE, ABSOLUTE = 1e-3, 1e-5
# What depends on the machine, or is a mean over the processes of something that they have different amounts of
NOT_COMPARED = ("step_time", "eval_loss", "eval_runtime", "eval_samples", "eval_steps", "completions/", "rewards/")
# TRL's means over the tokens of a micro-batch
OF_MICRO_BATCHES = ("entropy", "kl")
# The cases that are cells of docs/support.md, and what the cell says beside the layout
SHOWN = {"": "", "-lora": ", LoRA", "-head": ", LoRA with a trained head"}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def cases(wanted, situation=None):
    """Layouts and names of the cases that are `wanted`; `situation`: what they show of a layout to docs/support.md."""
    found = []
    for layout, (name, case) in itertools.product(LAYOUTS, CASES.items()):
        if layout in case.layouts + case.release_layouts and wanted(case):
            marks = [NEEDS_DEEPSPEED] if layout.startswith("zero") else []
            if layout in case.release_layouts:
                marks.append(pytest.mark.release)
            if situation is not None and (form := name.removeprefix(case.trainer)) in SHOWN:
                marks.append(pytest.mark.supports(case.trainer, LAYOUTS[layout].title + SHOWN[form] + situation))
            found.append(pytest.param(layout, name, marks=marks, id=f"{layout}-{name}"))
    return found


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.fault is None, ""))
def test_two_processes_train_what_one_trains(launch, layout, case):
    ours, theirs = launch(layout), launch("one")
    skipped = NOT_COMPARED + (OF_MICRO_BATCHES if CASES[case].accumulation > 1 else ())
    expected = theirs.weights(case)
    weights = ours.weights(case)
    assert set(weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda text, name=name: f"{name}: {text}"
        )
    updates = [log["grad_norm"] for log in theirs.logs(case) if "grad_norm" in log]
    assert updates
    assert min(updates) > 0.01  # else there would be nothing to compare
    for step, (our_log, their_log) in enumerate(zip(ours.logs(case), theirs.logs(case), strict=True)):
        for name, value in their_log.items():
            if value is None or math.isnan(value):  # no rollout of the update was of the kind that it is a mean of
                assert our_log[name] is None or math.isnan(our_log[name]), f"{name} at step {step}"
            elif not name.startswith(skipped):
                assert our_log[name] == pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE), f"{name} at step {step}"


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.resumes and case.fault is None, ": resuming"))
def test_resuming_is_exact(launch, layout, case):
    whole, resumed = (launch(layout).weights(case, folder) for folder in ("final", "resumed/final"))
    assert set(resumed) == set(whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.trainer == "erpd" and case.resumes))
def test_each_process_writes_its_share_of_erpds_state(launch, layout, case):
    checkpoint = launch(layout).out / case / f"checkpoint-{CASES[case].resumes}"
    assert len(list(checkpoint.glob("fixed_set_*.safetensors"))) == 2
    assert len(list(checkpoint.glob("base_policy*.safetensors"))) == (1 if layout == "ddp" else 2)


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.settings.get("keep_teachers")))
def test_erpds_teacher_is_kept_whole(launch, layout, case):
    kept = launch(layout).weights(case, "round-1/teacher_ce")
    expected = launch("one").weights(case, "round-1/teacher_ce")
    assert set(kept) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.fault == "unscored"))
def test_scores_on_one_process_alone_are_an_error_and_no_deadlock(launch, layout, case):
    assert "return them from rollout_func on all, or None on all" in launch(layout).error(case)


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.fault == "adapter"))
def test_an_adapter_is_refused_where_it_would_be_saved_empty(launch, layout, case):
    assert "cannot train an adapter under FSDP1" in launch(layout).error(case)


@pytest.mark.parametrize(("layout", "case"), cases(lambda case: case.fault == "lost_rollouts"))
def test_a_lost_rollout_file_is_no_deadlock(launch, layout, case):
    assert launch(layout).weights(case, "resumed/final")


@pytest.mark.parametrize(
    ("layout", "case", "name"),
    [("ddp", "rlad", "teacher/log_ratio"), ("ddp", "tropd", "guidance/share")],
)
def test_what_is_compared_is_there(launch, layout, case, name):
    assert all(log[name] != 0 for log in launch(layout).logs(case)[:2])
