"""ERPD's extraction losses and signals: by hand, against finite differences, and with hostile inputs."""

import math

import pytest
import torch

from trl_ext.losses import (
    normalize_signal,
    outcomes_of,
    reward_cross_entropy_loss,
    reward_regression_loss,
    sapo_loss,
    token_signal,
)
from trl_ext.losses.erpd import mean_and_std, signal_moments


DOUBLE = torch.float64


def column(*values):
    return torch.tensor(values, dtype=DOUBLE)


# ---- extraction


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # tau 1: f(1) = 4 sigma(0) = 2, f'(1) = 4 * 1/2 * 1/2 = 1
        (1.0, 2.0, -4.0, -2.0),
        # tau 1.05: f(1) = 4/1.05 * 1/2 = 1.9047619, f'(1) = 1 whatever the temperature
        (1.0, -1.0, 1.9047619, 1.0),
        # sigma(1) = 0.7310586: f(2) = 2.9242343, f'(2) = 4 * 0.7310586 * 0.2689414 = 0.7864477; times r = 2
        (2.0, 1.0, -2.9242343, -1.5728955),
        # sigma(-0.525) = 0.3716838: f(0.5) = 1.4159384, f' = 4 * 0.3716838 * 0.6283162 = 0.9341398; times r = 0.5
        (0.5, -1.0, 1.4159384, 0.4670699),
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_sapo_by_hand(ratio, advantage, loss, slope):
    logps = column([math.log(ratio) - 1.0]).requires_grad_()
    output = sapo_loss(logps, column([-1.0]), column([advantage]), torch.ones(1, 1))
    output.loss.sum().backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-6)
    assert logps.grad.item() == pytest.approx(slope, rel=1e-6)


def test_sapo_temperatures_go_by_the_sign():
    logps, base = column([0.0, 0.0]), column([-0.5, -0.5])
    settings = {"temperature_positive": 2.0, "temperature_negative": 3.0}
    output = sapo_loss(logps, base, column([1.0, -1.0]), torch.ones(1, 2), **settings)
    drift = math.exp(0.5) - 1
    expected = [-4 / 2 / (1 + math.exp(-2 * drift)), 4 / 3 / (1 + math.exp(-3 * drift))]
    torch.testing.assert_close(output.loss, column(expected))


def sequences():
    # log-ratios 0.2 + 0.4 = 0.6, and -1.0 (the second token is masked): R = 0.3 and -0.5 with beta_r 0.5
    logps = column([-1.0, -0.6], [-2.0, -9.0])
    base = column([-1.2, -1.0], [-1.0, -1.0])
    return logps.requires_grad_(), base, torch.tensor([[1, 1], [1, 0]])


def test_cross_entropy_by_hand():
    logps, base, mask = sequences()
    output = reward_cross_entropy_loss(logps, base, column(1.0, 1.0), mask, beta_r=0.5)
    # -log sigma(0.3) = 0.5543552, -log sigma(-0.5) = 0.9740770, spread over 2 tokens and over 1
    torch.testing.assert_close(output.loss, column([0.2771776, 0.2771776], [0.9740770, 0.0]), rtol=1e-6, atol=1e-7)
    output.loss.sum().backward()
    # (sigma(R) - 1) beta_r: sigma(0.3) = 0.5744425, sigma(-0.5) = 0.3775407
    torch.testing.assert_close(logps.grad, column([-0.2127787, -0.2127787], [-0.3112297, 0.0]), rtol=1e-6, atol=1e-7)


def test_cross_entropy_of_a_wrong_and_an_unknown_outcome():
    logps, base, mask = sequences()
    output = reward_cross_entropy_loss(logps, base, column(0.0, math.nan), mask, beta_r=0.5)
    output.loss.sum().backward()
    # -log sigma(-0.3) = 0.8543552; the second has no loss and no gradient
    torch.testing.assert_close(output.loss, column([0.4271776, 0.4271776], [0.0, 0.0]), rtol=1e-6, atol=1e-7)
    assert logps.grad[1].tolist() == [0, 0]
    assert output.metrics["extraction/implicit_reward_incorrect"][0].item() == pytest.approx(0.3)
    assert output.metrics["extraction/implicit_reward_incorrect"][1].isnan()
    assert output.metrics["extraction/implicit_reward_correct"].isnan().all()


