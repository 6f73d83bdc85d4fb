"""TRRD and KDRL: values by hand, limits, gradients, what the ratio's range says, hostile inputs."""

import itertools
import math
from functools import partial

import pytest
import torch

from trl_ext.losses import (
    dppo_loss,
    drpo_loss,
    kdrl_coefficient,
    kdrl_mask,
    kdrl_penalty,
    ppo_clip_loss,
    spo_loss,
    trrd_loss,
)


def one_token(student, old, teacher, advantage, **settings):
    """Loss and gradient with respect to S of a single token, given probabilities."""
    logps = torch.tensor([[student]], dtype=torch.float64).log().requires_grad_()
    old_logps, teacher_logps = (torch.tensor([[p]], dtype=torch.float64).log() for p in (old, teacher))
    output = trrd_loss(
        logps, old_logps, teacher_logps, torch.full((1, 1), advantage).double(), torch.ones(1, 1), **settings
    )
    output.loss.sum().backward()
    metrics = {name: value[0] if isinstance(value, tuple) else value for name, value in output.metrics.items()}
    return output.loss.item(), logps.grad.item(), {name: value.item() for name, value in metrics.items()}


def random_batch(seed=0, shape=(5, 8)):
    generator = torch.Generator().manual_seed(seed)
    student, old, teacher = (-2.5 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64)
    mask = (torch.rand(shape, generator=generator) > 0.3).long()
    return student.requires_grad_(), old, teacher, advantages, mask


def test_by_hand():
    # log r = 0.5 log(0.36 / 0.4) + 0.5 log(0.36 / 0.324) = 0.5 log(0.36^2 / 0.1296) = 0: r = 1, inside the clip
    loss, gradient, metrics = one_token(0.36, 0.4, 0.324, 2.0)
    assert loss == pytest.approx(-2.0)
    assert gradient == pytest.approx(-2.0)  # d log r / dS = alpha + 1 - alpha = 1
    assert metrics["teacher/log_ratio"] == pytest.approx(math.log(0.36 / 0.324))
    assert metrics["policy_drift"] == pytest.approx(math.log(0.9))


def test_beyond_the_clamp_by_hand():
    # S - T = log 10 > 1 is clamped: log r = 0.3 * 0 + 0.7 * 1, r = e^0.7 = 2.01 > 1.2: clipped for A > 0
    loss, gradient, metrics = one_token(0.5, 0.5, 0.05, 1.0, alpha=0.3)
    assert loss == pytest.approx(-1.2)
    assert gradient == 0
    assert (metrics["teacher/veto_positive"], metrics["teacher/clamped"]) == (1, 1)
    # for A < 0 nothing clips it, and the gradient comes through S - O alone: alpha r |A|
    loss, gradient, metrics = one_token(0.5, 0.5, 0.05, -1.0, alpha=0.3)
    assert loss == pytest.approx(math.exp(0.7))
    assert gradient == pytest.approx(0.3 * math.exp(0.7))
    assert (metrics["teacher/veto_positive"], metrics["teacher/veto_negative"]) == (0, 0)


