"""Between ERPD's stages: the base policy is restored, the signal is made, teachers are kept and judged."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_erpd import assert_equal, parameters
from tiny_erpd_runs import Recorder, make_run, with_key

from trl_ext import ERPDTrainer
from trl_ext.erpd.stages import Stages


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_boundary(path, tmp_path, lora):
    """The base is restored bit for bit, the optimizer is empty, the signal is what the teacher says, and fixed."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = make_run(
        path, tmp_path, trainer_class=Recorder, signal="unlearned_reference", temperature=0.8, peft_config=peft_config
    )
    start = parameters(trainer)
    trainer.train()
    names = [(side, phase.name) for side, phase, *_ in trainer.record]
    expected = ["teacher_ce", "unlearned_ce", "distilled"]
    assert names == [(side, name) for name in expected for side in ("begin", "end")]
    for side, _, weights, optimizer_state, _, _ in trainer.record:
        if side == "begin":
            assert_equal(weights, start)
            assert not optimizer_state
        else:
            assert optimizer_state
            moved = {name for name in start if not torch.equal(weights[name], start[name])}
            assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    begin, end = trainer.record[4], trainer.record[5]
    for before, after in zip(begin[4], end[4], strict=True):
        assert torch.equal(before["signal"], after["signal"])
        assert not before["signal"].requires_grad
        assert not [name for name in before if name.startswith(("teacher", "unlearned"))]  # one float per token

    def score(weights):
        trainer.model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return [tiny.naive_logps(trainer.model.eval(), batch, 0.8) for batch in begin[4]]

    raw = [a - b for a, b in zip(score(trainer.record[1][2]), score(trainer.record[3][2]), strict=True)]
    tokens = torch.cat([r[b["completion_mask"].bool()] for r, b in zip(raw, begin[4], strict=True)])
    for r, batch in zip(raw, begin[4], strict=True):
        normalized = ((r - tokens.mean()) / tokens.std(correction=0)).clamp(-2, 2) * batch["completion_mask"]
        torch.testing.assert_close(batch["signal"], normalized, rtol=1e-3, atol=1e-3)
    log = with_key(trainer, "signal_ce/mean")[0]
    assert log["signal_ce/mean"] == pytest.approx(tokens.mean().item(), abs=1e-4)
    assert log["signal_ce/std"] == pytest.approx(tokens.std(correction=0).item(), rel=1e-3)


def test_signals_of_two_teachers(path, tmp_path):
    trainer = make_run(
        path, tmp_path, trainer_class=Recorder, extraction_loss=["ce", "mse"], signal=["teacher", "unlearned_teacher"],
        signal_weights=[2.0, -0.5], signal_normalization="scale", signal_clip=None,
    )  # fmt: skip
    trainer.train()
    phases = [phase.name for side, phase, *_ in trainer.record if side == "end"]
    assert phases == ["teacher_ce", "unlearned_mse", "distilled"]
    batches = trainer.record[4][4]

    def score(weights):
        trainer.model.load_state_dict(weights)
        with torch.no_grad():
            return [tiny.naive_logps(trainer.model.eval(), batch) for batch in batches]

    base, teacher, unlearned = (score(trainer.record[i][2]) for i in (0, 1, 3))
    masks = [batch["completion_mask"] for batch in batches]

    def scaled(first, second):
        raw = [a - b for a, b in zip(first, second, strict=True)]
        std = torch.cat([r[m.bool()] for r, m in zip(raw, masks, strict=True)]).std(correction=0)
        return [r / std * m for r, m in zip(raw, masks, strict=True)]

    first, second = scaled(teacher, base), scaled(base, unlearned)
    for batch, a, b in zip(batches, first, second, strict=True):
        torch.testing.assert_close(batch["signal"], 2.0 * a - 0.5 * b, rtol=1e-3, atol=1e-3)


def test_anchor(path, tmp_path):
    """ "pass": the policy at the start of the pass; "base": the base policy throughout."""
    for anchor in ("pass", "base"):
        trainer = make_run(path, tmp_path, distillation_anchor=anchor)
        seen, original = [], Stages._loss_inputs

        def loss_inputs(stages, batch, phase, seen=seen, original=original):
            inputs = original(stages, batch, phase)
            seen.append(torch.equal(inputs["old_per_token_logps"], inputs["base_logps"]))
            return inputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stages, "_loss_inputs", loss_inputs)
            trainer.train()
        assert seen == [True] * 12 + [anchor == "base"] * 4


def test_teachers_are_kept_where_asked_for(path, tmp_path):
    trainer = make_run(path, tmp_path, keep_teachers=True, signal="unlearned_reference")
    trainer.train()
    folder = tmp_path / "round-1"
    assert sorted(p.name for p in folder.iterdir()) == ["teacher_ce", "unlearned_ce"]
    kept = tiny.policy().from_pretrained(folder / "teacher_ce")
    assert any(not torch.equal(a, b) for a, b in zip(kept.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_collapsed_teacher_is_announced(path, tmp_path, caplog, held_out):
    # reward for the variety that a random policy has, and steps so large that it falls apart

    def variety(completions, **kwargs):
        return [float(len(set(text)) > 4) for text in completions]

    trainer = make_run(
        path, tmp_path, reward=variety,
        extraction_loss="sapo", extraction_learning_rate=0.5, extraction_passes=1,
        eval_dataset=tiny.prompts(8) if held_out else None, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert (
        "may be noise: set signal='unlearned_reference', or lower extraction_passes or extraction_learning_rate"
        in caplog.text
    )
    findings = {
        True: "is no better than the base policy (reward",
        False: "makes even the correct rollouts less likely",
    }
    assert findings[held_out] in caplog.text


def test_a_good_teacher_is_not_announced(path, tmp_path, caplog):
    trainer = make_run(path, tmp_path)
    trainer.train()
    assert "may be noise" not in caplog.text


def test_a_teacher_of_nan_stops_the_run(path, tmp_path):
    class Broken(ERPDTrainer):
        def training_step(self, *args):
            if self.state.global_step == 7:
                next(self.model.parameters()).data.fill_(math.nan)
            return super().training_step(*args)

    with pytest.raises(ValueError, match=r"log-probabilities of teacher_ce are NaN .* lower extraction_learning_rate"):
        make_run(path, tmp_path, trainer_class=Broken).train()


def test_a_teacher_of_nan_is_named_as_such_with_held_out_prompts_too(path, tmp_path, monkeypatch):
    trainer = make_run(path, tmp_path, eval_dataset=tiny.prompts(4), per_device_eval_batch_size=8)
    end = Stages.end_phase

    def broken(stages, phase):
        if phase.stage == 1:
            trainer.model.lm_head.weight.data.fill_(math.nan)
        end(stages, phase)

    monkeypatch.setattr(Stages, "end_phase", broken)
    with pytest.raises(ValueError, match="its training has failed"):
        trainer.train()


def test_without_held_out_prompts_they_are_asked_for(path, tmp_path, caplog):
    make_run(path, tmp_path)
    assert caplog.text.count("pass held-out prompts as eval_dataset") == 1
    caplog.clear()
    make_run(path, tmp_path, eval_dataset=tiny.prompts(4), per_device_eval_batch_size=8)
    assert "held-out" not in caplog.text
