"""ERPD from rollouts that are stored in the dataset: nothing is generated, the result is that of sampling them."""

import pytest
import tiny
import torch
from datasets import Dataset
from tiny_erpd import assert_equal, parameters, right_or_wrong, settings

from trl_ext import ERPDConfig, ERPDTrainer, TrainingDiagnosticsCallback
from trl_ext.erpd.stored_rollouts import group_advantages, has_stored_rollouts, read_stored_rollouts


def from_stored(path, output_dir, rows, reward_funcs=None, eval_dataset=None, **overrides):
    defaults = {"prompts_per_round": None, "extraction_passes": 1, "distillation_passes": 1}
    args = ERPDConfig(**settings(output_dir, **defaults | overrides))
    torch.manual_seed(0)
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return ERPDTrainer(path, reward_funcs, args, dataset, eval_dataset)


def sampled(path, output_dir, reward=right_or_wrong, prompts=None, **overrides):
    """A run that samples, and its rollouts as one would store them."""
    rows = []

    def judge(prompts, completions, completion_ids, **kwargs):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        rewards = reward(texts)
        # With special tokens: a completion that was not truncated ends with <eos>
        written = tiny.tokenizer().batch_decode(completion_ids)
        if not isinstance(completions[0], str):
            written = [[{"role": "assistant", "content": text}] for text in written]
        for prompt, text, r in zip(prompts, written, rewards, strict=True):
            rows.append({"prompt": prompt, "completion": text, "reward": r})
        return rewards

    defaults = {"extraction_passes": 1, "distillation_passes": 1}
    args = ERPDConfig(**settings(output_dir, **defaults | overrides))
    torch.manual_seed(0)
    trainer = ERPDTrainer(path, judge, args, tiny.prompts() if prompts is None else prompts)
    trainer.train()
    return trainer, rows


@pytest.fixture(scope="module")
def text(path, tmp_path_factory):
    return sampled(path, tmp_path_factory.mktemp("text"), extraction_loss=["ce", "mse"])


def test_the_result_is_that_of_sampling_the_same_rollouts(path, tmp_path, text):
    trainer, rows = text
    stored = from_stored(path, tmp_path, rows, extraction_loss=["ce", "mse"])
    stored.train()
    assert_equal(parameters(stored), parameters(trainer))
    log = next(log for log in stored.state.log_history if "fixed_set/prompts" in log)
    assert (log["fixed_set/prompts"], log["fixed_set/rollouts"]) == (8, 32)
    assert log["base/set_cross_entropy"] == pytest.approx(log["base/set_entropy"], abs=0.3)  # its own samples


def test_lists_of_rollouts_are_the_same_as_rows(path, tmp_path, text):
    trainer, rows = text
    groups = {}
    for row in rows:
        group = groups.setdefault(row["prompt"], {"prompt": row["prompt"], "completions": [], "rewards": []})
        group["completions"].append(row["completion"])
        group["rewards"].append(row["reward"])
    stored = from_stored(path, tmp_path, list(groups.values()), extraction_loss=["ce", "mse"])
    stored.train()
    assert_equal(parameters(stored), parameters(trainer))


def test_conversations_are_the_same_as_when_they_are_sampled(path, tmp_path):
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+1"}]} for i in range(8)])
    trainer, rows = sampled(path, tmp_path, prompts=prompts)
    stored = from_stored(path, tmp_path, rows)
    stored.train()
    assert_equal(parameters(stored), parameters(trainer))


def test_nothing_is_generated(path, tmp_path, text, monkeypatch):
    def generate(*args, **kwargs):
        raise AssertionError("generated")

    monkeypatch.setattr(ERPDTrainer, "_generate", generate)
    from_stored(path, tmp_path, text[1]).train()


