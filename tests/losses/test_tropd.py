"""The losses of TrOPD and its baselines against values worked out by hand and expectations over a small vocabulary."""

import math

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from trl_ext.losses import (
    OUTLIER_LOSSES,
    eopd_loss,
    forward_kl_loss,
    forward_kl_top_k,
    guidance_loss,
    least_of_top_share,
    longest_prefix,
    off_policy_loss,
    opd_loss,
    reopold_loss,
    tropd_loss,
)


VOCABULARY = 7
ONES = torch.ones(1, VOCABULARY, dtype=torch.float64)


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def every_token(seed=0):
    """
    A student's logits, and its and a teacher's log-probabilities of each token of the vocabulary as "time": a sum over
    time weighed with the student's probabilities is an exact expectation over the sampled token.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)
    return logits, logits.log_softmax(-1), teacher


def expectation(per_token, logps):
    return (per_token * logps.detach().exp()).sum()


def top_k(logps, teacher, k=VOCABULARY):
    """Both sides' log-probabilities of the teacher's most likely tokens, the same at each position."""
    values, ids = teacher.topk(k)
    return logps[ids].expand(1, VOCABULARY, k), values.expand(1, VOCABULARY, k)


def test_opd_by_hand():
    # log(0.5 / 0.25) = log 2 is the loss, and R = -log 2 the weight of the gradient
    logps = logs(0.5, 0.2).requires_grad_()
    token_loss = opd_loss(logps, logs(0.25, 0.4), torch.ones(1, 2))
    torch.testing.assert_close(token_loss.loss, torch.tensor([[math.log(2), -math.log(2)]], dtype=torch.float64))
    token_loss.loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[math.log(2), -math.log(2)]], dtype=torch.float64))


def test_opd_descends_the_reverse_kl():
    logits, logps, teacher = every_token()
    loss = expectation(opd_loss(logps[None], teacher[None], ONES).loss, logps)
    kl = (logps.exp() * (logps - teacher)).sum()
    torch.testing.assert_close(loss, kl)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, kl))
    torch.testing.assert_close(ours, theirs)


def test_the_share_of_outliers_is_the_total_variation():
    _, logps, teacher = every_token()
    shares = tropd_loss(logps[None], teacher[None], ONES, outlier_loss="mask").metrics["outliers/share"]
    total_variation = 0.5 * (logps.exp() - teacher.exp()).abs().sum()
    torch.testing.assert_close(expectation(shares, logps), total_variation.detach())


@pytest.mark.parametrize("outlier_loss", OUTLIER_LOSSES)
def test_draws_have_the_expectation_of_their_probability(outlier_loss):
    logits, logps, teacher = every_token()
    columns = dict(zip(("top_k_logps", "teacher_top_k_logps"), top_k(logps, teacher, 3), strict=True))
    arguments = (logps[None], teacher[None], ONES)
    expected = tropd_loss(*arguments, **columns, outlier_loss=outlier_loss).loss
    # Draws on a fine grid are uniform: their mean is the integral up to the grid's step
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = torch.stack(
        [tropd_loss(*arguments, **columns, draws=u * ONES, outlier_loss=outlier_loss).loss for u in grid]
    )
    assert drawn.var(0).max() > 1e-3  # it really is drawn
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=2e-3)
    ours, theirs = (
        torch.autograd.grad(expectation(loss, logps), logits, retain_graph=True)[0]
        for loss in (drawn.mean(0), expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_tropd_by_hand():
    # Token 1: rho = 0.25 / 0.5 = 1/2, trusted with probability 1/2. Token 2: rho = 2, always trusted.
    # Forward KL of token 1 on two tokens: 0.6 log(0.6 / 0.5) + 0.3 log(0.3 / 0.1).
    columns = {
        "top_k_logps": torch.stack([logs(0.5, 0.2), logs(0.1, 0.2)], dim=-1),
        "teacher_top_k_logps": torch.stack([logs(0.6, 0.4), logs(0.3, 0.1)], dim=-1),
    }
    arguments = (logs(0.5, 0.2), logs(0.25, 0.4), torch.ones(1, 2))
    forward_kl = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.1)

    def first(**settings):
        loss = tropd_loss(*arguments, **columns, **settings).loss
        assert loss[0, 1].item() == pytest.approx(-math.log(2))
        return loss[0, 0].item()

    assert first() == pytest.approx(0.5 * math.log(2) + 0.5 * forward_kl)
    below, above = torch.tensor([[0.49, 0.999]]), torch.tensor([[0.51, 0.999]])
    assert first(draws=below) == pytest.approx(math.log(2))
    assert first(draws=above) == pytest.approx(forward_kl)
    assert first(draws=above, outlier_loss="mask") == 0
    assert first(draws=above, outlier_loss="clip", clip_floor=-0.5) == pytest.approx(0.5)
    assert first(draws=above, outlier_loss="clip", clip_floor=-0.9) == pytest.approx(math.log(2))
    assert first(outlier_loss="clip", clip_floor=-0.5) == pytest.approx(0.5 * math.log(2) + 0.25)
    both = {"outlier_loss": "forward_kl_and_clip", "clip_floor": -0.5}
    assert first(draws=above, **both) == pytest.approx(forward_kl + 0.5)
    assert first(draws=above, clip_coef=0.3, **both) == pytest.approx(forward_kl + 0.3 * 0.5)
    assert first(clip_coef=0.3, **both) == pytest.approx(0.5 * math.log(2) + 0.5 * (forward_kl + 0.3 * 0.5))
    assert first(draws=below, **both) == pytest.approx(math.log(2))


def test_forward_kl_everywhere_by_hand():
    """On a trusted token too, beside its reward."""
    columns = {
        "top_k_logps": torch.stack([logs(0.5, 0.2), logs(0.1, 0.2)], dim=-1),
        "teacher_top_k_logps": torch.stack([logs(0.6, 0.4), logs(0.3, 0.1)], dim=-1),
    }
    arguments = (logs(0.5, 0.2), logs(0.25, 0.4), torch.ones(1, 2))
    settings = {"outlier_loss": "forward_kl_everywhere_and_clip", "clip_floor": -0.5, "clip_coef": 0.3}
    # And what is left as one more token: of 1 - 0.6 - 0.3 and 1 - 0.5 - 0.1, of 1 - 0.4 - 0.1 and 1 - 0.2 - 0.2
    first = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.1) + 0.1 * math.log(0.1 / 0.4)
    second = 0.4 * math.log(0.4 / 0.2) + 0.1 * math.log(0.1 / 0.2) + 0.5 * math.log(0.5 / 0.6)
    token_loss = tropd_loss(*arguments, **columns, **settings)
    expected = [0.5 * math.log(2) + 0.5 * 0.3 * 0.5 + first, -math.log(2) + second]
    assert token_loss.loss[0].tolist() == pytest.approx(expected)
    values, weights = token_loss.metrics["outliers/forward_kl"]  # of the outliers alone
    assert (values[0, 0].item(), weights.tolist()) == (pytest.approx(first), [[0.5, 0.0]])
    alone = forward_kl_loss(*arguments, **columns)
    assert alone.loss[0].tolist() == pytest.approx([first, second])
    assert alone.metrics["teacher/forward_kl"][0].tolist() == pytest.approx([first, second])


def test_the_forward_kl_is_that_of_gkd():
    """With `beta=0`, on the whole vocabulary: values and gradients, of tokens that are masked too."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, 3, 7, VOCABULARY, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 7, generator=generator) > 0.3
    logits.requires_grad_()
    labels = torch.where(mask, 1, -100)
    theirs = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels=labels, beta=0)
    logps, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    loss = forward_kl_loss(
        logps[..., 0], teacher[..., 0], mask, top_k_logps=logps, teacher_top_k_logps=teacher
    ).loss.sum()
    torch.testing.assert_close(loss / mask.sum(), theirs)
    torch.testing.assert_close(
        torch.autograd.grad(loss / mask.sum(), logits)[0], torch.autograd.grad(theirs, logits)[0]
    )


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_the_forward_kl_everywhere_has_the_gradient_of_its_docstring(k):
    """That of the KL divergence between distributions over the top-k and one token that stands for all others."""
    logits, logps, teacher = every_token()
    student_columns, teacher_columns = top_k(logps, teacher, k)
    token_loss = forward_kl_loss(
        logps[None], teacher[None], ONES, top_k_logps=student_columns, teacher_top_k_logps=teacher_columns
    )
    ids = teacher.topk(k).indices

    def merged(logps):
        others = torch.ones(VOCABULARY, dtype=torch.bool)
        others[ids] = False
        probabilities = logps.exp()
        return torch.cat([probabilities[ids], probabilities[others].sum()[None]])[: k + (k < VOCABULARY)]

    p, q = merged(teacher), merged(logps)
    expected = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(token_loss.loss[0, 0], expected)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (token_loss.loss[0, 0], expected))
    torch.testing.assert_close(ours, theirs)


