"""A run of ERPDTrainer from beginning to end: one continuous training over rounds, stages and passes."""

import pandas
import pytest
import tiny
import torch
from tiny_erpd import assert_equal, parameters, right_or_wrong, settings
from tiny_erpd_runs import Recorder, make_run, with_key
from transformers import TrainerCallback
from trl import GRPOConfig, TrlParser

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.sampling import prompts_of_round
from trl_ext.erpd.schedule import teachers_of


@pytest.mark.parametrize("extraction_loss", ["sapo", "ce", "mse"])
def test_one_continuous_run(path, tmp_path, extraction_loss):
    trainer = make_run(
        path, tmp_path, extraction_loss=extraction_loss, extraction_learning_rate=1e-3, lr_scheduler_type="linear"
    )
    start = parameters(trainer)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 16
    assert trainer.state.epoch == 4  # one a pass
    logs = with_key(trainer, "loss")
    assert [log["step"] for log in logs] == list(range(1, 17))
    assert [log["stage"] for log in logs] == [1] * 8 + [2] * 8
    assert {log["round"] for log in logs} == {1}
    # constant in stage 1, then from 3e-3 linearly to 0 in 8 updates
    expected = [1e-3] * 8 + [3e-3 * (8 - i) / 8 for i in range(8)]
    assert [log["learning_rate"] for log in logs] == pytest.approx(expected)
    assert all(log["grad_norm"] > 0 for log in logs)
    assert all(not torch.equal(p, start[name]) for name, p in parameters(trainer).items())
    assert ("extraction/gate" if extraction_loss == "sapo" else "extraction/implicit_reward_correct") in logs[7]
    assert "clip_ratio/high_mean" in logs[8]
    drift = [log["kl_from_base"] for log in logs]
    assert abs(drift[0]) < 1e-6 < drift[7]  # it leaves the base policy in stage 1,
    assert abs(drift[8]) < 1e-6 < drift[15]  # and starts from it again in stage 2


def test_rounds_start_from_the_last_result_with_other_prompts(path, tmp_path):
    trainer = make_run(path, tmp_path, trainer_class=Recorder, rounds=3, extraction_passes=1)
    trainer.train()
    assert trainer.state.global_step == 3 * (1 + 2) * 4
    begins = [entry for entry in trainer.record if entry[0] == "begin" and entry[1].stage == 1]
    ends = [entry for entry in trainer.record if entry[0] == "end" and entry[1].stage == 2]
    assert_equal(begins[1][2], ends[0][2])
    assert_equal(begins[2][2], ends[1][2])
    assert_equal(parameters(trainer), ends[2][2])
    rows = [[row for batch in entry[4] for row in batch["prompt_ids"]] for entry in begins]
    prompts = [{tuple(row[row != 0].tolist()) for row in of_round} for of_round in rows]
    assert [len(of_round) for of_round in prompts] == [8, 8, 8]
    assert len(set.union(*prompts)) == 24
    assert [log["round"] for log in with_key(trainer, "fixed_set/prompts")] == [1, 2, 3]


def test_a_plain_grpo_config(path, tmp_path):
    args = GRPOConfig(**tiny.grpo_settings(tmp_path, num_iterations=1, max_steps=-1))
    trainer = ERPDTrainer(path, right_or_wrong, args, tiny.prompts(4))
    assert trainer._host.prompts_per_round == 4
    trainer.train()
    assert trainer.state.global_step == (6 + 6 + 8) * 2  # teacher, unlearned reference, distilled policy


def test_settings_on_the_command_line():
    parser = TrlParser((ERPDConfig,))
    flags = ["--output_dir", "out", "--bf16", "False"]
    (args,) = parser.parse_args_and_config(flags)
    assert (args.extraction_loss, args.signal, args.signal_weights) == (["mse"], ["unlearned_reference"], None)
    several = ["--extraction_loss", "ce", "mse", "--signal", "unlearned_reference", "--signal_weights", "0.5", "2"]
    (args,) = parser.parse_args_and_config(flags + several)
    assert [tuple(teacher) for teacher in teachers_of(args)] == [
        ("ce", "unlearned_reference", 0.5),
        ("mse", "unlearned_reference", 2.0),
    ]


def test_ones_own_config_is_left_as_it_was(path, tmp_path):
    args = ERPDConfig(**settings(tmp_path, beta=0.2))
    trainer = ERPDTrainer(path, right_or_wrong, args, tiny.prompts())
    assert (args.beta, trainer.beta, trainer.ref_model) == (0.2, 0.0, None)
    with pytest.raises(OSError, match="no such model"):
        ERPDTrainer("no such model", right_or_wrong, args, tiny.prompts())
    assert args.beta == 0.2


def test_an_early_end_is_announced(path, tmp_path, caplog):
    class Stop(ERPDTrainer):
        def training_step(self, *args):
            self.control.should_training_stop = self.state.global_step == 2
            return super().training_step(*args)

    trainer = make_run(path, tmp_path, trainer_class=Stop)
    trainer.train()
    assert "The run has ended in round 1, stage 1, after 3 of 16 updates, and the model is the teacher" in caplog.text


def test_a_pass_that_is_ended_early_is_an_error(path, tmp_path):
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2

    with pytest.raises(ValueError, match="should_training_stop"):
        make_run(path, tmp_path, callbacks=[Impatient()]).train()


