"""The loss of DRPOTrainer on a real batch, and what a batch may hold that must not break it."""

import math
from functools import partial

import pytest
import tiny
import torch
from tiny_drpo import make_trainer, stale_batch
from trl import GRPOTrainer

from trl_ext import DRPOTrainer
from trl_ext.losses import dppo_loss, drpo_loss, ppo_clip_loss, spo_loss


def expected_loss(trainer, inputs, behaviour_logps, weight=1.0):
    """DRPO on full logits, aggregated over all tokens as `dapo` does: what the trainer must equal."""
    logps = tiny.naive_logps(trainer.model, inputs, trainer.args.temperature)
    mu = torch.where(behaviour_logps.isnan(), logps.detach(), behaviour_logps).exp()
    ratio = logps.exp() / mu
    advantages = inputs["advantages"][:, None]
    objective = ratio * advantages - advantages.abs() * mu * (ratio - 1) ** 2 / (2 * 0.5)
    return -(weight * objective * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()


@pytest.mark.parametrize("source", ["sampler", "old", "current"])
def test_loss_and_gradient_of_the_objective(path, tmp_path, source):
    trainer = make_trainer(path, tmp_path, temperature=0.8)
    inputs = stale_batch(trainer, sampler=source == "sampler")
    if source == "current":
        del inputs["old_per_token_logps"]
    trainer.current_gradient_accumulation_steps = 1
    ours = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(ours, list(trainer.model.parameters()))

    behaviour_logps = {
        "sampler": inputs.get("sampling_per_token_logps"),
        "old": inputs.get("old_per_token_logps"),
        "current": torch.full_like(inputs["completion_ids"], math.nan, dtype=torch.float32),
    }[source]
    theirs = expected_loss(trainer, inputs, behaviour_logps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(theirs, list(trainer.model.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


def test_loss_and_gradient_around_the_old_policy(path, tmp_path):
    """TRL's correction of the sampler's mismatch weighs the whole loss, as it weighs GRPO's."""
    trainer = make_trainer(path, tmp_path, temperature=0.8, trust_region_anchor="old_policy")
    inputs = stale_batch(trainer, sampler=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = True  # TRL corrects for vLLM alone
    inputs["importance_sampling_ratio"] = torch.linspace(0.2, 3, inputs["completion_ids"].numel()).view(8, -1)
    ours = trainer.compute_loss(trainer.model, inputs)
    theirs = expected_loss(trainer, inputs, inputs["old_per_token_logps"], inputs["importance_sampling_ratio"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    parameters = list(trainer.model.parameters())
    gradients, expected = torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "loss_function"),
    [
        ({"trust_region": "drpo", "trust_region_radius": 0.02}, partial(drpo_loss, radius=0.02)),
        ({"trust_region": "spo"}, partial(spo_loss, radius=0.2)),
        ({"trust_region": "dppo_tv", "trust_region_radius": 0.01}, partial(dppo_loss, radius=0.01, divergence="tv")),
        ({"trust_region": "dppo_kl", "trust_region_radius": 0.01}, partial(dppo_loss, radius=0.01, divergence="kl")),
        (
            {"trust_region": "dppo_kl", "trust_region_radius": 0.5, "dppo_ratio_cap": 1.1},
            partial(dppo_loss, radius=0.5, divergence="kl", ratio_cap=1.1),
        ),
    ],
)
def test_settings_reach_the_loss(path, tmp_path, settings, loss_function):
    trainer = make_trainer(path, tmp_path, **settings)
    inputs = stale_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    logps = trainer.score_completions(trainer.model, inputs)
    mask = inputs["completion_mask"]
    expected = loss_function(logps, inputs["old_per_token_logps"], inputs["advantages"][:, None], mask)
    torch.testing.assert_close(loss, expected.loss.sum() / mask.sum())
    others = {
        round(f(logps, inputs["old_per_token_logps"], inputs["advantages"][:, None], mask).loss.sum().item(), 4)
        for f in (partial(drpo_loss, radius=0.5), ppo_clip_loss)
    }
    assert round(expected.loss.sum().item(), 4) not in others


def test_an_interrupted_loss_leaves_no_trace(path, tmp_path):
    trainer = make_trainer(path, tmp_path, delta=1.5)
    inputs = stale_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer.compute_loss(trainer.model, inputs)
    with pytest.raises(KeyError):  # an out-of-memory error, say, which the user catches
        trainer.compute_loss(trainer.model, {k: v for k, v in inputs.items() if k != "num_items_in_batch"})
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.2, 0.2, 1.5)
    assert trainer._loss_inputs is None
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected)


def test_the_rollout_batch_is_left_as_it_was(path, tmp_path):
    trainer = make_trainer(path, tmp_path, beta=0.1, delta=1.5)
    inputs = stale_batch(trainer, sampler=True)
    trainer.current_gradient_accumulation_steps = 1
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    trainer.compute_loss(trainer.model, inputs)
    assert set(before) == {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(7), inputs[name].nan_to_num(7)), name
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.2, 0.2, 1.5)


def test_off_policy_mask_judges_by_the_advantages(path, tmp_path):
    """It drops sequences of negative advantage that drifted; those of positive advantage stay, however far."""
    trainer = make_trainer(path, tmp_path, off_policy_mask_threshold=1e-6)
    inputs = stale_batch(trainer)
    inputs["old_per_token_logps"] += 1.0  # drifted: log old - log current is about 1
    trainer.current_gradient_accumulation_steps = 1
    trainer.off_policy_mask_threshold = None
    inputs["advantages"] = torch.tensor([1.0, -1.0] * 4)
    half = dict(inputs, advantages=torch.tensor([1.0, 0.0] * 4))
    kept = trainer.compute_loss(trainer.model, half)
    trainer.off_policy_mask_threshold = 1e-6
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), kept)