def test_metrics_by_hand():
    columns = {
        "top_k_logps": torch.stack([logs(0.5, 0.2), logs(0.1, 0.2)], dim=-1),
        "teacher_top_k_logps": torch.stack([logs(0.6, 0.4), logs(0.3, 0.1)], dim=-1),
    }
    metrics = tropd_loss(logs(0.5, 0.2), logs(0.25, 0.4), torch.ones(1, 2), **columns).metrics
    torch.testing.assert_close(metrics["teacher/kl"], torch.tensor([[1.0, -1.0]], dtype=torch.float64) * math.log(2))
    torch.testing.assert_close(metrics["outliers/share"], torch.tensor([[0.5, 0.0]], dtype=torch.float64))
    values, weights = metrics["outliers/forward_kl"]
    assert values[0, 0].item() == pytest.approx(0.6 * math.log(1.2) + 0.3 * math.log(3))
    assert weights.tolist() == [[0.5, 0.0]]


def both_terms(logps, teacher, k=VOCABULARY, **settings):
    columns = dict(zip(("top_k_logps", "teacher_top_k_logps"), top_k(logps, teacher, k), strict=True))
    return tropd_loss(logps[None], teacher[None], ONES, **columns, outlier_loss="forward_kl_and_clip", **settings)


@pytest.mark.parametrize("draws", [None, 0.65])
def test_forward_kl_and_clip_has_the_gradient_of_its_docstring(draws):
    """Per sampled token x: M (-R) dS(x) + (1 - M) (-sum_v pi_T(v) dS(v) - c max(R, tau) dS(x)), dS = e_x - pi_S."""
    logits, logps, teacher = every_token()
    k, floor, coef = 3, -0.7, 0.6
    token_loss = both_terms(logps, teacher, k, clip_floor=floor, clip_coef=coef, draws=draws and draws * ONES)
    student, reward = logps.exp().detach(), (teacher - logps).detach()
    trust = reward.clamp(max=0).exp()
    if draws is not None:
        trust = (draws < trust).double()
    assert (reward < floor).any()
    assert ((1 - trust > 0) & (reward > floor)).any()  # both sides of the floor are among the outliers
    top = torch.zeros(VOCABULARY, dtype=torch.float64).scatter(
        0, teacher.topk(k).indices, teacher.topk(k).values.exp()
    )
    for x in range(VOCABULARY):
        score = torch.eye(VOCABULARY, dtype=torch.float64)[x] - student
        outlier = -(top - top.sum() * student) - coef * max(reward[x], floor) * score
        (gradient,) = torch.autograd.grad(token_loss.loss[0, x], logits, retain_graph=True)
        torch.testing.assert_close(gradient, trust[x] * -reward[x] * score + (1 - trust[x]) * outlier)