def test_cross_entropy_of_an_outcome_in_between():
    logps, base, mask = sequences()
    output = reward_cross_entropy_loss(logps, base, column(0.25, 1.0), mask, beta_r=0.5)
    output.loss.sum().backward()
    # 0.25 * 0.5543552 + 0.75 * 0.8543552 = 0.7793552 over 2 tokens; (0.5744425 - 0.25) * 0.5 = 0.1622212 per token
    torch.testing.assert_close(output.loss[0], column(0.3896776, 0.3896776), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logps.grad[0], column(0.1622212, 0.1622212), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("rewards", "outcomes"),
    [
        ([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]),
        ([-0.1, 0.7, -0.1], [0.0, 1.0, 0.0]),  # exactly, whatever the two values are
        ([-2.0, 2.0, -1.0, 0.0], [0.0, 1.0, 0.25, 0.5]),
        ([3.0, math.nan, 1.0, math.inf], [1.0, math.nan, 0.0, math.nan]),
        ([3e38, -3e38, 0.0], [1.0, 0.0, 0.5]),  # whose difference is more than float32 holds
        ([0.5, 0.5], [math.nan, math.nan]),
        ([0.69999999, 0.70000005], [math.nan, math.nan]),  # equal but for rounding
        ([math.nan], [math.nan]),
    ],
)
def test_outcomes_of_any_rewards(rewards, outcomes):
    assert outcomes_of(torch.tensor(rewards)).nan_to_num(-1).tolist() == [-1 if math.isnan(o) else o for o in outcomes]


def test_regression_by_hand():
    logps, base, mask = sequences()
    output = reward_regression_loss(logps, base, column(1.0, -1.0), mask, beta_r=0.5)
    # (0.3 - 1)^2 = 0.49 over two tokens; (-0.5 + 1)^2 = 0.25 over one
    torch.testing.assert_close(output.loss, column([0.245, 0.245], [0.25, 0.0]))
    output.loss.sum().backward()
    # 2 (R - A) beta_r: -0.7, and 0.5
    torch.testing.assert_close(logps.grad, column([-0.7, -0.7], [0.5, 0.0]))


def sapo(logps, base_logps, targets, mask):
    return sapo_loss(logps, base_logps, targets[:, None], mask)


def cross_entropy(logps, base_logps, targets, mask):
    return reward_cross_entropy_loss(logps, base_logps, (targets > 0).double(), mask)


LOSSES = {"sapo": sapo, "ce": cross_entropy, "mse": reward_regression_loss}


@pytest.mark.parametrize("loss_function", LOSSES.values(), ids=LOSSES)
def test_gradients_are_the_finite_differences(loss_function):
    generator = torch.Generator().manual_seed(0)
    logps = (-3 * torch.rand(3, 5, generator=generator, dtype=DOUBLE)).requires_grad_()
    base = -torch.rand(3, 5, generator=generator, dtype=DOUBLE) * 3
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    targets = column(1.3, -0.7, 0.4)
    weights = torch.rand(3, 5, generator=generator, dtype=DOUBLE)  # so that a gradient on the wrong token shows
    assert torch.autograd.gradcheck(lambda x: (loss_function(x, base, targets, mask).loss * weights).sum(), logps)


@pytest.mark.parametrize("loss_function", LOSSES.values(), ids=LOSSES)
def test_hostile_inputs(loss_function):
    inf, nan = math.inf, math.nan
    logps = torch.tensor([[-1.0, -inf, -500.0, nan], [-1.0, -2.0, -3.0, -4.0], [-1.0, -1.0, -1.0, -1.0]])
    logps.requires_grad_()
    base = torch.tensor([[nan, -1.0, -1.0, -1.0], [-inf, inf, -900.0, -1.0], [nan, nan, nan, nan]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    output = loss_function(logps, base, torch.tensor([1.0, -1.0, 1.0]), mask)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert logps.grad.isfinite().all()
    assert output.loss[mask == 0].eq(0).all()
    assert logps.grad[mask == 0].eq(0).all()


@pytest.mark.parametrize("loss_function", LOSSES.values(), ids=LOSSES)
def test_a_broken_policy_is_not_hidden(loss_function):
    loss = loss_function(torch.tensor([[math.nan]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1)).loss
    assert loss.isnan().all()


@pytest.mark.parametrize("loss_function", LOSSES.values(), ids=LOSSES)
def test_half_precision_is_computed_in_float32(loss_function):
    logps, base = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.5]])
    exact = loss_function(logps, base, torch.ones(1), torch.ones(1, 2)).loss
    half = loss_function(logps.bfloat16(), base.bfloat16(), torch.ones(1), torch.ones(1, 2)).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact)  # these numbers are exact in bfloat16


