"""ERPDTrainer on tiny models: its stages, what is between them, what it measures and refuses."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_erpd import assert_equal, parameters, right_or_wrong, settings
from transformers import TrainerCallback
from trl import GRPOConfig, TrlParser

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.fixed_set import arrange, collate, rows_of, share_out
from trl_ext.erpd.measures import own_samples
from trl_ext.erpd.schedule import LearningRate, Phase, Schedule, teachers_of
from trl_ext.erpd.stages import Stages


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def make_trainer(path, tmp_path, reward=right_or_wrong, trainer_class=ERPDTrainer, eval_dataset=None, **overrides):
    names = ("peft_config", "rollout_func", "callbacks", "optimizers")
    arguments = {name: overrides.pop(name) for name in names if name in overrides}
    args = ERPDConfig(**settings(tmp_path, **overrides))
    torch.manual_seed(0)
    return trainer_class(path, reward, args, tiny.prompts(), eval_dataset, **arguments)


def with_key(trainer, key):
    return [log for log in trainer.state.log_history if key in log]


def naive_logps(model, batch, temperature=1.0):
    """Log-probabilities of the completions from full logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, batch["prompt_ids"].shape[1] - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(2, batch["completion_ids"][..., None]).squeeze(2)


class Recorder(ERPDTrainer):
    """Remembers the weights and the optimizer at both sides of each boundary."""

    def train(self, *args, **kwargs):
        self.record = []
        begin, end = Stages._begin_phase, Stages.end_phase

        def begin_phase(stages, phase, new_round):
            begin(stages, phase, new_round)
            state = dict(self.optimizer.state)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            batches = [dict(batch) for batch in stages.fixed_set.batches]
            self.record.append(("begin", phase, parameters(self), state, batches, rates))

        def end_phase(stages, phase):
            batches = [dict(batch) for batch in stages.fixed_set.batches]
            self.record.append(("end", phase, parameters(self), dict(self.optimizer.state), batches, None))
            end(stages, phase)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stages, "_begin_phase", begin_phase)
            patch.setattr(Stages, "end_phase", end_phase)
            return super().train(*args, **kwargs)


# ---- the run


