"""TokenMetrics against means, minima and maxima worked out by hand, and NaN where there is nothing."""

import math

import pytest
import torch

from trl_ext.metrics import TokenMetrics


class Processes:
    """An accelerator whose `gather` returns what every process would give it."""

    def __init__(self, *others):
        self.others = others

    def gather(self, tensor):
        return torch.cat([tensor, *self.others])


def test_every_token_weighs_the_same():
    metrics = TokenMetrics()
    values = torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    metrics.update({"x": values, "x/min": values, "x/max": values}, torch.tensor([[1, 1], [1, 0]]))
    metrics.update({"x": values[:1], "x/min": -values[:1], "x/max": -values[:1]}, torch.tensor([[1, 0]]))
    metrics.reduce(Processes())
    assert metrics.pop() == {"x": (1 + 2 + 3 + 1) / 4, "x/min": -1.0, "x/max": 3.0}
    assert metrics.pop() == {}


def test_steps_and_processes():
    metrics = TokenMetrics()
    metrics.update({"x/max": torch.tensor([[5.0]]), "y": torch.tensor([[1.0]])}, torch.ones(1, 1))
    # another process: maximum 7 of one token, sum 6 of three tokens
    metrics.reduce(Processes(torch.tensor([[[7.0, 1.0], [6.0, 3.0]]])))
    metrics.update({"x/max": torch.tensor([[2.0]]), "y": torch.tensor([[3.0]])}, torch.ones(1, 1))
    metrics.reduce(Processes(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])))
    assert metrics.pop() == {"x/max": 7.0, "y": (1 + 6 + 3) / 5}


def test_sequences_without_a_value_do_not_count():
    metrics = TokenMetrics()
    sequences = torch.tensor([0.25, math.nan, 0.75])
    metrics.update({"s": sequences, "s_min": sequences}, torch.ones(3, 2))
    metrics.reduce(Processes())
    assert metrics.pop() == {"s": 0.5, "s_min": 0.25}


def test_nothing_to_count_is_nan_and_not_infinity():
    metrics = TokenMetrics()
    metrics.update({"x": torch.ones(2, 2), "x/max": torch.ones(2, 2)}, torch.zeros(2, 2))
    metrics.reduce(Processes())
    assert all(math.isnan(value) for value in metrics.pop().values())


def test_what_has_no_weight_may_be_infinite():
    metrics = TokenMetrics()
    values, weights = torch.tensor([[2.0, torch.inf]]), torch.tensor([[1.0, 0.0]])
    metrics.update({"pair": (values, weights)}, torch.ones(1, 2))
    metrics.reduce(Processes())
    assert metrics.pop() == {"pair": 2.0}


def test_masked_infinities_do_not_leak():
    metrics = TokenMetrics()
    values = torch.tensor([[1.0, math.inf, math.nan]])
    metrics.update({"x": values, "x/max": values}, torch.tensor([[1, 0, 0]]))
    metrics.reduce(Processes())
    assert metrics.pop() == pytest.approx({"x": 1.0, "x/max": 1.0})