# ---- signals


def test_signals_by_hand():
    logps = {
        "base": torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True),
        "teacher": torch.tensor([[-0.5, -4.0, -3.0]], requires_grad=True),
        "unlearned": torch.tensor([[-3.0, -1.0, -math.inf]]),
    }
    mask = torch.tensor([[1, 1, 0]])
    expected = {
        "teacher": [[0.5, -2.0, 0.0]],
        "unlearned_reference": [[2.5, -3.0, 0.0]],
        "unlearned_teacher": [[2.0, -1.0, 0.0]],
    }
    for signal, values in expected.items():
        result = token_signal(signal, logps, mask)
        assert result.tolist() == values
        assert not result.requires_grad


def test_an_impossible_token_says_nothing():
    """It has no signal of its own, and centring does not give it one."""
    logps = {"base": torch.tensor([[-1.0, -1.0, -1.0]]), "teacher": torch.tensor([[-3.0, -2.0, -math.inf]])}
    signal = token_signal("teacher", logps, torch.ones(1, 3))
    mean, std = mean_and_std(signal_moments(signal, torch.ones(1, 3)))
    assert (mean, std) == (-1.5, 0.5)  # of -2 and -1
    normalized = normalize_signal(signal, torch.ones(1, 3), mean=mean, std=std)
    assert normalized.tolist() == [[-1.0, 1.0, 0.0]]


def test_a_rollout_without_a_reward_has_no_loss():
    logps, base = torch.full((2, 2), -1.0, requires_grad=True), torch.full((2, 2), -2.0)
    loss = reward_regression_loss(logps, base, torch.tensor([0.5, math.nan]), torch.ones(2, 2)).loss
    loss.sum().backward()
    assert loss[1].tolist() == [0.0, 0.0]
    assert logps.grad[1].tolist() == [0.0, 0.0]
    assert (logps.grad[0] != 0).all()


def test_a_signal_needs_only_its_own_policies():
    ones = torch.ones(1, 1)
    assert token_signal("teacher", {"base": ones, "teacher": 3 * ones}, ones).item() == 2
    assert token_signal("unlearned_teacher", {"base": ones, "unlearned": 3 * ones}, ones).item() == -2


def test_moments_add_up_over_batches():
    signal, mask = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    parts = [signal_moments(signal[i : i + 1], mask[i : i + 1]) for i in range(2)]
    mean, std = mean_and_std(sum(parts))
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 3
    assert (mean, std) == pytest.approx((3.0, math.sqrt(8 / 3)))
    assert mean_and_std(signal_moments(signal, torch.zeros(2, 3))) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-1.0, 0.0, 2.0]),  # (1 - 3) / 2, (3 - 3) / 2, (23 - 3) / 2 = 10, clipped
        ({"clip": None}, [-1.0, 0.0, 10.0]),
        ({"normalization": "scale", "clip": 5.0}, [0.5, 1.5, 5.0]),  # 23 / 2 = 11.5, clipped
        ({"normalization": "none", "clip": 4.0}, [1.0, 3.0, 4.0]),
    ],
)
def test_normalization_by_hand(settings, expected):
    signal, mask = torch.tensor([[1.0, 3.0, 23.0, 0.0]]), torch.tensor([[1, 1, 1, 0]])
    result = normalize_signal(signal, mask, mean=3.0, std=2.0, **settings)
    assert result.tolist() == [[*expected, 0.0]]


@pytest.mark.parametrize("normalization", ["standardize", "scale", "none"])
def test_noise_is_not_amplified(normalization):
    noise = 1e-7 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    result = normalize_signal(noise, torch.ones(2, 8), mean=0.0, std=1e-7, normalization=normalization)
    assert result.eq(0).all()