@pytest.mark.parametrize("trust_region", ["drpo", "spo", "dppo_tv", "dppo_kl"])
def test_hostile_rollout_scores_keep_the_run_alive(path, tmp_path, trust_region):
    trainer = make_trainer(path, tmp_path, trust_region=trust_region, beta=0.1)
    inputs = stale_batch(trainer, sampler=True)
    inputs["sampling_per_token_logps"][:, 2] = -math.inf
    inputs["sampling_per_token_logps"][:, 3] = -1e4
    inputs["completion_mask"][3] = 0
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_infinite_scores_count_as_missing_in_the_kl_term_too(path, tmp_path, value):
    reference = tiny.save_policy(tmp_path / "other", seed=5)
    trainer = make_trainer(path, tmp_path, beta=0.1)
    trainer.ref_model = make_trainer(reference, tmp_path).model
    inputs = stale_batch(trainer, sampler=True)
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer.compute_loss(trainer.model, inputs)
    inputs["sampling_per_token_logps"] = inputs["sampling_per_token_logps"].nan_to_num(nan=value)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("in_the_loss", [0, 1])
def test_an_impossible_token_does_not_make_the_loss_nan(path, tmp_path, monkeypatch, in_the_loss, on_policy):
    trainer = make_trainer(path, tmp_path)
    inputs = stale_batch(trainer)
    if on_policy:
        del inputs["old_per_token_logps"]
    inputs["completion_mask"][0, 0] = in_the_loss
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def with_an_impossible_token(self, *args, **kwargs):
        logps, *others = score(self, *args, **kwargs)
        return torch.cat(
            [logps[:, :1].masked_fill(torch.arange(8)[:, None] == 0, -math.inf), logps[:, 1:]], 1
        ), *others

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", with_an_impossible_token)
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.compute_loss(trainer.model, inputs).isfinite()


def test_a_policy_loss_may_score_again(path, tmp_path):
    class Twice(DRPOTrainer):
        def policy_loss(self, per_token_logps, behaviour_logps, advantages, mask, inputs):
            again = self.score_completions(self.model, inputs)
            torch.testing.assert_close(again, per_token_logps)
            return super().policy_loss(again, behaviour_logps, advantages, mask, inputs)

    make_trainer(path, tmp_path, trainer_class=Twice).train()


def test_off_policy_mask_can_be_overridden_as_in_trl(path, tmp_path):
    seen = []

    class Masked(DRPOTrainer):
        @staticmethod
        def get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
            seen.append(advantages)
            return torch.ones_like(advantages)

    make_trainer(path, tmp_path, trainer_class=Masked, off_policy_mask_threshold=0.1, max_steps=1).train()
    assert seen[0].shape == (8, 1)
    assert seen[0].sum().abs() < 1e-3  # normalised in groups
    arguments = (torch.ones(1, 1), torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), 0.1)
    assert DRPOTrainer.get_off_policy_mask(*arguments) == 1