@pytest.mark.parametrize("extraction_loss", ["sapo", "ce", "mse"])
def test_one_continuous_run(path, tmp_path, extraction_loss):
    trainer = make_trainer(
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
    assert ("extraction/gate" if extraction_loss == "sapo" else "extraction/implicit_reward_right") in logs[7]
    assert "clip_ratio/high_mean" in logs[8]
    drift = [log["kl_from_base"] for log in logs]
    assert abs(drift[0]) < 1e-6 < drift[7]  # it leaves the base policy in stage 1,
    assert abs(drift[8]) < 1e-6 < drift[15]  # and starts from it again in stage 2


def test_rounds_start_from_the_last_result_with_other_prompts(path, tmp_path):
    trainer = make_trainer(path, tmp_path, trainer_class=Recorder, rounds=3, extraction_passes=1)
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
    assert trainer.state.global_step == (16 + 4) * 2


def test_an_early_end_is_announced(path, tmp_path, caplog):
    class Stop(ERPDTrainer):
        def training_step(self, *args):
            self.control.should_training_stop = self.state.global_step == 2
            return super().training_step(*args)

    trainer = make_trainer(path, tmp_path, trainer_class=Stop)
    trainer.train()
    assert "The run has ended in round 1, stage 1, after 3 of 16 updates, and the model is the teacher" in caplog.text


def test_the_progress_bar_names_round_and_stage(path, tmp_path):
    seen = []

    trainer = make_trainer(path, tmp_path, disable_tqdm=False)
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


def test_evaluation_in_any_stage(path, tmp_path):
    trainer = make_trainer(
        path, tmp_path, eval_dataset=tiny.prompts(4), eval_strategy="steps", eval_steps=6, beta=0.1,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert [(log["step"], log["stage"]) for log in with_key(trainer, "eval_reward")] == [(6, 1), (12, 2), (16, 2)]
    assert "eval_kl" not in with_key(trainer, "eval_reward")[0]


def test_settings_on_the_command_line():
    parser = TrlParser((ERPDConfig,))
    flags = ["--output_dir", "out", "--bf16", "False"]
    (args,) = parser.parse_args_and_config(flags)
    assert (args.extraction_loss, args.signal, args.signal_weights) == (["ce"], ["teacher"], None)
    several = ["--extraction_loss", "ce", "mse", "--signal", "unlearned_reference", "--signal_weights", "0.5", "2"]
    (args,) = parser.parse_args_and_config(flags + several)
    assert [tuple(teacher) for teacher in teachers_of(args)] == [
        ("ce", "unlearned_reference", 0.5),
        ("mse", "unlearned_reference", 2.0),
    ]


# ---- the losses


def batch_of_phase(trainer, step):
    """Loss inputs at an optimizer step, of a run whose policy has moved on since the set was scored."""
    trainer.state.global_step = step
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer._stages._loss_inputs(dict(trainer._stages.fixed_set.batches[0]), trainer._phase)


@pytest.fixture
def halfway(path, tmp_path):
    """A trainer in stage 1 after some updates, whose set has all that a phase may ask for."""

    def make(**overrides):
        trainer = make_trainer(path, tmp_path, temperature=0.8, extraction_passes=1, **overrides)

        class Enough(Exception):
            pass

        class Stop(torch.utils.data.SequentialSampler):
            pass

        begin = trainer._stages._begin_phase

        def begin_phase(phase, new_round):
            begin(phase, new_round)
            if phase.stage == 2:
                raise Enough

        trainer._stages._begin_phase = begin_phase
        with pytest.raises(Enough):
            trainer.train()
        with torch.no_grad():  # some way off the base policy
            for p in trainer.model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        return trainer

    return make


def assert_loss_and_gradient(trainer, inputs, expected):
    ours = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(ours, list(trainer.model.parameters()))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(expected, list(trainer.model.parameters()))
    torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("extraction_loss", ["ce", "mse"])
@pytest.mark.parametrize("unlearned", [False, True])
def test_sequence_losses_are_the_mean_over_sequences(halfway, loss_type, extraction_loss, unlearned):
    signal = "unlearned_teacher" if unlearned else "teacher"
    trainer = halfway(extraction_loss=extraction_loss, loss_type=loss_type, signal=signal, extraction_beta=0.3)
    inputs = batch_of_phase(trainer, 0)
    logps = naive_logps(trainer.model, inputs, 0.8)
    log_ratio = ((logps - inputs["base_logps"]) * inputs["completion_mask"]).sum(1)
    if extraction_loss == "ce":
        targets = 1 - inputs["rewards"] if unlearned else inputs["rewards"]
        p = torch.sigmoid(0.3 * log_ratio)
        losses = -(targets * p.log() + (1 - targets) * (1 - p).log())
    else:
        losses = (0.3 * log_ratio - (-1 if unlearned else 1) * inputs["advantages"]) ** 2
    assert_loss_and_gradient(trainer, inputs, losses.mean())


def test_stage_1_ignores_what_is_stage_2s(halfway):
    trainer = halfway(beta=0.5, top_entropy_quantile=0.3, entropy_coef=0.7)
    inputs = batch_of_phase(trainer, 0)
    logps = naive_logps(trainer.model, inputs, 0.8)
    log_ratio = ((logps - inputs["base_logps"]) * inputs["completion_mask"]).sum(1)
    p = torch.sigmoid(0.5 * log_ratio)
    losses = -(inputs["rewards"] * p.log() + (1 - inputs["rewards"]) * (1 - p).log())
    assert_loss_and_gradient(trainer, inputs, losses.mean())
    assert (trainer.beta, trainer.top_entropy_quantile, trainer._entropy_bonus_enabled) == (0, 0.3, True)


def test_sapo_is_against_the_policy_that_sampled(halfway):
    trainer = halfway(
        extraction_loss="sapo", rollout_func=tiny.rollout, sapo_temperature_pos=1.5, loss_type="grpo"
    )  # fmt: skip
    inputs = batch_of_phase(trainer, 0)
    sampler_logps = trainer._stages.fixed_set.batches[0]["sampling_per_token_logps"]
    assert sampler_logps.isnan().any()
    reference = torch.where(sampler_logps.isnan(), inputs["base_logps"], sampler_logps)
    ratio = (naive_logps(trainer.model, inputs, 0.8) - reference).exp()
    advantages, mask = inputs["advantages"][:, None], inputs["completion_mask"]
    tau = torch.where(advantages > 0, 1.5, 1.05)
    losses = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    assert_loss_and_gradient(trainer, inputs, ((losses * mask).sum(1) / mask.sum(1)).mean())


@pytest.mark.parametrize("trust_region", ["ppo_clip", "drpo"])
def test_distillation_is_a_token_advantage_in_a_trust_region(halfway, trust_region):
    trainer = halfway(trust_region=trust_region, beta=0.3, outcome_advantage_weight=0.4, epsilon_high=0.3)
    inputs = batch_of_phase(trainer, 4)
    assert inputs["signal"].abs().sum() > 1
    logps, mask = naive_logps(trainer.model, inputs, 0.8), inputs["completion_mask"]
    base, anchor = inputs["base_logps"], inputs["old_per_token_logps"]
    assert torch.equal(base, anchor)  # in the first pass
    advantages = inputs["signal"] + 0.4 * inputs["advantages"][:, None]
    ratio = (logps - anchor).exp()
    if trust_region == "ppo_clip":
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    else:
        losses = -(ratio * advantages - advantages.abs() / 0.3 * anchor.exp() * (ratio - 1) ** 2)
    kl = (base - logps).exp() - (base - logps) - 1
    # dapo: every token of the set weighs alike, 4 updates a pass
    kl = kl * ratio  # `use_bias_correction_kl`, TRL's default
    expected = ((losses + 0.3 * kl) * mask).sum() / (trainer._stages.fixed_set.num_tokens / 4)
    assert_loss_and_gradient(trainer, inputs, expected)


def test_tokens_weigh_alike_whatever_the_batches(path, tmp_path):
    """Under dapo, the sum of a pass's losses is the set's mean, with accumulation and longer generations too."""
    for shape in ({}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}):
        trainer = make_trainer(path, tmp_path, prompts_per_round=8, **shape)
        fixed_set = SimpleNamespace(num_tokens=120)
        trainer._stages.fixed_set = fixed_set
        batch = {"rewards": torch.zeros(1), "base_logps": torch.zeros(1, 1), "anchor_logps": torch.zeros(1, 1)}
        inputs = trainer._stages._loss_inputs(batch, trainer._schedule.phases[-1])
        accumulation, generation = trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation
        # TRL divides the sum of an update's micro-batches by this; 32 rollouts, 8 an update
        assert inputs["num_items_in_batch"].item() * accumulation / generation == 120 / 4


# ---- the boundary


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_boundary(path, tmp_path, lora):
    """The base is restored bit for bit, the optimizer is empty, the signal is what the teacher says, and fixed."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = make_trainer(
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
        assert not [name for name in before if name.startswith(("teacher", "unlearned"))]  # one float a token

    def score(weights):
        trainer.model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return [naive_logps(trainer.model.eval(), batch, 0.8) for batch in begin[4]]

    raw = [a - b for a, b in zip(score(trainer.record[1][2]), score(trainer.record[3][2]), strict=True)]
    tokens = torch.cat([r[b["completion_mask"].bool()] for r, b in zip(raw, begin[4], strict=True)])
    for r, batch in zip(raw, begin[4], strict=True):
        normalized = ((r - tokens.mean()) / tokens.std(correction=0)).clamp(-2, 2) * batch["completion_mask"]
        torch.testing.assert_close(batch["signal"], normalized, rtol=1e-3, atol=1e-3)
    log = with_key(trainer, "signal_ce/mean")[0]
    assert log["signal_ce/mean"] == pytest.approx(tokens.mean().item(), abs=1e-4)
    assert log["signal_ce/std"] == pytest.approx(tokens.std(correction=0).item(), rel=1e-3)


def test_signals_of_two_teachers(path, tmp_path):
    trainer = make_trainer(
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
            return [naive_logps(trainer.model.eval(), batch) for batch in batches]

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
        trainer = make_trainer(path, tmp_path, distillation_anchor=anchor)
        seen, original = [], Stages._loss_inputs

        def loss_inputs(stages, batch, phase, seen=seen, original=original):
            inputs = original(stages, batch, phase)
            seen.append(torch.equal(inputs["old_per_token_logps"], inputs["base_logps"]))
            return inputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stages, "_loss_inputs", loss_inputs)
            trainer.train()
        assert seen == [True] * 12 + [anchor == "base"] * 4


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
    trainer = make_trainer(
        path, tmp_path, trainer_class=Counting, beta=0.1, steps_per_generation=4, distillation_anchor="pass"
    )
    passes = []
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: (
        passes.append("fused_lm_head" in kwargs),
        forward(*args, **kwargs),
    )[1]
    trainer.train()
    # 4 micro-batches: scores of the base, of the teacher, of the second pass's anchor, and of the distilled policy
    expected = [(0, "generate")] + [(0, "score")] * 4 + [(8, "score")] * 4 + [(12, "score")] * 4 + [(16, "score")] * 4
    assert calls == expected
    assert sum(passes) == 16 + 16  # one a micro-batch, and the scores
    assert trainer.ref_model is None
    kl = [log["step"] for log in with_key(trainer, "kl")]
    assert kl == list(range(9, 17))


def test_teachers_are_kept_where_asked_for(path, tmp_path):
    trainer = make_trainer(path, tmp_path, keep_teachers=True, signal="unlearned_reference")
    trainer.train()
    folder = tmp_path / "round-1"
    assert sorted(p.name for p in folder.iterdir()) == ["teacher_ce", "unlearned_ce"]
    kept = tiny.policy().from_pretrained(folder / "teacher_ce")
    assert any(not torch.equal(a, b) for a, b in zip(kept.parameters(), trainer.model.parameters(), strict=True))


# ---- measures


def test_measures_on_held_out_prompts(path, tmp_path):
    eval_dataset = tiny.prompts(8)
    trainer = make_trainer(
        path,
        tmp_path,
        eval_dataset=eval_dataset,
        per_device_eval_batch_size=8,
        temperature=0.8,
        num_generations_eval=2,
    )
    trainer.train()
    base, teacher, distilled = (with_key(trainer, f"{n}/reward")[0] for n in ("base", "teacher_ce", "distilled"))
    assert "base/kl_per_sequence" not in base  # which could only be 0
    assert [log["step"] for log in (base, teacher, distilled)] == [0, 8, 16]
    for name, log in (("teacher_ce", teacher), ("distilled", distilled)):
        assert 0 <= log[f"{name}/reward"] <= 1
        assert log[f"{name}/kl_per_sequence"] > log[f"{name}/kl_per_token"] > 0
    assert not any(name.startswith("eval_") for log in trainer.state.log_history for name in log)


def test_divergence_and_entropy_are_those_of_full_distributions(path, tmp_path, monkeypatch):
    """On own samples of the policy, the base's log-probabilities with the base's weights, and back again."""
    from trl_ext.erpd import stages

    seen, original = [], stages.own_samples
    monkeypatch.setattr(stages, "own_samples", lambda host: seen.append(original(host)) or seen[-1])
    trainer = make_trainer(path, tmp_path, eval_dataset=tiny.prompts(8), per_device_eval_batch_size=8)
    start = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.train()
    final = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    sums = {"kl": 0.0, "entropy": 0.0, "tokens": 0, "sequences": 0, "reward": 0.0}
    for sample in seen[-1]:
        mask, results = sample["completion_mask"].bool(), []
        for weights in (final, start):
            trainer.model.load_state_dict(weights)
            with torch.no_grad():
                results.append(naive_logps(trainer.model.eval(), sample))
        assert torch.allclose(results[0][mask], sample["logps"][mask], atol=1e-4)  # the distilled policy's samples
        sums["kl"] += (results[0] - results[1])[mask].sum().item()
        sums["entropy"] += sample["entropies"][mask].sum().item()
        sums["tokens"] += mask.sum().item()
        sums["sequences"] += len(mask)
        sums["reward"] += sample["rewards"].sum().item()
    log = with_key(trainer, "distilled/reward")[0]
    assert log["distilled/kl_per_sequence"] == pytest.approx(sums["kl"] / sums["sequences"], rel=1e-3)
    assert log["distilled/kl_per_token"] == pytest.approx(sums["kl"] / sums["tokens"], rel=1e-3)
    assert log["distilled/entropy"] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-5)
    assert log["distilled/reward"] == pytest.approx(sums["reward"] / sums["sequences"])


def test_measuring_does_not_change_the_training(path, tmp_path):
    plain = make_trainer(path, tmp_path, rounds=2, extraction_passes=1, distillation_passes=1)
    plain.train()
    measured = make_trainer(
        path, tmp_path, rounds=2, extraction_passes=1, distillation_passes=1, eval_dataset=tiny.prompts(8),
        per_device_eval_batch_size=8,
    )  # fmt: skip
    measured.train()
    assert_equal(parameters(measured), parameters(plain))


def test_measures_on_the_set_without_held_out_prompts(path, tmp_path):
    trainer = make_trainer(path, tmp_path, trainer_class=Recorder)
    trainer.train()
    log = with_key(trainer, "teacher_ce/set_kl_per_sequence")[0]
    batches = trainer.record[2][4]  # at the start of stage 2: the base's scores
    trainer.model.load_state_dict(trainer.record[1][2])
    kl = tokens = good = count = 0.0
    for batch in batches:
        with torch.no_grad():
            difference = (batch["base_logps"] - naive_logps(trainer.model.eval(), batch)) * batch["completion_mask"]
        kl += difference.sum().item()
        tokens += batch["completion_mask"].sum().item()
        good -= difference.sum(1)[batch["advantages"] > 0].sum().item()
        count += (batch["advantages"] > 0).sum().item()
    assert log["teacher_ce/set_kl_per_sequence"] == pytest.approx(kl / 32, rel=1e-3)
    assert log["teacher_ce/set_kl_per_token"] == pytest.approx(kl / tokens, rel=1e-3)
    assert log["teacher_ce/set_log_ratio_of_right"] == pytest.approx(good / count, rel=1e-3)
    assert with_key(trainer, "distilled/set_kl_per_sequence")[0]["step"] == 16


def test_prompts_without_signal_are_counted(path, tmp_path):
    def reward(prompts, completions, **kwargs):
        """Alike for the prompts that end in an even number, of which the set below has 5."""
        odd = [int(prompt.rstrip("=").split("+")[1]) % 2 for prompt in prompts]
        return [is_odd * r for is_odd, r in zip(odd, right_or_wrong(completions), strict=True)]

    args = ERPDConfig(**settings(tmp_path, shuffle_dataset=False, num_generations=8, extraction_loss="sapo"))
    rows = [{"prompt": f"1+{i}="} for i in (0, 1, 2, 4, 6, 8, 3, 5)]
    trainer = ERPDTrainer(path, reward, args, Dataset.from_list(rows))
    trainer.train()
    log = with_key(trainer, "fixed_set/prompts")[0]
    assert (log["fixed_set/prompts"], log["fixed_set/rollouts"]) == (8, 64)
    assert log["fixed_set/prompts_without_signal"] == 5


def test_nothing_to_learn_leaves_the_policy_alone(path, tmp_path, caplog):
    """Where all rollouts agree, neither stage moves anything, and rounding is not distilled."""
    trainer = make_trainer(path, tmp_path, reward=lambda completions, **_: [1.0] * len(completions),
                           extraction_loss="sapo")  # fmt: skip
    start = parameters(trainer)
    trainer.train()
    assert_equal(parameters(trainer), start)
    assert "all of its 32 rollouts have the same reward (1): check the reward function" in caplog.text


@pytest.mark.parametrize("held_out", [True, False])
def test_a_collapsed_teacher_is_announced(path, tmp_path, caplog, held_out):
    # reward for the variety that a random policy has, and steps so large that it falls apart
    trainer = make_trainer(
        path, tmp_path, reward=lambda completions, **_: [float(len(set(text)) > 4) for text in completions],
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
    trainer = make_trainer(path, tmp_path)
    trainer.train()
    assert "may be noise" not in caplog.text


def test_a_teacher_of_nan_stops_the_run(path, tmp_path):
    class Broken(ERPDTrainer):
        def training_step(self, *args):
            if self.state.global_step == 7:
                next(self.model.parameters()).data.fill_(math.nan)
            return super().training_step(*args)

    with pytest.raises(ValueError, match=r"log-probabilities of teacher_ce are NaN .* lower the learning rate"):
        make_trainer(path, tmp_path, trainer_class=Broken).train()


# ---- the fixed set


def test_batches_are_of_similar_length_and_each_rollout_is_in_one():
    lengths = torch.randint(1, 100, (512,), generator=torch.Generator().manual_seed(0))
    batches = arrange(lengths, 8, seed=3)
    assert sorted(batches.flatten().tolist()) == list(range(512))
    spread = (lengths[batches].amax(1) - lengths[batches].amin(1)).float().mean()
    assert spread < 10  # of about 80, if they were shuffled
    assert torch.equal(batches, arrange(lengths, 8, seed=3))
    assert not torch.equal(batches, arrange(lengths, 8, seed=4))


class Processes:
    """Several processes of an accelerator in one: what they would gather is known beforehand."""

    def __init__(self, number, chunks):
        self.num_processes, self.chunks, self.device = number, chunks, torch.device("cpu")
        self.process_index = 0

    def gather(self, _):
        return torch.stack(
            [
                torch.tensor([[len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows] for rows in chunks])
                for chunks in self.chunks
            ]
        )

    def reduce(self, tensor, reduction):
        return tensor


def test_two_processes_share_what_one_would_have(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(24):
        n = int(torch.randint(1, 9, (1,), generator=generator))
        row = {"prompt_ids": torch.full((1 + i % 3,), i), "completion_ids": torch.full((n,), i)}
        rows.append(
            row | {"completion_mask": torch.ones(n), "advantages": torch.tensor(i), "rewards": torch.tensor(0)}
        )

    def shared(number):
        local = 8 // number  # three generations of 8 rollouts
        by_process = [[rows[c * 8 + p * local : c * 8 + (p + 1) * local] for c in range(3)] for p in range(number)]
        processes, sets = Processes(number, by_process), []
        for p in range(number):
            processes.process_index, chunk = p, iter(range(3))
            monkeypatch.setattr(
                "trl_ext.erpd.fixed_set.gather_object",
                lambda _, chunk=chunk: rows[(c := next(chunk)) * 8 : (c + 1) * 8],
            )
            sets.append(share_out(by_process[p], processes, 4 // number, 7, lambda r: collate(r, 0, None)))
        return sets

    one, two = shared(1)[0], shared(2)
    assert len(one.batches) == len(two[0].batches) == len(two[1].batches) == 6
    for whole, first, second in zip(one.batches, two[0].batches, two[1].batches, strict=True):
        assert whole["advantages"].tolist() == first["advantages"].tolist() + second["advantages"].tolist()
    assert one.order(5) == two[0].order(5) == two[1].order(5) != one.order(6)
    assert sorted(one.order(5)) == list(range(6))


def test_rows_are_what_the_batch_held():
    nan = math.nan
    rollouts = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9], [0, 0, 4]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 7, 8]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]),  # the last is truncated and masked
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, nan, 0.0], [-2.0, -3.0, -4.0], [-5.0, -6.0, -7.0]]),
        "advantages": torch.tensor([1.0, -1.0, 0.0]),
        "num_items_in_batch": torch.tensor(5),
    }
    rows = rows_of(rollouts, torch.tensor([1.0, 0.0, nan]))
    batch = collate([rows[2], rows[0], rows[1]], pad_token_id=0, pad_to_multiple_of=None)
    assert batch["prompt_ids"].tolist() == [[0, 0, 4], [0, 5, 6], [7, 8, 9]]
    assert batch["prompt_mask"].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[6, 0, 0], [1, 2, 0], [3, 4, 5]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["tool_mask"].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert batch["sampling_per_token_logps"][1:].nan_to_num(9).tolist() == [[-1, 9, 0], [-2, -3, -4]]
    assert batch["advantages"].tolist() == [0, 1, -1]
    assert batch["rewards"].nan_to_num(9).tolist() == [9, 1, 0]
    assert collate(rows, 0, 4)["completion_ids"].shape == (3, 4)


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


def test_updates_that_mixed_precision_has_skipped_do_not_shift_the_schedule(path, tmp_path, monkeypatch):
    trainer = make_trainer(path, tmp_path, extraction_learning_rate=1e-3, lr_scheduler_type="linear")
    skipped = property(lambda accelerator: trainer.state.global_step < 3)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    rates = [log["learning_rate"] for log in with_key(trainer, "loss")]
    assert rates == pytest.approx([1e-3] * 8 + [3e-3 * (8 - i) / 8 for i in range(8)])


def test_each_pass_has_an_order_of_its_own(path, tmp_path):
    orders = []

    class Watched(ERPDTrainer):
        def training_step(self, *args):
            loss = super().training_step(*args)
            orders.append(self._stages._pass)
            return loss

    for _ in range(2):
        make_trainer(path, tmp_path, trainer_class=Watched, prompts_per_round=16, extraction_passes=2).train()
    first, second = orders[:32], orders[32:]
    assert first == second
    of_pass = dict(first)
    assert list(of_pass) == [0, 1, 2, 3]
    assert len({tuple(order) for order in of_pass.values()}) == 4
    assert all(sorted(order) == list(range(8)) for order in of_pass.values())


# ---- masks and samplers


def test_masks_of_environments_and_of_truncated_completions(path, tmp_path):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        output["env_mask"] = [[1, 0] * (len(ids) // 2) + [1] * (len(ids) % 2) for ids in output["completion_ids"]]
        return output

    trainer = make_trainer(
        path, tmp_path, trainer_class=Recorder, rollout_func=rollout, mask_truncated_completions=True
    )
    trainer.train()
    batches = trainer.record[2][4]
    truncated = [b["completion_mask"].sum(1) == 0 for b in batches]
    assert 0 < sum(int(t.sum()) for t in truncated) < 32
    for batch in batches:
        mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
        assert batch["signal"][~mask].eq(0).all()
        assert batch["signal"][mask].ne(0).any() or not mask.any()
    tokens = sum(int((b["completion_mask"] * b["tool_mask"]).sum()) for b in batches)
    assert with_key(trainer, "fixed_set/tokens")[0]["fixed_set/tokens"] == tokens


# ---- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rounds": 0}, "rounds=0 leaves nothing to train: set it to 1 or more"),
        ({"extraction_passes": 0}, "extraction_passes=0 leaves nothing"),
        ({"distillation_passes": -1}, "distillation_passes=-1 leaves nothing"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"extraction_loss": "dpo"}, "extraction_loss='dpo' is unknown: set it to one of 'sapo', 'ce', 'mse'"),
        ({"extraction_loss": []}, "extraction_loss is empty"),
        ({"extraction_loss": ["ce", "ce"]}, "names a loss twice"),
        ({"signal": "student"}, "signal='student' is unknown"),
        ({"signal": ["teacher", "teacher"]}, "1 teachers and 2 signals"),
        ({"signal_weights": [1.0, 1.0]}, "1 teachers and 2 signal_weights"),
        ({"signal_weights": [0.0]}, "leave nothing to distil"),
        ({"signal_weights": [math.nan]}, "leave nothing to distil"),
        ({"signal_normalization": "batch"}, "signal_normalization='batch' is unknown"),
        ({"signal_clip": 0.0}, "signal_clip=0.0 must be a positive number"),
        ({"extraction_beta": -1.0}, "extraction_beta=-1.0 must be a positive number"),
        ({"distillation_epsilon": 0.0}, "distillation_epsilon=0.0 must be a positive number"),
        ({"extraction_learning_rate": math.inf}, "extraction_learning_rate=inf must be a positive number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"extraction_warmup_steps": -1}, "extraction_warmup_steps=-1 must be at least 0"),
        ({"outcome_advantage_weight": math.nan}, "outcome_advantage_weight=nan must be a finite number"),
        ({"distillation_anchor": "step"}, "distillation_anchor='step' is unknown"),
        ({"trust_region": "kl"}, "trust_region='kl' is unknown"),
        ({"trust_region_radius": 0.1}, "has no meaning for trust_region='ppo_clip'"),
        ({"trust_region": "drpo", "trust_region_radius": -0.1}, "trust_region_radius=-0.1 must be"),
        ({"max_steps": 4}, "max_steps=4 would end ERPDConfig's run within a stage"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 would end"),
        ({"num_iterations": 2}, "num_iterations=2 has no meaning where a fixed set is passed over: set it to 1"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "lr_scheduler_type='reduce_lr_on_plateau' depends on evaluations",
        ),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1 judges a sequence by its one advantage"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model=True moves the reference"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True would make a resumed run"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' keeps averages"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence': set it to 'token'"),
        ({"loss_type": "sapo"}, "cannot use loss_type='sapo'"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ERPDConfig(**settings(tmp_path, **overrides))


@pytest.mark.parametrize(
    ("overrides", "dataset", "message"),
    [
        ({}, tiny.prompts(1), "The data set's 1 prompts with 4 rollouts each are less than one batch, which takes 2"),
        ({"prompts_per_round": 1}, tiny.prompts(), "prompts_per_round=1 with 4 rollouts each is less than one batch"),
        ({"prompts_per_round": 34}, tiny.prompts(), "more than the data set has: set it to 32 or less"),
        ({"prompts_per_round": 7}, tiny.prompts(), "does not make whole batches of 2 prompts .* set it to 6"),
        (
            {},
            tiny.prompts().to_iterable_dataset(),
            "cannot use train_dataset=IterableDataset: pass a datasets.Dataset",
        ),
        ({}, None, "cannot use train_dataset=NoneType"),
        ({}, tiny.prompts().add_column("image", [None] * 32), "keeps the tokens of its rollouts but no images"),
    ],
)
def test_data_that_cannot_be_honoured_is_refused_before_anything_is_loaded(tmp_path, overrides, dataset, message):
    args = ERPDConfig(**settings(tmp_path, **overrides))
    with pytest.raises(ValueError, match=message):
        ERPDTrainer("no such model", right_or_wrong, args, dataset, tiny.prompts(4))


def test_a_scheduler_of_ones_own_is_refused(path, tmp_path):
    model = tiny.policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match=r"pass optimizers=\(optimizer, None\)"):
        make_trainer(path, tmp_path, optimizers=(optimizer, schedule))


def test_the_set_is_as_large_as_the_data_allow(path, tmp_path):
    args = settings(tmp_path, prompts_per_round=None)
    assert ERPDTrainer(path, right_or_wrong, ERPDConfig(**args), tiny.prompts(31))._host.prompts_per_round == 30
    assert ERPDTrainer(path, right_or_wrong, ERPDConfig(**args), tiny.prompts(1999))._host.prompts_per_round == 1000


def test_ones_own_config_is_left_as_it_was(path, tmp_path):
    args = ERPDConfig(**settings(tmp_path, beta=0.2))
    trainer = ERPDTrainer(path, right_or_wrong, args, tiny.prompts())
    assert (args.beta, trainer.beta, trainer.ref_model) == (0.2, 0.0, None)
    with pytest.raises(OSError, match="no such model"):
        ERPDTrainer("no such model", right_or_wrong, args, tiny.prompts())
    assert args.beta == 0.2


@pytest.mark.parametrize("extraction_loss", ["sapo", "ce", "mse"])
def test_any_rewards_will_do(path, tmp_path, extraction_loss):
    """Negative ones, several functions with weights, a term of length, and none for some rollouts."""

    def length(completions, **kwargs):
        return [None if text.startswith("a") else -0.3 * len(text) for text in completions]

    trainer = make_trainer(
        path, tmp_path, trainer_class=Recorder, reward=[right_or_wrong, length, tiny.digits_reward],
        reward_weights=[1.0, 0.5, 2.0], extraction_loss=extraction_loss,
    )  # fmt: skip
    trainer.train()
    batches = trainer.record[0][4]
    rewards = torch.cat([batch["rewards"] for batch in batches]).double()
    outcomes = torch.cat([batch["outcomes"] for batch in batches]).double()
    expected = (rewards - rewards.min()) / (rewards.max() - rewards.min())
    torch.testing.assert_close(outcomes, expected, rtol=0, atol=1e-6)
    assert len(set(rewards.tolist())) > 4
    assert all(log["grad_norm"] > 0 for log in with_key(trainer, "grad_norm"))


@pytest.mark.parametrize("skips", [False, True])
def test_prompts_whose_rollouts_agree_may_be_left_out(path, tmp_path, skips):
    """Each prompt's rollouts are alike: `ce` still learns which prompts are right, unless it is told not to."""
    trainer = make_trainer(
        path, tmp_path, reward=lambda prompts, **_: [float("1" in prompt) for prompt in prompts],
        extraction_skips_agreeing_prompts=skips, extraction_passes=1,
    )  # fmt: skip
    trainer.train()
    gradients = [log["grad_norm"] for log in with_key(trainer, "grad_norm") if log["stage"] == 1]
    assert all((norm == 0) == skips for norm in gradients)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.5, 2.0)])
