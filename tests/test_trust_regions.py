"""The table of trust regions: its rows, and the settings that reach the losses."""

import importlib
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch

import trl_ext
from trl_ext import DRPOConfig, DRPOTrainer, ERPDConfig
from trl_ext.losses import dppo_loss, drpo_loss, ppo_clip_loss, sapo_loss, spo_loss
from trl_ext.trust_regions import (
    TRUST_REGIONS,
    TrustRegion,
    check_trust_region,
    trust_region_loss,
    trust_region_radius,
)


CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def drpo(**settings):
    return DRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **settings)


def erpd(**settings):
    return ERPDConfig(output_dir="unused", use_cpu=True, bf16=False, **settings)


def tensors():
    generator = torch.Generator().manual_seed(0)
    logps, shift = (torch.randn(2, 5, generator=generator) for _ in range(2))
    return logps.sub(2), logps.sub(2) + 0.3 * shift, torch.tensor([[1.0], [-0.5]]), torch.ones(2, 5)


@pytest.mark.parametrize("config", [drpo, erpd])
@pytest.mark.parametrize(
    ("region", "settings", "loss", "keywords"),
    [
        ("drpo", {}, drpo_loss, {"radius": 0.5}),
        ("drpo", {"trust_region_radius": 0.02}, drpo_loss, {"radius": 0.02}),
        ("spo", {}, spo_loss, {"radius": 0.2}),
        ("dppo_tv", {}, dppo_loss, {"radius": 0.15, "divergence": "tv"}),
        ("dppo_kl", {}, dppo_loss, {"radius": 0.05, "divergence": "kl"}),
        ("ppo_clip", {}, ppo_clip_loss, {"epsilon_low": 0.2, "epsilon_high": 0.2}),
        (
            "ppo_clip",
            {"epsilon": 0.05, "epsilon_high": 0.08, "delta": 1.1},
            ppo_clip_loss,
            {"epsilon_low": 0.05, "epsilon_high": 0.08, "ratio_cap": 1.1},
        ),
    ],
)
def test_the_settings_of_each_region_reach_its_loss(config, region, settings, loss, keywords):
    args = config(trust_region=region, **settings)
    expected, ours = loss(*tensors(), **keywords), trust_region_loss(args, *tensors())
    assert torch.equal(ours.loss, expected.loss)
    assert ours.metrics.keys() == expected.metrics.keys()
    assert trust_region_radius(args) == keywords.get("radius")


def test_the_ratio_cap_reaches_dppo():
    args = drpo(trust_region="dppo_kl", dppo_ratio_cap=1.05)
    expected = dppo_loss(*tensors(), radius=0.05, divergence="kl", ratio_cap=1.05)
    assert torch.equal(trust_region_loss(args, *tensors()).loss, expected.loss)
    assert not torch.equal(trust_region_loss(drpo(trust_region="dppo_kl"), *tensors()).loss, expected.loss)


@pytest.mark.parametrize("name", [name for name, region in TRUST_REGIONS.items() if region.radius is not None])
def test_the_radius_is_the_unit_that_the_row_names(name):
    """A move of the radius plus 1% is outside, one of the radius less 1% is not."""
    row = TRUST_REGIONS[name]
    behaviour = torch.tensor([[0.4]], dtype=torch.float64)
    for factor, outside in ((0.99, 0.0), (1.01, 1.0)):
        shift = {
            "absolute probability": factor * row.radius,
            "|ratio - 1|": factor * row.radius * 0.4,
            # KL(Bernoulli(0.4) || Bernoulli(0.4 + d)) = d^2 / 2 / 0.24 to second order, and to third - (2 p - 1) ...
            "nats": None,
        }[row.unit]
        if shift is None:
            low, high = 0.0, 0.5
            for _ in range(60):  # bisection of the binary KL
                shift = (low + high) / 2
                kl = 0.4 * math.log(0.4 / (0.4 + shift)) + 0.6 * math.log(0.6 / (0.6 - shift))
                low, high = (shift, high) if kl < factor * row.radius else (low, shift)
        logps = (behaviour + shift).log()
        metrics = row.loss(logps, behaviour.log(), torch.ones(1, 1), torch.ones(1, 1), radius=row.radius).metrics
        assert metrics["outside_region/positive"].item() == outside


@pytest.mark.parametrize("config", [drpo, erpd])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_region": "kl"}, "trust_region='kl' is unknown: set it to one of 'drpo', 'spo'"),
        (
            {"trust_region": "ppo_clip", "trust_region_radius": 0.1},
            "has no meaning for trust_region='ppo_clip': remove it and set epsilon and epsilon_high and delta",
        ),
        (
            {"trust_region": "dppo_kl", "trust_region_radius": -1.0},
            r"positive number, or None for dppo_kl's default of 0.05 \(nats\)",
        ),
        ({"trust_region": "spo", "trust_region_radius": math.nan}, "set a positive number"),
    ],
)
def test_what_does_not_fit_the_region_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_the_options_of_another_region_are_refused():
    with pytest.raises(ValueError, match="set trust_region to 'dppo_tv' or 'dppo_kl'"):
        drpo(trust_region="spo", dppo_ratio_cap=5.0)
    check_trust_region(drpo(trust_region="dppo_tv", dppo_ratio_cap=5.0))


