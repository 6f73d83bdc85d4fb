"""What the tests of ERPD have in common: runs of a few seconds."""

import tiny
import torch


def right_or_wrong(completions, **kwargs):
    """1 for a completion with a digit among its first three characters: about half of a random policy's."""
    return [float(any(c.isdigit() for c in text[:3])) for text in completions]


def settings(tmp_path, **overrides):
    """8 prompts, 4 rollouts each, 8 rollouts an update: 4 updates a pass, and 2 passes in both stages."""
    defaults = {"num_iterations": 1, "max_steps": -1, "prompts_per_round": 8}
    defaults |= {"extraction_passes": 2, "distillation_passes": 2, "extraction_loss": "ce", "signal": "teacher"}
    defaults |= {"distillation_epsilon": None, "distillation_epsilon_high": None}  # those of GRPO
    return tiny.grpo_settings(tmp_path, **defaults | overrides)


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name
