"""PPO's clip by hand; its parity with TRL is tested in tests/contract."""

import pytest
import torch

from trl_ext.losses import ppo_clip_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: the plain surrogate
        (1.5, 2.0, -2.6, 0.0),  # clipped at 1 + 0.3
        (0.5, 2.0, -1.0, -1.0),  # coming back is not clipped
        (0.5, -2.0, 1.6, 0.0),  # clipped at 1 - 0.2
        (1.5, -2.0, 3.0, 3.0),
        (9.0, -2.0, 8.0, 0.0),  # the second side: ratio capped at 4
        (9.0, 0.0, 0.0, 0.0),
    ],
)
def test_by_hand(ratio, advantage, loss, gradient):
    logps = torch.tensor([[ratio]], dtype=torch.float64).log().sub(1.0).requires_grad_()
    behaviour, advantages = torch.full((1, 1), -1.0, dtype=torch.float64), torch.full((1, 1), advantage)
    output = ppo_clip_loss(
        logps, behaviour, advantages, torch.ones(1, 1), epsilon_low=0.2, epsilon_high=0.3, ratio_cap=4.0
    )
    output.loss.sum().backward()
    assert output.loss.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(gradient)


def test_clip_metrics_count_only_clips_that_act():
    logps = torch.tensor([[1.5, 0.5, 1.0, 1.5], [0.5, 0.5, 1.5, 1.0], [1.0, 1.0, 1.0, 1.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    advantages = torch.tensor([[1.0], [-1.0], [1.0]])
    metrics = ppo_clip_loss(logps, torch.zeros(3, 4), advantages, mask).metrics
    assert metrics["clip_ratio/high_mean"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert metrics["clip_ratio/low_mean"].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert metrics["clip_ratio/low_min"][:2].tolist() == [0, 0.5]
    assert metrics["clip_ratio/low_min"][2].isnan()