REGIONS = {
    "ppo_clip": partial(ppo_clip_loss, epsilon_high=0.28, ratio_cap=1.3),
    "drpo": partial(drpo_loss, radius=0.15),
    "spo": partial(spo_loss, radius=0.2),
    "dppo_tv": partial(dppo_loss, radius=0.15),
    "dppo_kl": partial(dppo_loss, radius=0.05, divergence="kl", ratio_cap=1.4),
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_alpha_one_is_the_trust_region_without_a_teacher(region):
    student, old, teacher, advantages, mask = random_batch()
    teacher[0] = -math.inf  # even then
    ours = trrd_loss(student, old, teacher, advantages, mask, alpha=1.0, region=region).loss
    theirs = region(student, old, advantages, mask).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_alpha_zero_is_anchored_to_the_teacher_alone():
    student, old, teacher, advantages, mask = random_batch()
    settings = {"alpha": 0.0, "log_ratio_clip": None}
    ours = trrd_loss(student, old, teacher, advantages, mask, **settings).loss
    torch.testing.assert_close(ours, ppo_clip_loss(student, teacher, advantages, mask).loss)
    assert torch.equal(ours, trrd_loss(student, old + 1, teacher, advantages, mask, **settings).loss)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_without_a_clamp_it_is_the_region_round_the_geometric_mixture(region):
    student, old, teacher, advantages, mask = random_batch()
    ours = trrd_loss(student, old, teacher, advantages, mask, alpha=0.3, log_ratio_clip=None, region=region).loss
    expected = region(student, 0.3 * old + 0.7 * teacher, advantages, mask).loss
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient"),
    [
        # On policy, pi = 0.4, pi_T = 0.9: m = sqrt(0.4 * 0.9) = 0.6, r = 2/3, m (r - 1)^2 = 1/15, radius 0.2.
        # A = 2: -(2 r - 2 / 15 / 0.4) = -1; -r A (1 - (pi - m) / radius) = -4/3 * 2: faster toward the teacher
        (2.0, -1.0, -8 / 3),
        # A = -2: 2 r + 2 / 15 / 0.4 = 5/3; 4/3 * (1 + (pi - m) / radius) = 0: it is 0.2 below the mixture already
        (-2.0, 5 / 3, 0.0),
    ],
)
def test_drpo_round_the_mixture_by_hand(advantage, loss, gradient):
    settings = {"region": partial(drpo_loss, radius=0.2)}
    ours, slope, metrics = one_token(0.4, 0.4, 0.9, advantage, **settings)
    assert ours == pytest.approx(loss)
    assert slope == pytest.approx(gradient, abs=1e-12)
    assert metrics["ratio/mean"] == pytest.approx(2 / 3)
    assert "teacher/veto_positive" not in metrics


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.2}, {"log_ratio_clip": None}, {"log_ratio_clip": 0.5}])
@pytest.mark.parametrize("region", [REGIONS["ppo_clip"], REGIONS["spo"], REGIONS["drpo"]], ids=["clip", "spo", "drpo"])
def test_gradient_against_finite_differences(settings, region):
    student, old, teacher, advantages, mask = random_batch(1)
    if region is REGIONS["drpo"]:  # its mixture depends on S beyond the clamp, where it counts as a constant
        settings = settings | {"log_ratio_clip": None}
    loss = partial(
        trrd_loss, old_logps=old, teacher_logps=teacher, advantages=advantages, mask=mask, region=region, **settings
    )
    assert torch.autograd.gradcheck(lambda x: loss(x).loss, (student,))


def test_first_update_ratio_range_and_vetoes():
    """On policy, with alpha 0.5 and c = 1: r in [0.607, 1.649], and a veto where pi_S / pi_T passes 1.64 (A > 0) or
    pi_T / pi_S passes 1.56 (A < 0), with DAPO's epsilons."""
    student = torch.full((1, 4001), -4.0, dtype=torch.float64, requires_grad=True)
    gap = torch.linspace(-3, 3, 4001, dtype=torch.float64)[None]  # S - T
    for advantage in (1.0, -1.0):
        settings = {"region": partial(ppo_clip_loss, epsilon_high=0.28), "advantages": torch.tensor([[advantage]])}
        output = trrd_loss(student, student.detach(), student.detach() - gap, mask=torch.ones(1, 4001), **settings)
        (gradient,) = torch.autograd.grad(output.loss.sum(), student)
        vetoed = gradient == 0
        veto = output.metrics["teacher/veto_positive" if advantage > 0 else "teacher/veto_negative"]
        assert torch.equal(vetoed, veto.bool())
        edge = gap[vetoed].min() if advantage > 0 else -gap[vetoed].max()
        assert edge.exp().item() == pytest.approx(1.28**2 if advantage > 0 else 0.8**-2, rel=5e-3)  # 1.64, 1.56
    logps = (student, student.detach(), student.detach() - gap)
    region = partial(ppo_clip_loss, epsilon_low=1.0)
    unclipped = trrd_loss(*logps, -torch.ones(1, 1), torch.ones(1, 4001), region=region).loss
    assert unclipped.min().item() == pytest.approx(math.exp(-0.5), rel=1e-6)
    assert unclipped.max().item() == pytest.approx(math.exp(0.5), rel=1e-6)


def test_no_advantage_no_influence_of_the_teacher():
    student, old, teacher, _, mask = random_batch()
    loss = trrd_loss(student, old, teacher, torch.zeros(5, 1), mask).loss
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


def test_a_token_the_teacher_has_no_opinion_of_is_grpos():
    student, old, teacher, advantages, mask = random_batch()
    teacher[:, ::2] = math.nan
    ours = trrd_loss(student, old, teacher, advantages, mask).loss
    grpo = ppo_clip_loss(student, old, advantages, mask).loss
    torch.testing.assert_close(ours[:, ::2], grpo[:, ::2])
    assert (ours[:, 1::2] != grpo[:, 1::2]).any()
    ours.sum().backward()
    assert student.grad.isfinite().all()


