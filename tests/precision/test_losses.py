"""
Every loss in float32 and bfloat16 against itself in float64, on policies over Qwen3's vocabulary of 151,936 tokens and
on sequences of 32,768 tokens.

The errors are those of each token's loss and gradient: relative where these are above 1, the gradient of a token with
ratio 1 and advantage 1, and absolute below.
"""

import pytest
import tiny
import torch
from loss_table import LOSSES, Inputs, random_inputs

from trl_ext import losses


# Rounding a log-probability of 20 nats to float32 changes the ratio by 2^-24 * 20 = 1e-6
FLOAT32_ERROR = 1e-5
# Rounding log-probabilities to bfloat16 changes them by 2^-9 of their value, whatever a loss does: this is the error
# against float64 for the same rounded log-probabilities
BFLOAT16_ERROR = 1e-5


def loss_and_gradients(name: str, inputs: Inputs) -> list[torch.Tensor]:
    loss = LOSSES[name](inputs).loss
    gradients = torch.autograd.grad(loss.sum(), (inputs.logps, inputs.top_k), allow_unused=True)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_near(ours: list[torch.Tensor], exact: list[torch.Tensor], error: float) -> None:
    for value, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=error, atol=error)


@pytest.fixture(scope="module", params=[0.1, 8.0], ids=["near", "far"])
def policies(request) -> Inputs:
    """Near: ratios of 1 with a standard deviation of 0.1. Far: ratios below e^-10 and above e^10."""
    inputs = random_inputs(distance=request.param)
    log_ratio = inputs.logps - inputs.behaviour
    assert (log_ratio.min() < -10) == (log_ratio.max() > 10) == (request.param == 8.0)
    return inputs


def test_the_table_has_every_loss():
    tried = {name for loss in LOSSES.values() for name in loss.__code__.co_names}
    assert {name for name in losses.__all__ if name.endswith(("_loss", "_penalty"))} <= tried


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_near_float64(policies, name):
    exact = loss_and_gradients(name, policies.to(torch.float64))
    assert exact[0].any()  # else there would be nothing to compare
    assert any(gradient.any() for gradient in exact[1:])
    ours = loss_and_gradients(name, policies.to(torch.float32))
    assert all(value.dtype == torch.float32 for value in ours)
    assert_near(ours, exact, FLOAT32_ERROR)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_inputs_are_computed_in_float32(policies, name):
    rounded = policies.to(torch.bfloat16)
    exact_loss, *exact_gradients = loss_and_gradients(name, rounded.to(torch.float64))
    loss, *gradients = loss_and_gradients(name, rounded)
    assert loss.dtype == torch.float32
    assert_near([loss], [exact_loss], BFLOAT16_ERROR)
    assert_near(gradients, exact_gradients, 2**-8)  # rounded to the dtype of what they are the gradients of


@pytest.mark.parametrize("name", LOSSES)
def test_32768_tokens_are_near_float64_and_need_no_larger_tensor(name):
    time, k = 32_768, 4
    inputs = random_inputs(batch=1, time=time, vocabulary=50, k=k, distance=1.0)
    exact = loss_and_gradients(name, inputs.to(torch.float64))
    inputs, largest = inputs.to(torch.float32), tiny.LargestTensor()
    with largest:
        ours = loss_and_gradients(name, inputs)
    assert largest.elements <= time * k
    assert_near(ours, exact, FLOAT32_ERROR)


@pytest.mark.parametrize("name", LOSSES)
def test_ratios_of_0_and_infinity_have_finite_losses_and_gradients(name):
    """Tokens that are impossible, or nearly so, for one of the policies."""
    hostile = torch.tensor([-1e-7, -20.0, -80.0, -700.0, -torch.inf], dtype=torch.float64)
    pairs = torch.cartesian_prod(hostile[:-1], hostile)  # the current policy never samples what is impossible to it
    inputs = random_inputs(batch=1, time=len(pairs), vocabulary=50, distance=1.0)
    inputs.logps, inputs.behaviour, inputs.teacher = pairs[None, :, 0], pairs[None, :, 1], pairs[None, :, 1]
    for dtype in (torch.float32, torch.float64):
        assert all(value.isfinite().all() for value in loss_and_gradients(name, inputs.to(dtype)))
