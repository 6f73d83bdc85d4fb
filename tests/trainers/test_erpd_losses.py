"""The losses of ERPD's stages in the trainer: value and gradient against full logits."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_erpd_runs import make_run

from trl_ext import ERPDTrainer


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
        trainer = make_run(path, tmp_path, temperature=0.8, extraction_passes=1, **overrides)

        class Enough(Exception):
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
    theirs = torch.autograd.grad(expected, list(trainer.model.parameters()), retain_graph=True)
    torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-6)
    return ours.item()


@pytest.mark.parametrize("extraction_loss", ["ce", "mse"])
@pytest.mark.parametrize("unlearned", [False, True])
def test_sequence_losses_are_the_mean_over_sequences(halfway, extraction_loss, unlearned):
    """Whatever `loss_type` says."""
    signal = "unlearned_teacher" if unlearned else "teacher"
    trainer = halfway(extraction_loss=extraction_loss, signal=signal, extraction_beta=0.3)
    inputs = batch_of_phase(trainer, 0)
    logps = tiny.naive_logps(trainer.model, inputs, 0.8)
    log_ratio = ((logps - inputs["base_logps"]) * inputs["completion_mask"]).sum(1)
    if extraction_loss == "ce":
        targets = 1 - inputs["rewards"] if unlearned else inputs["rewards"]
        p = torch.sigmoid(0.3 * log_ratio)
        losses = -(targets * p.log() + (1 - targets) * (1 - p).log())
    else:
        losses = (0.3 * log_ratio - (-1 if unlearned else 1) * inputs["advantages"]) ** 2
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        trainer.loss_type = loss_type
        ours = assert_loss_and_gradient(trainer, inputs, losses.mean())
        assert ours == pytest.approx(losses.mean().item(), rel=1e-5), loss_type
    # Which are correct is a matter of the rewards, not of what the policy is trained on
    logged, correct = trainer._token_metrics["train"].pop(), inputs["rewards"] > 0.5
    if extraction_loss == "mse":
        correct = inputs["advantages"] > 0
    expected = 0.3 * log_ratio[correct].mean().item()
    assert logged["extraction/implicit_reward_correct"] == pytest.approx(expected, rel=1e-3)


def test_stage_1_ignores_what_is_stage_2s(halfway):
    trainer = halfway(beta=0.5, top_entropy_quantile=0.3, entropy_coef=0.7)
    inputs = batch_of_phase(trainer, 0)
    logps = tiny.naive_logps(trainer.model, inputs, 0.8)
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
    ratio = (tiny.naive_logps(trainer.model, inputs, 0.8) - reference).exp()
    advantages, mask = inputs["advantages"][:, None], inputs["completion_mask"]
    tau = torch.where(advantages > 0, 1.5, 1.05)
    losses = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    assert_loss_and_gradient(trainer, inputs, ((losses * mask).sum(1) / mask.sum(1)).mean())


@pytest.mark.parametrize("trust_region", ["ppo_clip", "drpo"])
def test_distillation_is_a_token_advantage_in_a_trust_region(halfway, trust_region):
    trainer = halfway(trust_region=trust_region, beta=0.3, outcome_advantage_weight=0.4, epsilon_high=0.3)
    inputs = batch_of_phase(trainer, 4)
    assert inputs["signal"].abs().sum() > 1
    logps, mask = tiny.naive_logps(trainer.model, inputs, 0.8), inputs["completion_mask"]
    base, anchor = inputs["base_logps"], inputs["old_per_token_logps"]
    assert torch.equal(base, anchor)  # in the first pass
    advantages = inputs["signal"] + 0.4 * inputs["advantages"][:, None]
    ratio = (logps - anchor).exp()
    if trust_region == "ppo_clip":
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    else:
        losses = -(ratio * advantages - advantages.abs() / (2 * 0.5) * anchor.exp() * (ratio - 1) ** 2)
    kl = (base - logps).exp() - (base - logps) - 1
    # dapo: every token of the set has the same weight, 4 updates per pass
    kl = kl * ratio  # `use_bias_correction_kl`, TRL's default
    expected = ((losses + 0.3 * kl) * mask).sum() / (trainer._stages.fixed_set.num_tokens / 4)
    assert_loss_and_gradient(trainer, inputs, expected)


def test_tokens_have_the_same_weight_in_every_batch(path, tmp_path):
    """Under dapo, the sum of a pass's losses is the set's mean, with accumulation and longer generations too."""
    for shape in ({}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}):
        trainer = make_run(path, tmp_path, prompts_per_round=8, **shape)
        fixed_set = SimpleNamespace(num_tokens=120)
        trainer._stages.fixed_set = fixed_set
        batch = {"rewards": torch.zeros(1), "base_logps": torch.zeros(1, 1), "anchor_logps": torch.zeros(1, 1)}
        inputs = trainer._stages._loss_inputs(batch, trainer._schedule.phases[-1])
        accumulation, generation = trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation
        # TRL divides the sum of an update's micro-batches by this; 32 rollouts, 8 an update
        assert inputs["num_items_in_batch"].item() * accumulation / generation == 120 / 4


def test_the_kl_is_corrected_by_the_ratio_to_the_base(path, tmp_path):
    """The tokens are the base policy's, whatever the trust region is around."""
    seen = []

    class Watched(ERPDTrainer):
        def _insert_policy_loss(self, inputs, logps):
            super()._insert_policy_loss(inputs, logps)
            if self.state.global_step >= 9:  # beyond the first pass of stage 2
                seen.append([inputs[f"{name}_logps"].clone() for name in ("old_per_token", "base", "anchor")])

    make_run(path, tmp_path, trainer_class=Watched, distillation_anchor="pass", beta=0.1, extraction_passes=1).train()
    old, base, anchor = seen[-1]
    assert torch.equal(old, base)
    assert not torch.equal(base, anchor)