def test_forward_kl_and_clip_descends_both_divergences():
    """Finite differences. Without a floor and with c = 1 it is OPD with the outliers' mass times the forward KL."""
    logits, logps, teacher = every_token()
    loss = expectation(both_terms(logps, teacher, clip_floor=-20.0).loss, logps)
    (gradient,) = torch.autograd.grad(loss, logits)
    mass = (logps.exp() - teacher.exp()).clamp(min=0).sum().detach()  # the total variation, held constant

    def objective(z):
        logps = z.log_softmax(-1)
        return (logps.exp() * (logps - teacher)).sum() + mass * (teacher.exp() * (teacher - logps)).sum()

    torch.testing.assert_close(loss, objective(logits.detach()))
    step = 1e-6
    for i, basis in enumerate(torch.eye(VOCABULARY, dtype=torch.float64) * step):
        slope = (objective(logits.detach() + basis) - objective(logits.detach() - basis)) / (2 * step)
        assert gradient[i].item() == pytest.approx(slope.item(), abs=1e-8)


def test_the_expected_reward_below_the_floor():
    """e^R R + (1 - e^R) tau, as the docstring says; above the floor it is R."""
    _, logps, teacher = every_token()
    floor, reward = -0.4, (teacher - logps).detach()
    token_loss = both_terms(logps, teacher, clip_floor=floor)
    forward_kl, outlier = token_loss.metrics["outliers/forward_kl"]
    policy_part = (token_loss.loss - outlier * forward_kl)[0]
    below = reward.exp() * reward + (1 - reward.exp()) * floor
    torch.testing.assert_close(policy_part.detach(), -torch.where(reward < floor, below, reward))
    clipped, weights = token_loss.metrics["outliers/clipped_share"]
    assert clipped[0].bool().equal(reward < floor)
    torch.testing.assert_close(weights, outlier)


