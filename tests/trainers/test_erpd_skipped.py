"""A set from which nothing can be learned, e.g. of a broken answer parser, does not move the policy."""

import pytest
import tiny
import torch
from tiny_erpd import assert_equal, parameters, right_or_wrong, settings

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.sampling import agreeing_prompts, nothing_to_learn


def constant(completions, **kwargs):
    return [0.0] * len(completions)


def make_trainer(path, output_dir, reward, eval_dataset=None, **overrides):
    """Everything that could move a policy without a signal is on: weight decay, the KL term, an entropy bonus."""
    defaults = {"weight_decay": 0.1, "beta": 0.1, "entropy_coef": 0.1, "prompts_per_round": 4}
    defaults |= {"extraction_passes": 1, "distillation_passes": 1, "per_device_eval_batch_size": 8}
    args = ERPDConfig(**settings(output_dir, **defaults | overrides))
    torch.manual_seed(0)
    return ERPDTrainer(path, reward, args, tiny.prompts(), eval_dataset)


@pytest.mark.parametrize("extraction_loss", ["sapo", "ce", "mse"])
def test_a_constant_reward_does_not_move_the_policy(path, tmp_path, caplog, extraction_loss):
    trainer = make_trainer(
        path, tmp_path, constant, tiny.prompts(2), extraction_loss=extraction_loss, distillation_anchor="pass"
    )
    start = parameters(trainer)
    trainer.train()
    assert_equal(parameters(trainer), start)
    assert trainer.state.global_step == 2 * 2
    expected = (
        "Round 1 is skipped and leaves the policy as it is, because all of its 16 rollouts have the same reward (0): "
        "check the reward function, whose answer parser most likely fails on every completion."
    )
    assert caplog.text.count(expected) == 1
    assert [log["fixed_set/skipped"] for log in trainer.state.log_history if "fixed_set/skipped" in log] == [1]


@pytest.mark.parametrize("skipped", [1, 2])
def test_only_the_round_without_information_is_skipped(path, tmp_path, skipped):
    """Of two rounds; each step can be resumed from."""

    def reward(completions, trainer_state, **kwargs):
        round_number = 1 + (trainer_state.global_step >= 4)
        return constant(completions) if round_number == skipped else right_or_wrong(completions)

    settings = {"rounds": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(path, tmp_path, reward, **settings)
    start = parameters(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert [log["grad_norm"] > 0 for log in logs] == [log["round"] != skipped for log in logs]
    assert [log["loss"] == 0 for log in logs if log["round"] == skipped] == [True] * 4
    assert any(not torch.equal(value, start[name]) for name, value in parameters(trainer).items())
    for step in (2, 4, 6):
        resumed = make_trainer(path, tmp_path / f"from-{step}", reward, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_equal(parameters(resumed), parameters(trainer))


def test_the_scaler_of_fp16_lets_a_round_be_skipped(path, tmp_path):
    """With the scaler that torch has for CPUs. It is in the checkpoints, and scales again in the next round."""
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1000)

    def reward(completions, trainer_state, **kwargs):
        return constant(completions) if trainer_state.global_step < 4 else right_or_wrong(completions)

    trainer = make_trainer(path, tmp_path, reward, rounds=2, save_strategy="steps", save_steps=2)
    trainer.accelerator.scaler = scaler
    start = parameters(trainer)
    trainer.train()
    assert trainer.optimizer.scaler is trainer.accelerator.scaler is scaler
    assert scaler.is_enabled()
    assert scaler.get_scale() == 128.0
    assert any(not torch.equal(value, start[name]) for name, value in parameters(trainer).items())
    saved = [torch.load(tmp_path / f"checkpoint-{step}" / "scaler.pt") for step in (2, 4, 6)]
    assert [state["growth_interval"] for state in saved] == [1000] * 3


def test_rewards_that_are_equal_within_a_prompt_teach_some_objectives(path, tmp_path, caplog):
    """`ce` compares prompts, the other two only the rollouts of a prompt."""

    def by_prompt(prompts, **kwargs):
        return [float("1" in prompt) for prompt in prompts]

    trainer = make_trainer(path, tmp_path, by_prompt, extraction_loss="mse")
    start = parameters(trainer)
    trainer.train()
    assert_equal(parameters(trainer), start)
    assert "the rollouts of every prompt have the same reward, from which mse cannot learn" in caplog.text
    trainer = make_trainer(path, tmp_path, by_prompt, extraction_loss="ce")
    trainer.train()
    assert any(not torch.equal(value, start[name]) for name, value in parameters(trainer).items())


def test_rewards_with_one_sum_and_several_advantages_teach(path, tmp_path):
    """Each completion is right by one of three functions, which are normalized one by one."""

    def kind(number):
        return lambda completions, **kwargs: [float(sum(map(ord, text)) % 3 == number) for text in completions]

    settings = {"extraction_loss": "mse", "multi_objective_aggregation": "normalize_then_sum"}
    trainer = make_trainer(path, tmp_path, [kind(number) for number in range(3)], **settings)
    trainer.train()
    stage_1 = [log for log in trainer.state.log_history if log.get("stage") == 1 and "grad_norm" in log]
    assert stage_1
    assert all(log["loss"] > 0 and log["grad_norm"] > 0 for log in stage_1)


@pytest.mark.parametrize(
    ("rewards", "outcomes", "differ", "losses", "reason"),
    [
        ([torch.nan] * 2, [torch.nan] * 2, False, ["ce"], "none of its rollouts has a reward"),
        ([0.1, torch.nan], [torch.nan] * 2, False, ["ce"], "all of its 1 rollouts have the same reward (0.1)"),
        ([0.0, 1.0], [0.0, 1.0], True, ["mse"], None),
        ([0.0, 1.0], [0.0, 1.0], False, ["sapo", "mse"], "from which sapo and mse cannot learn"),
        ([0.0, 1.0], [0.0, 1.0], False, ["sapo", "ce"], None),
        ([0.0, 1.0], [torch.nan] * 2, False, ["ce"], "from which ce cannot learn"),  # if they are to be left out
        ([1.0, 1.0], [torch.nan] * 2, True, ["mse"], None),  # two functions that differ and have the same sum
    ],
)
def test_why_a_set_teaches_nothing(rewards, outcomes, differ, losses, reason):
    found = nothing_to_learn(torch.tensor(rewards), torch.tensor(outcomes), differ, losses)
    assert found is None if reason is None else reason in found


def test_prompts_agree_in_groups_of_any_size():
    nan = torch.nan
    rewards = torch.tensor([1.0, 0.0, 0.3, nan, 1.0, 0.3, nan, 0.3 + 1e-8])
    prompts = torch.tensor([0, 0, 1, 2, 3, 1, 3, 1])
    assert agreeing_prompts(rewards, prompts).tolist() == [False, True, True, True]