def test_any_two_rewards_are_right_and_wrong(path, tmp_path, low, high):
    """And None is neither."""

    def reward(completions, **kwargs):
        rewards = [high if r else low for r in right_or_wrong(completions)]
        return [None if text.startswith("a") else r for r, text in zip(rewards, completions, strict=True)]

    trainer = make_trainer(path, tmp_path, trainer_class=Recorder, reward=reward)
    trainer.train()
    for batch in trainer.record[0][4]:
        for reward_, outcome in zip(batch["rewards"].tolist(), batch["outcomes"].tolist(), strict=True):
            assert outcome == {low: 0.0, high: 1.0}.get(reward_) or (math.isnan(reward_) and math.isnan(outcome))


def test_warnings_of_settings_without_effect(path, tmp_path, caplog):
    make_trainer(path, tmp_path, trust_region="drpo", epsilon=0.3)
    assert "epsilon=0.3 has no effect with trust_region='drpo'" in caplog.text
    make_trainer(path, tmp_path, epsilon=0.3, distillation_epsilon=0.5)
    assert "epsilon=0.3 has no effect, because the clip range of stage 2 is distillation_epsilon=0.5" in caplog.text
    make_trainer(path, tmp_path, trust_region="drpo", distillation_epsilon=0.5)
    assert "distillation_epsilon=0.5 has no effect with trust_region='drpo'" in caplog.text
    make_trainer(path, tmp_path, prompts_per_round=2, distillation_anchor="pass")
    assert "stage 2 never leaves its anchor" in caplog.text