def test_a_forward_kl_asks_for_its_columns():
    with pytest.raises(ValueError, match="needs top_k_logps and teacher_top_k_logps"):
        tropd_loss(logs(0.5), logs(0.25), torch.ones(1, 1), outlier_loss="forward_kl_and_clip")


@pytest.mark.parametrize("outlier_loss", OUTLIER_LOSSES)
@pytest.mark.parametrize("sampled", [True, False])
def test_a_student_equal_to_its_teacher_stays(outlier_loss, sampled):
    logits, logps, _ = every_token()
    teacher = logps.detach()
    columns = dict(zip(("top_k_logps", "teacher_top_k_logps"), top_k(logps, teacher, 4), strict=True))
    draws = 0.9999 * ONES if sampled else None
    token_loss = tropd_loss(logps[None], teacher[None], ONES, **columns, draws=draws, outlier_loss=outlier_loss)
    (gradient,) = torch.autograd.grad(token_loss.loss.sum(), logits)
    assert token_loss.loss.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_the_forward_kl_has_the_gradient_of_full_logits():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    values, ids = teacher.topk(4)
    loss = forward_kl_top_k(logits.log_softmax(-1).gather(-1, ids), values)
    (ours,) = torch.autograd.grad(loss.sum(), logits)
    q = torch.zeros_like(teacher).scatter(-1, ids, values.exp())  # the teacher on V_k, not renormalised
    # d/dz of -sum_v q_v log softmax(z)_v is (sum_v q_v) softmax(z) - q
    torch.testing.assert_close(ours, q.sum(-1, keepdim=True) * logits.softmax(-1).detach() - q)
    full = torch.nn.functional.kl_div(logits.log_softmax(-1), q, reduction="none").sum(-1)
    torch.testing.assert_close(loss, full)


