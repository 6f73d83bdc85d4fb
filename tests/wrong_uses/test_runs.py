"""Wrong uses that only a run can show: rewards, rollouts, checkpoints, and losses of one's own."""

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


WRONG_REWARDS = {  # for 8 completions
    "a number": (0.5, "one number, or None, per completion .*: return a flat list of numbers"),
    "nothing": (None, "return a flat list of numbers"),
    "words": (["good"] * 8, "return a flat list of numbers"),
    "pairs": ([[1.0, 2.0]] * 8, "return a flat list of numbers"),
    "a matrix": (torch.ones(8, 2), "return a flat list of numbers"),
    "too few": ([1.0], "returned 1 rewards, but 8 were expected"),
    "none": ([], "returned 0 rewards, but 8 were expected"),
}


@pytest.mark.parametrize(("rewards", "message"), WRONG_REWARDS.values(), ids=WRONG_REWARDS)
def test_wrong_rewards(tmp_path, rewards, message):
    def reward(completions, **kwargs):
        assert len(completions) == 8
        return rewards

    assert_clear(lambda: train(tmp_path, reward), message)


def test_an_error_within_a_reward_function_is_the_users_own(tmp_path):
    def reward(completions, **kwargs):
        return [float("not a number") for _ in completions]

    with pytest.raises(ValueError, match="could not convert string to float"):
        train(tmp_path, reward)
    script = compile("def reward(completions, **kwargs): return int('x')", "grpo_trainer.py", "exec")
    exec(script, functions := {})
    with pytest.raises(ValueError, match="invalid literal"):
        train(tmp_path, functions["reward"])


def rollout_with_turns(prompts, trainer):
    return {**tiny.rollout(prompts, trainer), "turns": [1] * len(prompts)}


def test_a_reward_that_cannot_be_called_is_told_what_it_lacks(tmp_path):
    """With what only a run brings: here another output of the `rollout_func`."""

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        return [0.0] * len(completions)

    def with_lengths(completions, lengths, **kwargs):
        return lengths

    message = r"could not be called \(.*'turns'.*\): give it \*\*kwargs"
    assert_clear(lambda: train(tmp_path, reward, rollout_func=rollout_with_turns), message)
    train(tmp_path, lambda completions, turns, **kwargs: turns, rollout_func=rollout_with_turns)


def without_the_last_score(output):
    output["logprobs"][0].pop()


def without_tokens(output):
    del output["completion_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_last_score, "differ in length: return one log-probability per token"),
        (without_tokens, "completion_ids"),
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


def test_log_probabilities_of_ones_own_must_come_from_ours(tmp_path):
    """Else GRPO's own loss would be trained on without a word."""

    class Own(DRPOTrainer):
        def _get_per_token_logps_and_entropies(
            self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        ):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
            logps = logits.log_softmax(-1).gather(2, input_ids[:, -logits_to_keep:, None]).squeeze(2)
            return logps, torch.zeros_like(logps), None

    args = DRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=1))
    trainer = Own(tiny.policy(), tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer())
    with pytest.raises(RuntimeError, match=r"Own replaces .*: call super\(\)"):
        trainer.train()


def test_no_loss(tmp_path):
    with pytest.raises(NotImplementedError, match=r"must define policy_loss\(\)"):
        train(tmp_path, trainer_class=PolicyLossTrainer)