@pytest.mark.parametrize("config", [DRPOConfig, ERPDConfig])
def test_the_command_line_offers_the_whole_table(config):
    setting = next(setting for setting in fields(config) if setting.name == "trust_region")
    assert setting.metadata["choices"] == list(TRUST_REGIONS)


def test_a_clip_is_what_grpo_does(tmp_path):
    """DRPOTrainer with `trust_region="ppo_clip"` trains as GRPOTrainer does, on the rollouts of the model itself."""
    from trl import GRPOConfig, GRPOTrainer

    runs = []
    for trainer_class, config_class, own in (
        (GRPOTrainer, GRPOConfig, {}),
        (DRPOTrainer, DRPOConfig, {"trust_region": "ppo_clip"}),
    ):
        torch.manual_seed(0)
        args = config_class(**tiny.grpo_settings(tmp_path, max_steps=2, epsilon=0.01, **own))
        trainer = trainer_class(
            tiny.policy(), tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer()
        )
        trainer.train()
        runs.append(trainer)
    for log, expected in zip(runs[1].state.log_history[:2], runs[0].state.log_history[:2], strict=True):
        assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert log.get("clip_ratio/region_mean", 0.0) == pytest.approx(expected["clip_ratio/region_mean"], rel=1e-5)
    assert runs[0].state.log_history[1]["clip_ratio/region_mean"] > 0.1


# ---- the way in


def test_the_worked_example_of_contributing(tmp_path):
    """CISPO from CONTRIBUTING.md: at most 20 lines, equal to TRL's own, and trained with by its name."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.S) if "cispo_loss" in block
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names = {}
    try:
        exec(code, names)
        logps, behaviour, advantages, mask = tensors()
        logps.requires_grad_()
        mask[0, 3] = 0
        loss = names["cispo_loss"](logps, behaviour, advantages, mask, radius=0.1)
        weight = (logps.detach() - behaviour).exp().clamp(max=1.1)  # as in TRL, with epsilon_high = 1.1
        assert (weight == 1.1).any()
        torch.testing.assert_close(loss.loss, -weight * advantages * logps * mask)
        gradient = torch.autograd.grad(loss.loss.sum(), logps)[0]
        torch.testing.assert_close(gradient, -weight * advantages * mask)

        args = DRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=2, trust_region="cispo"))
        trainer = DRPOTrainer(
            tiny.policy(), tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer()
        )
        trainer.train()
        assert trainer.trust_region_radius == TRUST_REGIONS["cispo"].radius
        assert "clip_ratio" in trainer.state.log_history[1]
        with pytest.raises(ValueError, match=r"or None for cispo's default of 4\.0"):
            erpd(trust_region="cispo", trust_region_radius=-1.0)
    finally:
        TRUST_REGIONS.pop("cispo", None)


def test_a_region_of_ones_own_may_read_settings_of_grpo(tmp_path, monkeypatch, caplog):
    """Other regions are not refused because of their defaults, and warn of a change that they do not read."""
    options = {"sapo_temperature_pos": "temperature_positive", "sapo_temperature_neg": "temperature_negative"}
    monkeypatch.setitem(TRUST_REGIONS, "soft", TrustRegion(sapo_loss, "SAPO's soft gate", options=options))

    def make(**settings):
        caplog.clear()
        args = DRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=1, **settings))
        arguments = {"processing_class": tiny.tokenizer()}
        return DRPOTrainer(tiny.policy(), tiny.digits_reward, args, tiny.prompts(), **arguments)

    make(trust_region="soft", sapo_temperature_neg=2.0).train()
    assert "has no effect" not in caplog.text
    make(trust_region="soft", epsilon=0.1)
    assert "epsilon=0.1 has no effect with trust_region='soft': remove it" in caplog.text
    make(sapo_temperature_neg=2.0)
    assert "sapo_temperature_neg=2.0 has no effect with trust_region='drpo': set trust_region_radius" in caplog.text
    monkeypatch.setitem(TRUST_REGIONS, "plain", TrustRegion(ppo_clip_loss, "the default clip"))
    with pytest.raises(ValueError, match=r"no meaning for trust_region='plain': remove it, or choose another"):
        make(trust_region="plain", trust_region_radius=0.5)


@pytest.mark.parametrize(
    ("package", "name"), [("drpo", "DRPO"), ("rlad", "RLAD"), ("tropd", "TrOPD"), ("erpd", "ERPD")]
)
def test_each_method_is_a_package_of_its_own(package, name):
    """`from trl_ext.drpo import DRPOTrainer`; that this imports nothing too early is in test_plain_import_is_light."""
    method = importlib.import_module(f"trl_ext.{package}")
    assert getattr(method, f"{name}Config") is getattr(trl_ext, f"{name}Config")
    assert getattr(method, f"{name}Trainer") is getattr(trl_ext, f"{name}Trainer")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        method.Nothing  # noqa: B018