def test_the_forward_kl_is_differentiated():
    """As a detached reward of the sampled token its expected gradient would be zero."""
    logits, logps, teacher = every_token()
    columns = dict(zip(("top_k_logps", "teacher_top_k_logps"), top_k(logps, teacher), strict=True))
    outliers = 0.9999 * ONES  # every token that can be one
    with_kl = tropd_loss(logps[None], teacher[None], ONES, **columns, draws=outliers)
    without = tropd_loss(logps[None], teacher[None], ONES, draws=outliers, outlier_loss="mask")
    difference = expectation(with_kl.loss - without.loss, logps)
    (gradient,) = torch.autograd.grad(difference, logits)
    outlier_mass = logps.exp()[teacher < logps].sum().detach()
    torch.testing.assert_close(gradient, outlier_mass * (logps.exp() - teacher.exp()).detach())


def test_only_outliers_have_a_forward_kl():
    columns = torch.randn(1, 3, 4, dtype=torch.float64).log_softmax(-1).requires_grad_()
    teacher = torch.randn(1, 3, 4, dtype=torch.float64).log_softmax(-1)
    logps, teacher_logps = logs(0.5, 0.2, 0.5), logs(0.25, 0.4, 0.1)
    draws = torch.tensor([[0.4, 0.4, 0.4]])  # only the third is drawn as an outlier: 0.1 / 0.5 = 0.2
    loss = tropd_loss(
        logps, teacher_logps, torch.ones(1, 3), top_k_logps=columns, teacher_top_k_logps=teacher, draws=draws
    ).loss
    loss.sum().backward()
    assert columns.grad[0, :2].abs().max() == 0
    torch.testing.assert_close(columns.grad[0, 2], -teacher[0, 2].exp())


@pytest.mark.parametrize("loss", ["forward_kl_everywhere_and_clip", "forward_kl"])
def test_a_teacher_that_ends_otherwise_does_not_unlearn_the_students_end(loss):
    """
    The student ends with token 0 and the teacher with 1, and they agree on all else: without both ends among the
    likeliest tokens, the expected gradient moves neither.
    """
    logits = torch.tensor([0.95, 1e-6, 0.02, 0.02, 0.01 - 1e-6], dtype=torch.float64).log().requires_grad_()
    logps = logits.log_softmax(-1)[None]
    teacher = logps.detach()[:, [1, 0, 2, 3, 4]]
    top_k = teacher.clone()
    top_k[:, :2] = -torch.inf  # as TeacherMixin.without_ends
    sampled = teacher.clone()
    sampled[:, 0] = torch.nan  # as TeacherMixin.without_foreign_ends
    everywhere = [values.unsqueeze(1).expand(1, 5, 5) for values in (logps, top_k)]
    settings = {"top_k_logps": everywhere[0], "teacher_top_k_logps": everywhere[1], "draws": None}
    per_token = tropd_loss(logps, sampled, torch.ones_like(logps), outlier_loss=loss, **settings).loss
    (logps.detach().exp() * per_token).sum().backward()
    assert logits.grad.abs().max() < 1e-4


@pytest.mark.parametrize("k", [2, VOCABULARY])
def test_off_policy_a_student_equal_to_its_teacher_stays(k):
    logits, logps, _ = every_token()
    likeliest = logps.topk(k).values[None, None]
    off_policy_loss(likeliest, likeliest.detach(), torch.ones(1, 1)).loss.sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_eopd_by_hand():
    columns = torch.stack([logs(0.5, 0.5), logs(0.1, 0.1)], dim=-1)
    teacher = torch.stack([logs(0.6, 0.6), logs(0.2, 0.2)], dim=-1)  # renormalised: 0.75 and 0.25
    token_loss = eopd_loss(
        logs(0.5, 0.5),
        logs(0.25, 0.25),
        torch.ones(1, 2),
        top_k_logps=columns,
        teacher_top_k_logps=teacher,
        teacher_entropy=torch.tensor([[0.79, 0.81]]),
    )
    forward_kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.1)
    expected = torch.tensor([[math.log(2), math.log(2) + forward_kl]], dtype=torch.float64)
    torch.testing.assert_close(token_loss.loss, expected)
    assert token_loss.metrics["uncertain/share"].tolist() == [[0, 1]]