HOSTILE = [-math.inf, -1e4, -60.0, -1.0, 0.0, math.nan]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.0}, {}, {"alpha": 1.0}] + [{"region": region} for region in REGIONS.values()],
)
def test_hostile_values_stay_finite(settings, clip, dtype):
    """Every combination of values at once, with both signs of the advantage; and masked tokens beside them."""
    values = itertools.product(HOSTILE[:-1], HOSTILE, HOSTILE, [1.0, -1.0])
    student, old, teacher, advantages = (
        torch.tensor(column, dtype=dtype)[None] for column in zip(*values, strict=True)
    )
    logps = torch.stack([student[0], student[0].where(student[0] != 0, math.nan)]).requires_grad_()
    mask = torch.ones_like(logps)
    mask[1] = 0
    old, teacher, advantages = (tensor.expand(2, -1) for tensor in (old, teacher, advantages))
    output = trrd_loss(logps, old, teacher, advantages, mask, log_ratio_clip=clip, **settings)
    output.loss.sum().backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite().all()
    assert logps.grad.isfinite().all()
    assert not output.loss[1].any()
    assert not logps.grad[1].any()


@pytest.mark.parametrize(
    ("old", "teacher", "advantage", "veto", "clipped"),
    [
        (0.5, 0.05, 1.0, 1, 0),  # the teacher finds the token less likely
        (0.2, 0.45, 1.0, 0, 1),  # the policy has moved from 0.2 to 0.5 itself, and GRPO would clip that too
        (0.2, 0.05, 1.0, 0, 1),
        (0.5, 0.5, 1.0, 0, 0),
        (0.2, 0.05, -1.0, 0, 0),
        (0.5, 0.99, -1.0, 1, 0),
    ],
)
def test_a_veto_is_what_the_teacher_alone_clips(old, teacher, advantage, veto, clipped):
    _, gradient, metrics = one_token(0.5, old, teacher, advantage)
    sign, end = ("positive", "high") if advantage > 0 else ("negative", "low")
    assert (metrics[f"teacher/veto_{sign}"], metrics[f"clip_ratio/{end}_mean"]) == (veto, clipped)
    assert (gradient == 0) == bool(veto + clipped)


# ---- KDRL


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        # S - T = log 2. k2 = log(2)^2 / 2, dk2/dS = S - T; k3 = 1/2 + log 2 - 1, dk3/dS = 1 - e^(T - S) = 1/2
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", math.log(2) - 0.5, 0.5),
    ],
)
def test_penalty_by_hand(estimator, value, gradient):
    logps = torch.tensor([[0.5]], dtype=torch.float64).log().requires_grad_()
    output = kdrl_penalty(logps, torch.tensor([[0.25]]).double().log(), torch.ones(1, 1), estimator=estimator)
    output.loss.sum().backward()
    assert output.loss.item() == pytest.approx(value)
    assert logps.grad.item() == pytest.approx(gradient)
    assert output.metrics["teacher/log_ratio"][0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_expected_gradient_of_the_penalty(estimator):
    """Over the student's own samples: that of the reverse KL for k2, of the forward KL for k3; enumerated exactly."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    penalty = kdrl_penalty(student[None], teacher[None], torch.ones(1, 7), estimator=estimator).loss[0]
    (gradient,) = torch.autograd.grad((student.detach().exp() * penalty).sum(), logits, retain_graph=True)
    if estimator == "k2":
        divergence = (student.exp() * (student - teacher)).sum()
    else:
        divergence = (teacher.exp() * (teacher - student)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("teacher", HOSTILE)
@pytest.mark.parametrize("student", HOSTILE[1:-1])
def test_hostile_penalties_stay_finite(estimator, student, teacher):
    logps = torch.tensor([[student, -1.0, math.nan]], requires_grad=True)
    output = kdrl_penalty(logps, torch.tensor([[teacher, -1.0, -1.0]]), torch.tensor([[1, 1, 0]]), estimator=estimator)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert logps.grad.isfinite().all()
    if math.isfinite(teacher):  # a descent step never leads away from the teacher
        assert logps.grad[0, 0] * (student - teacher) >= 0
    assert output.loss[0, 1:].tolist() == [0, 0]
    if not math.isfinite(teacher):
        assert output.loss[0, 0] == logps.grad[0, 0] == 0


@pytest.mark.parametrize(("step", "expected"), [(0, 5e-3), (2, 4e-3), (8, 1e-3), (100, 1e-3)])
def test_annealed_coefficient(step, expected):
    assert kdrl_coefficient(step, start=5e-3, decay=5e-4, minimum=1e-3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", [True, True, True, True, True, True]),
        ("response", [True, False, True, True, True, True]),
        ("group", [False, False, True, True, True, True]),
    ],
)
def test_reward_guided_mask(mask, expected):
    """Groups of two: one with a correct completion, one with less reward than that, one with none at all."""
    rewards = torch.tensor([0.0, 1.0, 0.9, 0.0, float("nan"), 0.5])
    assert kdrl_mask(rewards, mask, correct_reward=1.0, group_size=2).tolist() == expected
