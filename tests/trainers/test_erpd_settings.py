"""ERPD's settings reach the schedule, the losses, the logs and the check of a checkpoint."""

from functools import partial

import pytest
import torch
from tiny_erpd import right_or_wrong, settings
from tiny_erpd_trainer import at_step, hand_made_batch, make_trainer

from trl_ext import ERPDConfig
from trl_ext.erpd.fixed_set import FixedSet
from trl_ext.losses import (
    drpo_loss,
    ppo_clip_loss,
    reward_cross_entropy_loss,
    reward_regression_loss,
    sapo_loss,
)


# ---- the losses


def random_tensors():
    """Log-probabilities far enough from those of the other policies for every clip to bind somewhere."""
    generator = torch.Generator().manual_seed(0)
    logps, behaviour, base = -3 * torch.rand(3, 4, 64, generator=generator)
    signal = torch.randn(4, 64, generator=generator)
    advantages = torch.tensor([[1.5], [-0.5], [0.5], [-1.5]])
    return logps, behaviour, base, signal, advantages, torch.ones(4, 64)


@pytest.mark.parametrize("loss", ["sapo", "ce", "mse"])
@pytest.mark.parametrize("phase", [0, 1])
def test_extraction_takes_its_settings_and_the_unlearned_policy_the_reverse(path, tmp_path, loss, phase):
    """SAPO is against the policy that sampled, the other two against the base policy."""
    trainer = make_trainer(
        path, tmp_path, extraction_loss=loss, signal="unlearned_reference", sapo_temperature_pos=0.7,
        sapo_temperature_neg=2.5, extraction_beta=0.3,
    )  # fmt: skip
    logps, behaviour, base, _, advantages, mask = random_tensors()
    outcomes, reverse = torch.tensor([1.0, 0.0, 1.0, 0.0]), (1, -1)[phase]
    inputs = {"base_logps": base, "outcomes": outcomes, "rewards": outcomes}
    ours = at_step(trainer, phase).policy_loss(logps, behaviour, advantages, mask, inputs).loss
    if loss == "sapo":
        temperatures = {"temperature_positive": 0.7, "temperature_negative": 2.5}
        expected = sapo_loss(logps, behaviour, reverse * advantages, mask, **temperatures)
    elif loss == "ce":
        expected = reward_cross_entropy_loss(logps, base, [outcomes, 1 - outcomes][phase], mask, beta_r=0.3)
    else:
        expected = reward_regression_loss(logps, base, reverse * advantages[:, 0], mask, beta_r=0.3)
    assert torch.equal(ours, expected.loss)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.7},
            partial(ppo_clip_loss, epsilon_low=0.1, epsilon_high=0.4, ratio_cap=1.7),
        ),
        (
            {"distillation_epsilon": 0.6},
            partial(ppo_clip_loss, epsilon_low=0.6, epsilon_high=0.6),
        ),
        (
            {"distillation_epsilon": 0.1, "distillation_epsilon_high": 0.5},
            partial(ppo_clip_loss, epsilon_low=0.1, epsilon_high=0.5),
        ),
        (
            {"distillation_epsilon": 0.1, "distillation_epsilon_high": 0.5, "epsilon_high": 0.4},
            partial(ppo_clip_loss, epsilon_low=0.1, epsilon_high=0.4),
        ),
        (
            {"trust_region": "drpo", "trust_region_radius": 0.03},
            partial(drpo_loss, radius=0.03),
        ),
    ],
    ids=["ppo_clip", "own_epsilon", "own_epsilons", "both_epsilons", "drpo"],
)
def test_distillation_takes_its_trust_regions_settings(path, tmp_path, given, expected):
    trainer = make_trainer(path, tmp_path, **given)
    logps, behaviour, base, signal, advantages, mask = random_tensors()
    inputs = {"base_logps": base, "signal": signal}
    ours = at_step(trainer, 1).policy_loss(logps, behaviour, advantages, mask, inputs).loss
    signal_and_outcome = signal + 0.5 * advantages  # the default of `outcome_advantage_weight`
    assert torch.equal(ours, expected(logps, behaviour, signal_and_outcome, mask).loss)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_samplers_log_probabilities_count_in_stage_1_only(path, tmp_path, stage):
    """What the ratio is against: in stage 1 the sampler's where it has any, in stage 2 the anchor's."""
    trainer = at_step(make_trainer(path, tmp_path, extraction_loss="sapo"), stage - 1)
    trainer._stages.fixed_set = FixedSet([], num_tokens=7)
    base, anchor, sampler = torch.full((2, 4), -2.0), torch.full((2, 4), -2.5), torch.full((2, 4), -3.0)
    sampler[:, 1] = torch.nan
    batch = hand_made_batch() | {"base_logps": base, "anchor_logps": anchor, "signal": torch.ones(2, 4)}
    batch |= {"sampling_per_token_logps": sampler}
    seen, policy_loss = [], trainer.policy_loss

    def record(logps, behaviour_logps, *args):
        seen.append(behaviour_logps)
        return policy_loss(logps, behaviour_logps, *args)

    trainer.policy_loss = record
    trainer.compute_loss(trainer.model, trainer._stages._loss_inputs(batch, trainer._phase))
    assert seen[0].tolist() == [[-3.0, -2.0, -3.0, -3.0] if stage == 1 else [-2.5] * 4] * 2


# ---- refusals


def test_a_best_checkpoint_is_refused(tmp_path):
    strategies = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="load_best_model_at_end=True would load a checkpoint of any stage"):
        ERPDConfig(**settings(tmp_path, load_best_model_at_end=True, **strategies))


def test_other_distillation_passes_do_not_fit_a_checkpoint(path, tmp_path):
    saving = {"reward": right_or_wrong, "save_strategy": "steps", "save_steps": 1}
    make_trainer(path, tmp_path, **saving).train()
    with pytest.raises(ValueError, match=r"cannot continue from the checkpoint .*distillation_passes 1 -> 2"):
        make_trainer(path, tmp_path / "resumed", distillation_passes=2, **saving).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )
