"""DRPO, SPO and DPPO: values by hand, gradients against the closed forms, limits, hostile inputs."""

import math
from functools import partial

import pytest
import torch

from trl_ext.losses import dppo_loss, drpo_loss, ppo_clip_loss, spo_loss
from trl_ext.losses.drpo import binary_kl


VARIANTS = {
    "drpo": partial(drpo_loss, radius=0.15),
    "spo": partial(spo_loss, radius=0.2),
    "dppo_tv": partial(dppo_loss, radius=0.15, divergence="tv"),
    "dppo_kl": partial(dppo_loss, radius=0.05, divergence="kl"),
    "dppo_tv capped": partial(dppo_loss, radius=0.15, divergence="tv", ratio_cap=3.0),
}
every_variant = pytest.mark.parametrize("loss_function", VARIANTS.values(), ids=VARIANTS)


def one_token(loss_function, pi, mu, advantage, dtype=torch.float64):
    """Loss, gradient with respect to log pi, and metrics of a single token."""
    logps = torch.tensor([[pi]], dtype=dtype).log().requires_grad_()
    behaviour = torch.tensor([[mu]], dtype=dtype).log()
    output = loss_function(logps, behaviour, torch.tensor([[advantage]], dtype=dtype), torch.ones(1, 1))
    output.loss.sum().backward()
    return output.loss.item(), logps.grad.item(), {k: v.item() for k, v in output.metrics.items()}


def random_batch(seed=0, shape=(4, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pi, mu = (torch.rand(shape, generator=generator, dtype=dtype) * 0.98 + 0.01 for _ in range(2))
    advantages = torch.randn(shape[0], 1, generator=generator, dtype=dtype)
    mask = (torch.rand(shape, generator=generator) > 0.3).long()
    return pi.log().requires_grad_(), mu.log(), advantages, mask


# ---- values and gradients


def test_drpo_by_hand():
    # r = 0.6 / 0.4 = 1.5; r A = 3; |A| mu (r - 1)^2 / (2 delta) = 2 * 0.4 * 0.25 / 0.5 = 0.4; J = 2.6
    # w = 1 - (0.6 - 0.4) / 0.25 = 0.2; dJ / dlog pi = r A w = 0.6
    loss, gradient, metrics = one_token(partial(drpo_loss, radius=0.25), pi=0.6, mu=0.4, advantage=2.0)
    assert loss == pytest.approx(-2.6)
    assert gradient == pytest.approx(-0.6)
    assert metrics["ratio/mean"] == pytest.approx(1.5)
    assert metrics["probability_shift/mean"] == metrics["probability_shift/max"] == pytest.approx(0.2)
    assert metrics["gradient_weight/mean"] == metrics["gradient_weight/min"] == pytest.approx(0.2)
    assert metrics["regularizer"] == pytest.approx(0.4)
    assert metrics["outside_region/positive"] == metrics["outside_region/negative"] == 0


def test_drpo_with_a_negative_advantage_by_hand():
    # r = 0.1 / 0.5 = 0.2; r A = -0.2; regulariser 0.5 * 0.64 / (2 * 0.2) = 0.8; J = -1
    # w = 1 + (0.1 - 0.5) / 0.2 = -1: beyond the boundary, so the token is pulled back up; dJ = 0.2 * -1 * -1 = 0.2
    loss, gradient, metrics = one_token(partial(drpo_loss, radius=0.2), pi=0.1, mu=0.5, advantage=-1.0)
    assert loss == pytest.approx(1.0)
    assert gradient == pytest.approx(-0.2)
    assert metrics["gradient_weight/min"] == pytest.approx(-1.0)
    assert metrics["outside_region/negative"] == 1
    assert metrics["outside_region/positive"] == 0


def test_spo_by_hand():
    # r = 1.5; J = 3 - 2 * 0.25 / (2 * 0.4) = 2.375; w = 1 - 0.5 / 0.4 = -0.25; dJ = 1.5 * 2 * -0.25 = -0.75
    loss, gradient, metrics = one_token(partial(spo_loss, radius=0.4), pi=0.6, mu=0.4, advantage=2.0)
    assert loss == pytest.approx(-2.375)
    assert gradient == pytest.approx(0.75)
    assert metrics["gradient_weight/min"] == pytest.approx(-0.25)
    assert metrics["outside_region/positive"] == 1  # |r - 1| = 0.5 > 0.4, though the probability moved by 0.2


@pytest.mark.parametrize("radius", [0.05, 0.15, 0.5, 12.5])
def test_drpo_gradient_is_the_closed_form(radius):
    logps, behaviour, advantages, mask = random_batch()
    drpo_loss(logps, behaviour, advantages, mask, radius=radius).loss.sum().backward()
    pi, mu = logps.detach().exp(), behaviour.exp()
    weight = 1 - advantages.sign() * (pi - mu) / radius  # Eq. 9
    torch.testing.assert_close(logps.grad, -(pi / mu) * advantages * weight * mask)
    # the paper's other form of the same weight
    torch.testing.assert_close(weight, 1 - (advantages * (pi / mu - 1)).sign() * (pi - mu).abs() / radius)


def test_spo_gradient_is_the_closed_form():
    logps, behaviour, advantages, mask = random_batch()
    spo_loss(logps, behaviour, advantages, mask, radius=0.2).loss.sum().backward()
    ratio = (logps.detach() - behaviour).exp()
    weight = 1 - (advantages * (ratio - 1)).sign() * (ratio - 1).abs() / 0.2
    torch.testing.assert_close(logps.grad, -ratio * advantages * weight * mask)


@every_variant
def test_gradient_against_finite_differences(loss_function):
    logps, behaviour, advantages, mask = random_batch(1)
    if loss_function is VARIANTS["dppo_tv capped"]:  # its gradient is not the derivative of its value beyond the cap
        behaviour = behaviour.clamp(min=math.log(0.5))
    assert torch.autograd.gradcheck(lambda x: loss_function(x, behaviour, advantages, mask).loss, (logps,))


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_through_a_softmax(seed):
    """A whole policy: autograd through its logits gives E[r A w grad log pi] of Eq. 9."""
    torch.manual_seed(seed)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    behaviour_logits = torch.randn(5, 11, dtype=torch.float64)
    tokens, advantages = torch.randint(11, (5, 1)), torch.randn(5, 1, dtype=torch.float64)
    logps = logits.log_softmax(-1).gather(1, tokens)
    behaviour = behaviour_logits.log_softmax(-1).gather(1, tokens)
    drpo_loss(logps, behaviour, advantages, torch.ones(5, 1), radius=0.15).loss.sum().backward()
    pi, mu = logps.detach().exp(), behaviour.exp()
    grad_log_pi = torch.zeros_like(logits).scatter(1, tokens, 1.0) - logits.detach().softmax(-1)
    weight = 1 - advantages.sign() * (pi - mu) / 0.15
    torch.testing.assert_close(logits.grad, -(pi / mu) * advantages * weight * grad_log_pi)


# ---- the trust region


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_gradient_vanishes_at_the_boundary_and_turns_beyond(advantage):
    mu, radius = 0.5, 0.125  # exact in binary, so that the boundary is hit exactly
    side = math.copysign(1.0, advantage)
    gradient_at = lambda pi: one_token(partial(drpo_loss, radius=radius), pi, mu, advantage)[1]  # noqa: E731
    assert gradient_at(mu + side * radius) == pytest.approx(0.0, abs=1e-15)
    assert gradient_at(mu + side * radius * 0.9) * advantage < 0  # descent still moves the way of the advantage
    assert gradient_at(mu + side * radius * 1.1) * advantage > 0  # and back from beyond


def test_stationary_point_is_the_boundary():
    """Following the gradient from anywhere ends at pi = mu + sign(A) delta."""
    logit = torch.tensor([[2.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([[0.4], [0.6]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD([logit], lr=0.5)
    for _ in range(3000):
        optimizer.zero_grad()
        loss = drpo_loss(torch.nn.functional.logsigmoid(logit), behaviour, advantages, torch.ones(2, 1), radius=0.15)
        loss.loss.sum().backward()
        optimizer.step()
    torch.testing.assert_close(logit.sigmoid(), torch.tensor([[0.55], [0.45]], dtype=torch.float64))


def test_weight_stays_within_its_bounds():
    logps, behaviour, advantages, mask = random_batch(2, (64, 64))
    behaviour = behaviour - 8 * torch.rand(64, 64, dtype=torch.float64)  # down to mu = 3e-6
    for radius in (0.05, 0.15, 12.5):
        weight = drpo_loss(logps, behaviour, advantages, mask, radius=radius).metrics["gradient_weight/min"]
        assert weight.min() >= 1 - 1 / radius
        assert weight.max() <= 1 + 1 / radius
    weight = spo_loss(logps, behaviour, advantages, mask, radius=0.2).metrics["gradient_weight/min"]
    assert weight.min() < -1e4  # what DRPO was made against


def test_papers_radius_never_binds():
    logps, behaviour, advantages, mask = random_batch(3, (64, 64))
    metrics = drpo_loss(logps, behaviour, advantages, mask, radius=12.5).metrics
    assert metrics["gradient_weight/min"].min() >= 0.92
    assert metrics["outside_region/positive"].sum() == metrics["outside_region/negative"].sum() == 0


def test_infinite_radius_is_the_unregularised_policy_gradient():
    logps, behaviour, advantages, mask = random_batch()
    expected = -(logps - behaviour).exp() * advantages * mask
    for loss_function in (
        drpo_loss,
        spo_loss,
        partial(dppo_loss, divergence="tv"),
        partial(dppo_loss, divergence="kl"),
    ):
        torch.testing.assert_close(loss_function(logps, behaviour, advantages, mask, radius=1e12).loss, expected)


@every_variant
def test_all_agree_on_policy(loss_function):
    logps, _, advantages, mask = random_batch()
    loss = loss_function(logps, logps.detach(), advantages, mask).loss
    torch.testing.assert_close(loss, (-advantages * mask).expand_as(loss))
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, (-advantages * mask).expand_as(loss))
    reference = ppo_clip_loss(logps, logps.detach(), advantages, mask).loss
    torch.testing.assert_close(loss, reference)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "kept"),
    [
        (0.9, 0.5, 1.0, False),  # already raised far, and would be raised more
        (0.9, 0.5, -1.0, True),  # far, but the advantage brings it back
        (0.1, 0.5, 1.0, True),
        (0.1, 0.5, -1.0, False),
        (0.55, 0.5, 1.0, True),  # within the region
        (0.45, 0.5, -1.0, True),
    ],
)
def test_dppo_drops_only_what_leaves_the_region(divergence, pi, mu, advantage, kept):
    radius = {"tv": 0.15, "kl": 0.05}[divergence]
    loss, gradient, metrics = one_token(partial(dppo_loss, radius=radius, divergence=divergence), pi, mu, advantage)
    assert loss == pytest.approx(-pi / mu * advantage if kept else 0.0)
    assert gradient == pytest.approx(-pi / mu * advantage if kept else 0.0)
    assert metrics["masked/positive"] == (not kept and advantage > 0)
    assert metrics["masked/negative"] == (not kept and advantage < 0)


def test_dppo_kl_is_from_the_sampler_to_the_policy():
    # D = 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = 0.223 nats; the other way round it would be 0.193
    assert one_token(partial(dppo_loss, radius=0.21, divergence="kl"), 0.8, 0.5, 1.0)[1] == 0
    assert one_token(partial(dppo_loss, radius=0.23, divergence="kl"), 0.8, 0.5, 1.0)[1] == pytest.approx(-1.6)


def test_dppo_boundary_lies_inside():
    loss_function = partial(dppo_loss, radius=0.125)
    assert one_token(loss_function, 0.625, 0.5, 1.0, torch.float32)[1] != 0
    assert one_token(loss_function, 0.6251, 0.5, 1.0, torch.float32)[1] == 0


def test_dppo_ratio_cap_bounds_the_gradient():
    # r = 0.5 / 0.05 = 10 but within the region of 0.6: the weight of grad log pi is min(10, 3)
    capped = partial(dppo_loss, radius=0.6, ratio_cap=3.0)
    loss, gradient, metrics = one_token(capped, pi=0.5, mu=0.05, advantage=1.0)
    assert loss == gradient == pytest.approx(-3.0)
    assert metrics["ratio/max"] == pytest.approx(10.0)  # the log shows the raw ratio
    assert one_token(partial(dppo_loss, radius=0.6), pi=0.5, mu=0.05, advantage=1.0)[1] == pytest.approx(-10.0)


def test_binary_kl_by_hand():
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.5 log(4 / 3)
    value = binary_kl(torch.tensor(0.5), torch.tensor(0.25))
    assert value.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_kl_is_finite_and_not_negative_everywhere(dtype):
    edge = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-8, 1.0], dtype=dtype)
    value = binary_kl(edge[:, None], edge[None, :])
    assert value.isfinite().all()
    assert value.min() > -1e-6
    assert value[0, -1] > 10  # from impossible to certain


# ---- hostile inputs


HOSTILE = {
    "impossible now": (-math.inf, -1.0),
    "impossible before": (-1.0, -math.inf),
    "impossible both times": (-math.inf, -math.inf),
    "unscored": (-1.0, math.nan),
    "impossible and unscored": (-math.inf, math.nan),
    "far above": (-1.0, -1e4),
    "far below": (-1e4, -1.0),
    "certain": (0.0, 0.0),
    "certain and rare": (0.0, -60.0),
    "rare and certain": (-60.0, 0.0),
}


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize(("current", "behaviour"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_stay_finite(loss_function, dtype, advantage, current, behaviour):
    logps = torch.tensor([[current, -1.0]], dtype=dtype, requires_grad=True)
    output = loss_function(
        logps,
        torch.tensor([[behaviour, -1.5]], dtype=dtype),
        torch.tensor([[advantage]], dtype=dtype),
        torch.ones(1, 2),
    )
    assert output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert logps.grad.isfinite().all()
    assert all(values.isfinite().all() for values in output.metrics.values())
    if advantage == 0:
        assert not output.loss.any()
        assert not logps.grad.any()


@every_variant
def test_unscored_tokens_count_as_on_policy(loss_function):
    logps, behaviour, advantages, mask = random_batch()
    unscored = behaviour.clone()
    unscored[:, ::2] = math.nan
    output = loss_function(logps, unscored, advantages, mask)
    output.loss.sum().backward()
    on_policy = (-advantages * mask).expand_as(mask)
    torch.testing.assert_close(output.loss[:, ::2], on_policy[:, ::2])
    torch.testing.assert_close(logps.grad[:, ::2], on_policy[:, ::2])
    assert (output.metrics["ratio/mean"][:, ::2] == 1).all()
    scored = loss_function(logps, behaviour, advantages, mask).loss
    torch.testing.assert_close(output.loss[:, 1::2], scored[:, 1::2])


@every_variant
def test_masked_tokens_have_exactly_zero_loss_and_gradient(loss_function):
    logps = torch.tensor([[-1.0, math.nan, math.inf, -math.inf, -2.0]] * 2, requires_grad=True)
    behaviour = torch.tensor([[-1.2, math.nan, -math.inf, math.inf, -1.0]] * 2)
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])  # the second row is masked whole
    output = loss_function(logps, behaviour, torch.tensor([[1.0], [-1.0]]), mask)
    output.loss.sum().backward()
    assert output.loss[0, 0] != 0
    assert torch.equal(output.loss != 0, mask.bool())
    assert torch.equal(logps.grad != 0, mask.bool())


@every_variant
def test_a_nan_of_the_current_policy_is_not_hidden(loss_function):
    loss = loss_function(torch.tensor([[math.nan]]), torch.tensor([[-1.0]]), torch.ones(1, 1), torch.ones(1, 1)).loss
    assert loss.isnan().all()


@every_variant
def test_no_gradient_reaches_the_constants(loss_function):
    logps, behaviour, advantages, mask = random_batch()
    behaviour, advantages = behaviour.requires_grad_(), advantages.requires_grad_()
    output = loss_function(logps, behaviour, advantages, mask)
    output.loss.sum().backward()
    assert behaviour.grad is None
    assert advantages.grad is None
    assert not any(values.requires_grad for values in output.metrics.values())


@every_variant
def test_bfloat16_is_computed_in_float32(loss_function):
    logps, behaviour, advantages, mask = random_batch()
    logps, behaviour = logps.detach().bfloat16(), behaviour.bfloat16()
    low = loss_function(logps, behaviour, advantages.bfloat16(), mask).loss
    high = loss_function(logps.float(), behaviour.float(), advantages.bfloat16().float(), mask).loss
    assert torch.equal(low, high)