def test_the_progress_bar_names_round_and_stage(path, tmp_path):
    seen = []

    trainer = make_run(path, tmp_path, disable_tqdm=False)
    describe = trainer._host.describe

    def watched(text):
        describe(text)
        bars = [c.training_bar for c in trainer.callback_handler.callbacks if hasattr(c, "training_bar")]
        seen.append(bars[0].desc)

    trainer._host.describe = watched
    trainer.train()
    assert "Round 1/1: sampling, prompt 6/8: " in seen
    assert "Round 1/1, stage 1: extraction, teacher (ce), pass 2/2: " in seen
    assert "Round 1/1, stage 2: distillation, pass 1/2: " in seen


def test_completions_are_logged_once(path, tmp_path, monkeypatch):
    """After they were sampled, and not with every log of the stages that follow."""
    printed = []

    def table(prompts, *args, **kwargs):
        printed.append(list(prompts))

    monkeypatch.setattr("trl.trainer.grpo_trainer.is_rich_available", lambda: True)
    monkeypatch.setattr("trl.trainer.grpo_trainer.print_prompt_completions_sample", table)
    trainer = make_run(path, tmp_path, rounds=2, extraction_passes=1, distillation_passes=1, log_completions=True)
    trainer.train()
    assert trainer.log_completions
    assert len(printed) == 2  # one per round, of some 20 logs
    assert printed[0] != printed[1]


def test_all_rollouts_of_the_set_are_in_the_file_of_completions(path, tmp_path):
    """Of all generations of a round, and not the completions of the held-out prompts that are sampled after them."""
    settings = {"prompts_per_round": 8, "log_completions": True, "num_completions_to_print": 1}
    trainer = make_run(path, tmp_path, eval_dataset=tiny.prompts(4), per_device_eval_batch_size=8, **settings)
    assert trainer.args.generation_batch_size < trainer._rollouts_per_round
    trainer.train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    rows = pandas.read_parquet(file)
    assert len(rows) == trainer._rollouts_per_round
    trained_on = {trainer.train_dataset[i]["prompt"] for i in prompts_of_round(trainer._host, 1)}
    assert set(rows["prompt"]) == trained_on
    assert set(rows["right_or_wrong"]) == {0.0, 1.0}


def test_evaluation_in_any_stage(path, tmp_path):
    trainer = make_run(
        path, tmp_path, eval_dataset=tiny.prompts(4), eval_strategy="steps", eval_steps=6, beta=0.1,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert [(log["step"], log["stage"]) for log in with_key(trainer, "eval_reward")] == [(6, 1), (12, 2), (16, 2)]
    assert "eval_kl" not in with_key(trainer, "eval_reward")[0]


def test_each_pass_has_an_order_of_its_own(path, tmp_path):
    orders = []

    class Watched(ERPDTrainer):
        def training_step(self, *args):
            loss = super().training_step(*args)
            orders.append(self._stages._pass)
            return loss

    for _ in range(2):
        make_run(path, tmp_path, trainer_class=Watched, prompts_per_round=16, extraction_passes=2).train()
    first, second = orders[:32], orders[32:]
    assert first == second
    of_pass = dict(first)
    assert list(of_pass) == [0, 1, 2, 3]
    assert len({tuple(order) for order in of_pass.values()}) == 4
    assert all(sorted(order) == list(range(8)) for order in of_pass.values())


def test_no_generation_and_no_needless_pass_within_a_stage(path, tmp_path):
    calls = []

    class Counting(ERPDTrainer):
        def _generate(self, prompts):
            calls.append((self.state.global_step, "generate"))
            return super()._generate(prompts)

        def score_micro_batch(self, batch):
            calls.append((self.state.global_step, "score"))
            return super().score_micro_batch(batch)

    # generations of 4 micro-batches, for which GRPO would make a pass for old log-probabilities
    trainer = make_run(
        path, tmp_path, trainer_class=Counting, beta=0.1, steps_per_generation=4, distillation_anchor="pass"
    )
    passes = []
    forward = trainer.model.forward

    def counted(*args, **kwargs):
        passes.append("fused_lm_head" in kwargs)
        return forward(*args, **kwargs)

    trainer.model.forward = counted
    trainer.train()
    # 4 micro-batches: scores of the base, of the teacher, of the second pass's anchor, and of the distilled policy
    expected = [(0, "generate")] + [(0, "score")] * 4 + [(8, "score")] * 4 + [(12, "score")] * 4 + [(16, "score")] * 4
    assert calls == expected
    assert sum(passes) == 16 + 16  # one a micro-batch, and the scores
    assert trainer.ref_model is None
    kl = [log["step"] for log in with_key(trainer, "kl")]
    assert kl == list(range(9, 17))


def test_updates_that_mixed_precision_has_skipped_do_not_shift_the_schedule(path, tmp_path, monkeypatch):
    trainer = make_run(path, tmp_path, extraction_learning_rate=1e-3, lr_scheduler_type="linear")
    skipped = property(lambda accelerator: trainer.state.global_step < 3)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    rates = [log["learning_rate"] for log in with_key(trainer, "loss")]
    assert rates == pytest.approx([1e-3] * 8 + [3e-3 * (8 - i) / 8 for i in range(8)])