# ---- at the edges


def test_a_floor_of_the_learning_rate_is_in_its_own_units():
    # transformers gives such a floor as a share of the optimizer's rate: 5e-7 / 1e-6
    factors = LearningRate(1e-6, "cosine_with_min_lr", 0).factors(10, {"min_lr": 5e-7})
    assert [factors(0), factors(10)] == pytest.approx([1.0, 0.5])
    assert LearningRate(1e-6, "linear", 0.3).factors(8, None)(2) == pytest.approx(2 / 3)  # ceil(0.3 * 8) = 3 updates


def test_prompts_that_only_fill_up_the_last_batch_do_not_count(path, tmp_path, monkeypatch):
    """As on several processes, where the last batches begin again with the first prompts."""
    held_out = tiny.prompts(3)
    trainer = make_trainer(path, tmp_path, eval_dataset=held_out, per_device_eval_batch_size=8, num_generations_eval=4)
    trainer._stages.base.take()
    rows = [held_out[i] for i in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0)]
    monkeypatch.setattr(trainer, "get_eval_dataloader", lambda dataset: [rows[:8], rows[8:]])
    samples = own_samples(trainer._host)
    assert [sample["rewards"].isnan().tolist() for sample in samples] == [[False] * 8, [False] * 4 + [True] * 4]
    assert samples[1]["completion_mask"][4:].sum() == 0
    assert samples[1]["completion_mask"][:4].sum() > 0