def test_reopold_by_hand():
    # R = log(0.05 / 0.5) = -2.30, floored at -1.72; log(0.25 / 0.5) = -0.69 is not
    arguments = (logs(0.5, 0.5, 0.5, 0.2, 0.5), logs(0.05, 0.25, 0.05, 0.4, 0.05))
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    first = reopold_loss(*arguments, mask)
    expected = torch.tensor([[1.72, math.log(2), 1.72, -math.log(2), 0]], dtype=torch.float64)
    torch.testing.assert_close(first.loss, expected)
    assert first.metrics["floored/share"].tolist() == [[1, 0, 1, 0, 0]]
    # The two least certain of four: a share of a half, the masked token's entropy not among them
    nan = float("nan")
    entropy = torch.tensor([[0.1, 0.9, 0.3, 0.5, nan]])
    second = reopold_loss(*arguments, mask, uncertain=entropy >= least_of_top_share(entropy, 0.5))
    torch.testing.assert_close(second.loss, expected * torch.tensor([[0, 1, 0, 1, 0]]))


def test_guidance_schedules():
    # Eq. 8: L(s) = 100 (1 + cos(pi s / 10)) / 2 for s = 0, 2.5, 5, 10
    assert [longest_prefix(s, 20, 100, "cosine") for s in (0, 5, 10, 20)] == [100, 85, 50, 0]
    assert [longest_prefix(s, 20, 100, "linear") for s in (0, 5, 10, 20)] == [100, 75, 50, 0]
    assert [longest_prefix(s, 20, 100, "constant") for s in (0, 20)] == [100, 100]
    assert longest_prefix(30, 20, 100) == 0  # a run that continues after its planned end


def test_guidance_by_hand():
    # -0.1 log 0.5 with the gradient -0.1, on the teacher's token alone
    logps = logs(0.5, 0.2).requires_grad_()
    loss = guidance_loss(logps, torch.tensor([[1, 0]]), coef=0.1).loss
    torch.testing.assert_close(loss, torch.tensor([[0.1 * math.log(2), 0]], dtype=torch.float64))
    loss.sum().backward()
    assert logps.grad.tolist() == [[-0.1, 0]]


def test_off_policy_by_hand():
    # 0.6 log(0.6 / 0.5) + 0.3 log(0.3 / 0.1) and, for all other tokens, 0.1 log(0.1 / 0.4), on the first token alone;
    # with the gradients -0.6 + 0.1 * 0.5 / 0.4 and -0.3 + 0.1 * 0.1 / 0.4
    columns = torch.stack([logs(0.5, 0.2), logs(0.1, 0.2)], dim=-1).requires_grad_()
    teacher = torch.stack([logs(0.6, 0.4), logs(0.3, 0.1)], dim=-1)
    token_loss = off_policy_loss(columns, teacher, torch.tensor([[1, 0]]))
    expected = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.1) + 0.1 * math.log(0.1 / 0.4)
    torch.testing.assert_close(token_loss.loss, torch.tensor([[expected, 0]], dtype=torch.float64))
    torch.testing.assert_close(token_loss.metrics["off_policy/forward_kl"], token_loss.loss)
    token_loss.loss.sum().backward()
    torch.testing.assert_close(columns.grad[0], torch.tensor([[-0.475, -0.275], [0, 0]], dtype=torch.float64))


def test_terms_of_others_tokens_with_hostile_values():
    infinity, nan = float("inf"), float("nan")
    columns = torch.tensor([[[-1.0, -300.0], [-1.0, -2.0], [nan, -infinity]]], requires_grad=True)
    teacher = torch.tensor([[[-0.1, -infinity], [-0.1, nan], [nan, nan]]])
    mask = torch.tensor([[1, 1, 0]])
    loss = off_policy_loss(columns, teacher, mask).loss + guidance_loss(columns[..., 0], mask).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert loss[0, 2] == 0
    assert columns.grad.isfinite().all()
    assert (columns.grad[0, 2] == 0).all()