def test_resuming_is_exact(path, tmp_path, text):
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = from_stored(path, tmp_path, text[1], **saving)
    whole.train()
    resumed = from_stored(path, tmp_path / "resumed", text[1], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(parameters(resumed), parameters(whole))


def test_held_out_prompts_are_sampled(path, tmp_path, text):
    trainer = from_stored(
        path, tmp_path, text[1], right_or_wrong, tiny.prompts(2), per_device_eval_batch_size=8, log_completions=True
    )
    trainer.train()
    assert any("distilled/reward" in log for log in trainer.state.log_history)


# ---- what is made of the rows


def tokens(rollouts):
    return [row["completion_ids"].tolist() for row in rollouts.chunks[0]]


def test_groups_of_unequal_size_and_unknown_rewards(path, tmp_path):
    """Wherever in the dataset a prompt's rollouts are."""
    rewards = [("1=", 1.0), ("2=", 0.0), ("1=", 0.0), ("3=", 1.0), ("2=", None), ("1=", 0.0), ("2=", 1.0), ("4=", 0.0)]
    rows = [{"prompt": prompt, "completion": "12", "reward": reward} for prompt, reward in rewards]
    rollouts = read_stored_rollouts(from_stored(path, tmp_path, rows)._host)
    assert rollouts.prompts.tolist() == [0, 1, 0, 2, 1, 0, 1, 3]
    advantages = [row["advantages"].item() for row in rollouts.chunks[0]]
    # 1, 0, 0: mean 1/3, deviation sqrt((4 + 1 + 1) / 9 / 2) = 0.57735; 0, 1: mean 1/2, deviation 0.70711
    expected = [1.15450, -0.70701, -0.57725, 0.0, 0.0, -0.57725, 0.70701, 0.0]
    assert advantages == pytest.approx(expected, abs=1e-4)
    assert [row["rewards"].isnan().item() for row in rollouts.chunks[0]] == [i == 4 for i in range(8)]


@pytest.mark.parametrize(
    ("scale_rewards", "expected"),
    [
        ("none", [0.5, -0.5, 0.0, 2.0, -2.0]),
        # Of all five: mean 1.64, squares 0.1296 + 0.4096 + 0.1936 + 5.5696 + 2.6896 = 8.992 over 4, root 1.49933
        ("batch", [0.5 / 1.49933, -0.5 / 1.49933, 0.0, 2.0 / 1.49933, -2.0 / 1.49933]),
    ],
)
def test_advantages_as_grpo_scales_them(scale_rewards, expected):
    rewards, prompts = torch.tensor([2.0, 1.0, 1.2, 4.0, 0.0]), torch.tensor([0, 0, 1, 2, 2])
    assert group_advantages(rewards, prompts, scale_rewards).tolist() == pytest.approx(expected, abs=1e-3)


def test_where_a_completion_ends(path, tmp_path):
    """At <eos>, which is added where the completion was not truncated; `1` is token 4, and so on."""
    rows = [
        {"completion": "12", "logprobs": None},
        {"completion": "12<eos>", "logprobs": None},
        {"completion": "", "logprobs": None},
        {"completion": "1" * 10, "logprobs": None},  # max_completion_length
        {"completion": "1" * 12, "logprobs": None},
        {"completion": "12", "logprobs": [-1.0, -2.0]},  # truncated, say these
        {"completion": "12", "logprobs": [-1.0, None, -3.0]},
        {"completion": "12", "logprobs": [-1.0]},
    ]
    rows = [{"prompt": "1=", "reward": float(i % 2), **row} for i, row in enumerate(rows)]
    rollouts = read_stored_rollouts(from_stored(path, tmp_path, rows)._host)
    assert tokens(rollouts) == [[4, 5, 1], [4, 5, 1], [1], [4] * 10, [4] * 10, [4, 5], [4, 5, 1], [4, 5, 1]]
    logps = [row["sampling_per_token_logps"].nan_to_num(9).tolist() for row in rollouts.chunks[0][5:]]
    assert logps == [[-1, -2], [-1, 9, -3], [9, 9, 9]]


def test_a_stored_turn_ends_as_the_chat_template_ends_it(tmp_path):
    """Not with the tokenizer's end token, where the policy stops at both, as Gemma does."""
    tokenizer = tiny.tokenizer()
    end = tokenizer.convert_tokens_to_ids(")")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}){% endfor %}"
    model = tiny.policy()
    model.generation_config.eos_token_id = [1, end]
    turn = [{"role": "user", "content": "1="}]
    rows = [{"prompt": turn, "completion": text, "reward": float(i % 2)} for i, text in enumerate(["12", "12)"] * 4)]
    args = ERPDConfig(**settings(tmp_path, prompts_per_round=None, extraction_passes=1, distillation_passes=1))

    def read(rows):
        trainer = ERPDTrainer(model, None, args, Dataset.from_list(rows), processing_class=tokenizer)
        return tokens(read_stored_rollouts(trainer._host))

    messages = [{**row, "completion": [{"role": "assistant", "content": row["completion"]}]} for row in rows]
    assert read(messages) == read(rows) == [[4, 5, end]] * 8
    assert read([{**row, "prompt": "1="} for row in rows]) == [[4, 5, 1], [4, 5, end]] * 4


def test_completions_that_lose_their_end_are_announced(path, tmp_path, caplog):
    rows = [{"prompt": "1=", "completion": "1" * (7 + i % 5), "reward": float(i % 2)} for i in range(8)]
    rollouts = read_stored_rollouts(from_stored(path, tmp_path, rows)._host)
    assert max(map(len, tokens(rollouts))) == 10
    assert "1 of 8 stored completions have more than max_completion_length=10 tokens and lose their end" in caplog.text