def test_a_teacher_of_nan_is_named_as_such_with_held_out_prompts_too(path, tmp_path, monkeypatch):
    trainer = make_trainer(path, tmp_path, eval_dataset=tiny.prompts(4), per_device_eval_batch_size=8)
    end = Stages.end_phase

    def broken(stages, phase):
        if phase.stage == 1:
            trainer.model.lm_head.weight.data.fill_(math.nan)
        end(stages, phase)

    monkeypatch.setattr(Stages, "end_phase", broken)
    with pytest.raises(ValueError, match="its training has failed"):
        trainer.train()


def test_what_only_some_generations_have():
    def row(length, **more):
        ones = torch.ones(length, dtype=torch.long)
        base = {"prompt_ids": ones, "completion_ids": ones, "completion_mask": ones}
        return {**base, "advantages": torch.tensor(0.0), "rewards": torch.tensor(0.0), **more}

    masked_row = row(3, tool_mask=torch.tensor([1, 0, 1]), sampling_per_token_logps=torch.tensor([-1.0, -2.0, -3.0]))
    for rows in ([row(2), masked_row], [masked_row, row(2)]):
        batch = collate(rows, 0, None)
        by_length = {int(mask.sum()): i for i, mask in enumerate(batch["completion_mask"])}
        assert batch["tool_mask"][by_length[3]].tolist() == [1, 0, 1]
        assert batch["tool_mask"][by_length[2]].tolist()[:2] == [1, 1]
        assert batch["sampling_per_token_logps"][by_length[3]].tolist() == [-1.0, -2.0, -3.0]
        assert batch["sampling_per_token_logps"][by_length[2]][:2].isnan().all()


