"""What can only be seen to be wrong in a run: rewards, rollouts, checkpoints, and losses of one's own."""

import pytest
import tiny
import torch
from trl import GRPOConfig
from wrong import assert_clear, construct

from trl_ext import DRPOConfig, DRPOTrainer, PolicyLossTrainer


def train(tmp_path, reward=tiny.digits_reward, trainer_class=DRPOTrainer, resume=None, **arguments):
    config_class = DRPOConfig if trainer_class is DRPOTrainer else GRPOConfig
    args = config_class(**tiny.grpo_settings(tmp_path, max_steps=1))
    trainer = trainer_class(
        tiny.policy(), reward, args, tiny.prompts(), processing_class=tiny.tokenizer(), **arguments
    )
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (lambda n: 0.5, "one number, or None, per completion .*: return a flat list of numbers"),
        (lambda n: None, "return a flat list of numbers"),
        (lambda n: ["good"] * n, "return a flat list of numbers"),
        (lambda n: [[1.0, 2.0]] * n, "return a flat list of numbers"),
        (lambda n: torch.ones(n, 2), "return a flat list of numbers"),
        (lambda n: [1.0], "returned 1 rewards, but 8 were expected"),
        (lambda n: [], "returned 0 rewards, but 8 were expected"),
    ],
)
def test_wrong_rewards(tmp_path, rewards, message):
    def reward(completions, **kwargs):
        return rewards(len(completions))

    assert_clear(lambda: train(tmp_path, reward), message)


def test_an_error_within_a_reward_function_is_the_users_own(tmp_path):
    def reward(completions, **kwargs):
        return [float("not a number") for _ in completions]

    with pytest.raises(ValueError, match="could not convert string to float"):
        train(tmp_path, reward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output["logprobs"][0].pop(), "differ in length: return one log-probability per token"),
        (lambda output: output.pop("completion_ids"), "completion_ids"),
    ],
)
def test_wrong_rollouts(tmp_path, change, message):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        change(output)
        return output

    assert_clear(lambda: train(tmp_path, rollout_func=rollout), message)


@pytest.mark.parametrize("method", ["drpo", "rlad", "tropd", "erpd"])
@pytest.mark.parametrize("resume", [True, "no-such-folder"])
def test_nothing_to_resume_from(tmp_path, method, resume):
    settings = {"output_dir": str(tmp_path / "run")}
    teacher = {"teacher_model": tiny.policy(seed=1)} if method in ("rlad", "tropd") else {}
    trainer = construct(method, model=tiny.policy(), processing_class=tiny.tokenizer(), settings=settings, **teacher)
    message = "train from the start" if resume is True else "there is no such folder: name another checkpoint"
    assert_clear(lambda: trainer.train(resume_from_checkpoint=resume), message)


def test_no_loss(tmp_path):
    with pytest.raises(NotImplementedError, match=r"must define policy_loss\(\)"):
        train(tmp_path, trainer_class=PolicyLossTrainer)