def test_the_samplers_log_probabilities(path, tmp_path, caplog):
    """They are what SAPO's ratio is against, and the policy's distance from them is logged."""
    rows = [{"prompt": f"{i}=", "completion": "123", "reward": float(i % 2), "logprobs": [-3.0] * 4} for i in range(8)]
    rows += [{**row, "reward": 1 - row["reward"]} for row in rows]
    rows[0]["logprobs"] = [-3.0]
    trainer = from_stored(path, tmp_path, rows, extraction_loss="sapo")
    trainer.add_callback(TrainingDiagnosticsCallback(verbose=False))
    seen, policy_loss = [], trainer.policy_loss

    def record(logps, behaviour_logps, advantages, mask, inputs):
        seen.append((behaviour_logps, inputs["base_logps"]))
        return policy_loss(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = record
    trainer.train()
    behaviour, base = (torch.cat(tensors[:2]) for tensors in zip(*seen, strict=True))
    known = (behaviour == -3).all(1)
    assert known.sum() == 15
    assert torch.equal(behaviour[~known], base[~known])
    log = next(log for log in trainer.state.log_history if "base/log_ratio_to_sampler" in log)
    assert log["base/log_ratio_to_sampler"] == pytest.approx(base[known].mean().item() + 3, abs=1e-4)
    difference = (base[known] + 3).abs().mean().item()
    assert log["sampling/fresh_log_ratio_abs"] == pytest.approx(difference, abs=1e-4)
    assert f"differ from the sampler's by {difference:.3f} nats per token" in caplog.text
    assert "with stored rollouts of another policy this is expected" in caplog.text
    assert "The logprobs of 1 of 16 stored rollouts are not used" in caplog.text


def test_rollouts_that_the_policy_would_not_sample_are_noticed(path, tmp_path, caplog, text):
    model = tiny.policy()
    with torch.no_grad():
        model.lm_head.weight[3:].mul_(20)  # very sure of its tokens
    model.save_pretrained(tmp_path / "sure")
    tiny.tokenizer().save_pretrained(tmp_path / "sure")
    from_stored(str(tmp_path / "sure"), tmp_path, text[1]).train()
    assert "gives the stored rollouts next to no probability" in caplog.text
    caplog.clear()
    from_stored(path, tmp_path, text[1]).train()
    assert "next to no probability" not in caplog.text


def test_what_is_left_over_is_not_used(path, tmp_path, text, caplog):
    trainer = from_stored(path, tmp_path, text[1][:21])
    assert len(read_stored_rollouts(trainer._host).chunks[0]) == 16
    assert trainer._schedule.steps_per_pass == 2
    assert "The last 5 stored rollouts are not used, because an update takes 8" in caplog.text


def test_truncated_completions_are_masked_out_as_they_are_when_sampled(path, tmp_path, text):
    rows = text[1]
    masked = {"mask_truncated_completions": True}
    rollouts = read_stored_rollouts(from_stored(path, tmp_path, rows, **masked)._host)
    for row, stored in zip(rollouts.chunks[0], rows, strict=True):
        assert row["completion_mask"].any() == stored["completion"].endswith(("<eos>", "<pad>"))


# ---- refusals


ROW = {"prompt": "1=", "completion": "1", "reward": 1.0}


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([ROW] * 8, {"rounds": 2}, "rounds=2 cannot be made of stored rollouts"),
        ([ROW] * 8, {"prompts_per_round": 8}, "prompts_per_round=8 has no meaning for stored rollouts"),
        ([ROW] * 7, {}, r"7 stored rollouts are fewer than one update takes \(8\)"),
        (
            [{"prompt": "1=", "completion": "1", "rewards": [1.0]}],
            {},
            "'completion' and 'rewards' do not fit together",
        ),
        (
            [{"prompt": "1=", "completions": ["1", "2"], "rewards": [1.0]}],
            {},
            "Row 0 has 2 completions and 1 rewards: give one reward per completion",
        ),
    ],
)
def test_what_stored_rollouts_cannot_do_is_refused_before_anything_is_loaded(tmp_path, rows, overrides, message):
    with pytest.raises(ValueError, match=message):
        from_stored("no model", tmp_path, rows, **overrides)


def test_held_out_prompts_need_a_reward_function(tmp_path):
    with pytest.raises(ValueError, match="need a reward: pass reward_funcs, or leave out eval_dataset"):
        from_stored("no model", tmp_path, [ROW] * 8, eval_dataset=tiny.prompts(2))


def test_several_turns_are_refused(path, tmp_path):
    turns = [{"role": "assistant", "content": "1"}, {"role": "user", "content": "2"}]
    rows = [{"prompt": turns[1:], "completion": turns, "reward": 1.0}] * 8
    with pytest.raises(ValueError, match="must be text, or one message of the assistant"):
        from_stored(path, tmp_path, rows).train()


def test_reward_functions_that_are_not_called(path, tmp_path, text, caplog):
    from_stored(path, tmp_path, text[1], right_or_wrong)
    assert "reward_funcs are not called, because train_dataset holds rollouts" in caplog.text


def test_a_completion_alone_is_no_rollout():
    assert not has_stored_rollouts(Dataset.from_list([{"prompt": "1=", "completion": "2"}]))
    assert not has_stored_rollouts(Dataset.from_list([{"prompt": "1=", "reward": 1.0}]))