def every_loss():
    def tropd(**settings):
        return lambda s, t, m, c, tc: tropd_loss(s, t, m, top_k_logps=c, teacher_top_k_logps=tc, **settings)

    return {
        "tropd": tropd(),
        "tropd sampled": tropd(draws=torch.full((1, 4), 0.5)),
        "tropd clip": tropd(outlier_loss="clip"),
        "tropd both": tropd(outlier_loss="forward_kl_and_clip"),
        "tropd both sampled": tropd(outlier_loss="forward_kl_and_clip", draws=torch.full((1, 4), 0.5)),
        "tropd everywhere": tropd(outlier_loss="forward_kl_everywhere_and_clip", draws=torch.full((1, 4), 0.5)),
        "forward kl": lambda s, t, m, c, tc: forward_kl_loss(s, t, m, top_k_logps=c, teacher_top_k_logps=tc),
        "opd": lambda s, t, m, c, tc: opd_loss(s, t, m),
        "eopd": lambda s, t, m, c, tc: eopd_loss(
            s, t, m, top_k_logps=c, teacher_top_k_logps=tc, teacher_entropy=torch.ones(1, 4)
        ),
        "reopold": lambda s, t, m, c, tc: reopold_loss(s, t, m, uncertain=torch.tensor([[True, False, True, True]])),
    }


@pytest.mark.parametrize("name", every_loss())
def test_hostile_values(name):
    """Impossible and unscored tokens, and masked nonsense, leave a finite loss and gradient."""
    infinity, nan = float("inf"), float("nan")
    logps = torch.tensor([[-infinity, -1.0, -200.0, nan]], requires_grad=True)
    teacher = torch.tensor([[-1.0, -infinity, nan, nan]])
    columns = torch.tensor([[[-1.0, -300.0], [-1.0, -2.0], [-1.0, -2.0], [nan, -infinity]]], requires_grad=True)
    teacher_columns = torch.tensor([[[-0.1, -9.0], [-0.1, -infinity], [-0.1, nan], [nan, nan]]])
    loss = every_loss()[name](logps, teacher, torch.tensor([[1, 1, 1, 0]]), columns, teacher_columns).loss
    loss.sum().backward()
    assert (logps.grad is None) == (name == "forward kl")
    gradient = torch.zeros(1, 4) if logps.grad is None else logps.grad
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert columns.grad is None or columns.grad[:, :3].isfinite().all()
    assert loss[0, 3] == 0
    assert gradient[0, 3] == 0
    assert columns.grad is None or columns.grad[0, 3].abs().sum() == 0
    assert loss[0, 2] == 0  # a token without a teacher score


@pytest.mark.parametrize("name", every_loss())
def test_nothing_to_train_on(name):
    logps = torch.randn(1, 4).requires_grad_()
    columns = torch.randn(1, 4, 2).requires_grad_()
    arguments = (logps, torch.randn(1, 4), torch.zeros(1, 4), columns, torch.randn(1, 4, 2))
    loss = every_loss()[name](*arguments).loss
    loss.sum().backward()
    assert loss.abs().sum() == 0
    assert all(x.grad is None or x.grad.abs().sum() == 0 for x in (logps, columns))


def test_a_nan_of_the_student_is_not_hidden():
    assert opd_loss(torch.tensor([[float("nan")]]), torch.zeros(1, 1), torch.ones(1, 1)).loss.isnan().all()


@pytest.mark.parametrize("name", every_loss())
def test_half_precision_is_computed_in_single(name):
    inputs = [torch.randn(1, 4).sub(2), torch.randn(1, 4).sub(2), torch.ones(1, 4)]
    inputs += [torch.randn(1, 4, 3).log_softmax(-1), torch.randn(1, 4, 3).log_softmax(-1)]
    torch.manual_seed(0)
    single = every_loss()[name](*(x.bfloat16().float() for x in inputs)).loss
    torch.manual_seed(0)
    half = every_loss()[name](*(x.bfloat16() for x in inputs)).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single)
