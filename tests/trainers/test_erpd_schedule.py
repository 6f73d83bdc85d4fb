"""The schedule of a run of ERPD: phases, passes, and the learning rate of each update."""

import pytest
import tiny
import torch
from tiny_erpd import right_or_wrong, settings
from tiny_erpd_trainer import make_trainer

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.schedule import LearningRate, Phase, Schedule, phases_of, teachers_of


def test_schedule_and_learning_rates():
    constant, linear = LearningRate(2.0, "constant", 0), LearningRate(1.0, "linear", 2)
    phases = [
        Phase(r, p, 0, "ce", n, lr)
        for r in (1, 2)
        for p, n, lr in (("teacher", 1, constant), ("distilled", 2, linear))
    ]
    schedule = Schedule(phases, steps_per_pass=3)
    assert (schedule.rounds, schedule.steps) == (2, 18)
    assert [schedule.at_step(s).stage for s in range(19)] == [1, 1, 1, *[2] * 6, 1, 1, 1, *[2] * 7]
    assert [s for s in range(19) if schedule.ends_phase(s)] == [3, 9, 12, 18]
    factor = schedule.learning_rate(4.0)
    # height / 4; linear: two updates of warm-up, then down to 0 in four
    once = [0.5, 0.5, 0.5, 0.0, 0.125, 0.25, 0.1875, 0.125, 0.0625]
    assert [factor(s) for s in range(18)] == pytest.approx(once * 2)
    assert factor(18) == 0


def test_a_floor_of_the_learning_rate_is_in_its_own_units():
    # transformers gives such a floor as a share of the optimizer's rate: 5e-7 / 1e-6
    factors = LearningRate(1e-6, "cosine_with_min_lr", 0).factors(10, {"min_lr": 5e-7})
    assert [factors(0), factors(10)] == pytest.approx([1.0, 0.5])
    assert LearningRate(1e-6, "linear", 0.3).factors(8, None)(2) == pytest.approx(2 / 3)  # ceil(0.3 * 8) = 3 updates


COURSES = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
    "warmup_steps": 2,
    "extraction_learning_rate": 3e-3,
    "extraction_lr_scheduler_type": "linear",
    "extraction_warmup_steps": 0.25,
    "extraction_passes": 2,
    "distillation_passes": 3,
}
# In multiples of 1e-3, at two updates a pass. Stage 1, 4 updates: a quarter of them warm-up, then from 3 down in three
# equal steps, whatever `lr_scheduler_kwargs` say. Stage 2, 6 updates: two of warm-up, then the square of what is left
# of the other four
RATES = [0, 3, 2, 1, 0, 1 / 2, 1, (3 / 4) ** 2, (2 / 4) ** 2, (1 / 4) ** 2]


def test_each_stage_has_the_course_that_is_set_for_it(tmp_path):
    args = ERPDConfig(**settings(tmp_path, **COURSES))
    factor = Schedule(phases_of(args, 1e-3), steps_per_pass=2).learning_rate(1e-3, args.lr_scheduler_kwargs)
    assert [factor(step) for step in range(10)] == pytest.approx(RATES, abs=1e-6)


@pytest.mark.parametrize(("decay", "expected"), [(0.5, [1, 1 / 2, 1 / 4]), (1.0, [1, 1, 1])])
def test_stage_2_gets_slower_from_round_to_round(tmp_path, decay, expected):
    """And stage 1 does not."""
    own = {"rounds": 3, "distillation_learning_rate_decay": decay, "extraction_learning_rate": 3e-3}
    phases = phases_of(ERPDConfig(**settings(tmp_path, **own)), 1e-3)
    rates = {stage: [p.learning_rate.peak for p in phases if p.stage == stage] for stage in (1, 2)}
    assert rates[2] == pytest.approx([1e-3 * share for share in expected])
    assert set(rates[1]) == {3e-3}


def test_the_trainer_goes_by_these_courses(path, tmp_path):
    trainer = make_trainer(path, tmp_path, prompts_per_round=4, **COURSES)
    schedule = trainer.create_scheduler(10, torch.optim.SGD(trainer.model.parameters(), lr=1e-3))
    assert [schedule.lr_lambdas[0](step) for step in range(10)] == pytest.approx(RATES, abs=1e-6)


def test_stage_1_warms_up_without_another_setting(tmp_path):
    """transformers leaves the warm-up of "constant" out, which is the default of stage 1."""
    args = ERPDConfig(**settings(tmp_path, extraction_passes=2, distillation_passes=1, extraction_warmup_steps=2))
    factor = Schedule(phases_of(args, 1e-3), steps_per_pass=2).learning_rate(1e-3, None)
    peak = (args.extraction_learning_rate or 1e-3) / 1e-3
    assert [factor(step) for step in range(4)] == pytest.approx([0, peak / 2, peak, peak])


@pytest.mark.parametrize(("extraction", "first"), [(None, 1e-2), (5e-3, 5e-3)])
def test_an_optimizer_of_ones_own_keeps_its_rate(tmp_path, extraction, first):
    """Where GRPO trains at it, too: `learning_rate` is left at its default."""
    model = tiny.policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    own = settings(tmp_path, prompts_per_round=4, extraction_passes=1, distillation_passes=1, logging_steps=1)
    del own["learning_rate"]
    args = ERPDConfig(**own, extraction_learning_rate=extraction)
    arguments = {"processing_class": tiny.tokenizer(), "optimizers": (optimizer, None)}
    trainer = ERPDTrainer(model, right_or_wrong, args, tiny.prompts(), **arguments)
    trainer.train()
    rates = [(log["stage"], log["learning_rate"]) for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == [(1, pytest.approx(first))] * 2 + [(2, pytest.approx(1e-2))] * 2


def test_the_default_weights_of_the_signals_have_the_sum_1(tmp_path):
    def weights(losses):
        args = ERPDConfig(**settings(tmp_path, extraction_loss=losses))
        return [teacher.weight for teacher in teachers_of(args)]

    assert weights(["ce"]) == [1]
    assert weights(["ce", "mse"]) == [1 / 2, 1 / 2]


def test_each_phase_ends_with_a_log(path, tmp_path):
    """4 updates per phase, of which `logging_steps` asks for the 3rd and 6th only."""
    trainer = make_trainer(
        path, tmp_path, prompts_per_round=4, extraction_passes=2, distillation_passes=2, logging_steps=3
    )
    trainer.train()
    logs = [(log["step"], log["stage"]) for log in trainer.state.log_history if "loss" in log]
    assert logs == [(3, 1), (4, 1), (6, 2), (8, 2)]