def test_a_pass_that_is_ended_early_is_an_error(path, tmp_path):
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2

    with pytest.raises(ValueError, match="should_training_stop"):
        make_trainer(path, tmp_path, callbacks=[Impatient()]).train()


def test_the_kl_is_corrected_by_the_ratio_to_the_base(path, tmp_path):
    """The tokens are the base policy's, whatever the trust region is around."""
    seen = []

    class Watched(ERPDTrainer):
        def _insert_policy_loss(self, inputs, logps):
            super()._insert_policy_loss(inputs, logps)
            if self.state.global_step >= 9:  # beyond the first pass of stage 2
                seen.append([inputs[f"{name}_logps"].clone() for name in ("old_per_token", "base", "anchor")])

    make_trainer(
        path, tmp_path, trainer_class=Watched, distillation_anchor="pass", beta=0.1, extraction_passes=1
    ).train()
    old, base, anchor = seen[-1]
    assert torch.equal(old, base)
    assert not torch.equal(base, anchor)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"extraction_lr_scheduler_type": "foo"}, "extraction_lr_scheduler_type='foo' cannot be made"),
        ({"rounds": 1.5}, "rounds=1.5 has the wrong type"),
    ],
)
def test_more_settings_that_cannot_be_honoured(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        ERPDConfig(**settings(tmp_path, **overrides))


def test_a_list_is_no_data_set(path, tmp_path):
    with pytest.raises(ValueError, match=r"Dataset\.from_list"):
        ERPDTrainer("no/model", right_or_wrong, ERPDConfig(**settings(tmp_path)), [{"prompt": "1"}])


def test_without_held_out_prompts_they_are_asked_for(path, tmp_path, caplog):
    make_trainer(path, tmp_path)
    assert caplog.text.count("pass held-out prompts as eval_dataset") == 1
    caplog.clear()
    make_trainer(path, tmp_path, eval_dataset=tiny.prompts(4), per_device_eval_batch_size=8)
    assert "held-out" not in caplog.text
