"""The fixed set as data: rows, batches and their shares, and what becomes of the rewards."""

import math
from functools import partial

import pytest
import tiny
import torch
from datasets import Dataset
from tiny_erpd import right_or_wrong, settings
from tiny_erpd_runs import Recorder, make_run, with_key

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.fixed_set import arrange, collate, rows_of, share_out


def test_batches_are_of_similar_length_and_each_rollout_is_in_one():
    lengths = torch.randint(1, 100, (512,), generator=torch.Generator().manual_seed(0))
    batches = arrange(lengths, 8, seed=3)
    assert sorted(batches.flatten().tolist()) == list(range(512))
    spread = (lengths[batches].amax(1) - lengths[batches].amin(1)).float().mean()
    assert spread < 10  # of about 80, if they were shuffled
    assert torch.equal(batches, arrange(lengths, 8, seed=3))
    assert not torch.equal(batches, arrange(lengths, 8, seed=4))


class Processes:
    """Several processes of an accelerator in one: what they would gather is known beforehand."""

    def __init__(self, number, chunks):
        self.num_processes, self.chunks, self.device = number, chunks, torch.device("cpu")
        self.process_index = 0

    def gather(self, _):
        return torch.stack(
            [
                torch.tensor([[len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows] for rows in chunks])
                for chunks in self.chunks
            ]
        )

    def reduce(self, tensor, reduction):
        return tensor


def test_two_processes_share_what_one_would_have(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(24):
        n = int(torch.randint(1, 9, (1,), generator=generator))
        row = {"prompt_ids": torch.full((1 + i % 3,), i), "completion_ids": torch.full((n,), i)}
        rows.append(
            row | {"completion_mask": torch.ones(n), "advantages": torch.tensor(i), "rewards": torch.tensor(0)}
        )

    def shared(number):
        local = 8 // number  # three generations of 8 rollouts
        by_process = [[rows[c * 8 + p * local : c * 8 + (p + 1) * local] for c in range(3)] for p in range(number)]
        processes, sets = Processes(number, by_process), []
        for p in range(number):
            processes.process_index = p
            chunks = iter([rows[:8], rows[8:16], rows[16:]])
            monkeypatch.setattr("trl_ext.erpd.fixed_set.gather_object", lambda own_rows, chunks=chunks: next(chunks))
            padded = partial(collate, pad_token_id=0, pad_to_multiple_of=None)
            sets.append(share_out(by_process[p], processes, 4 // number, 7, padded))
        return sets

    one, two = shared(1)[0], shared(2)
    assert len(one.batches) == len(two[0].batches) == len(two[1].batches) == 6
    for whole, first, second in zip(one.batches, two[0].batches, two[1].batches, strict=True):
        assert whole["advantages"].tolist() == first["advantages"].tolist() + second["advantages"].tolist()
    assert one.order(5) == two[0].order(5) == two[1].order(5) != one.order(6)
    assert sorted(one.order(5)) == list(range(6))


def test_rows_are_what_the_batch_held():
    nan = math.nan
    rollouts = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9], [0, 0, 4]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 7, 8]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]),  # the last is truncated and masked
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]]),
        "sampling_per_token_logps": torch.tensor([[-1.0, nan, 0.0], [-2.0, -3.0, -4.0], [-5.0, -6.0, -7.0]]),
        "advantages": torch.tensor([1.0, -1.0, 0.0]),
        "num_items_in_batch": torch.tensor(5),
    }
    rows = rows_of(rollouts, torch.tensor([1.0, 0.0, nan]))
    batch = collate([rows[2], rows[0], rows[1]], pad_token_id=0, pad_to_multiple_of=None)
    assert batch["prompt_ids"].tolist() == [[0, 0, 4], [0, 5, 6], [7, 8, 9]]
    assert batch["prompt_mask"].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[6, 0, 0], [1, 2, 0], [3, 4, 5]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["tool_mask"].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert batch["sampling_per_token_logps"][1:].nan_to_num(9).tolist() == [[-1, 9, 0], [-2, -3, -4]]
    assert batch["advantages"].tolist() == [0, 1, -1]
    assert batch["rewards"].nan_to_num(9).tolist() == [9, 1, 0]
    assert collate(rows, 0, 4)["completion_ids"].shape == (3, 4)


def test_what_only_some_generations_have():
    def row(length, **more):
        ones = torch.ones(length, dtype=torch.long)
        base = {"prompt_ids": ones, "completion_ids": ones, "completion_mask": ones}
        return {**base, "advantages": torch.tensor(0.0), "rewards": torch.tensor(0.0), **more}

    masked_row = row(3, tool_mask=torch.tensor([1, 0, 1]), sampling_per_token_logps=torch.tensor([-1.0, -2.0, -3.0]))
    for rows in ([row(2), masked_row], [masked_row, row(2)]):
        batch = collate(rows, 0, None)
        by_length = {int(mask.sum()): i for i, mask in enumerate(batch["completion_mask"])}
        assert batch["tool_mask"][by_length[3]].tolist() == [1, 0, 1]
        assert batch["tool_mask"][by_length[2]].tolist()[:2] == [1, 1]
        assert batch["sampling_per_token_logps"][by_length[3]].tolist() == [-1.0, -2.0, -3.0]
        assert batch["sampling_per_token_logps"][by_length[2]][:2].isnan().all()


def test_masks_of_environments_and_of_truncated_completions(path, tmp_path):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        output["env_mask"] = [[1, 0] * (len(ids) // 2) + [1] * (len(ids) % 2) for ids in output["completion_ids"]]
        return output

    trainer = make_run(path, tmp_path, trainer_class=Recorder, rollout_func=rollout, mask_truncated_completions=True)
    trainer.train()
    batches = trainer.record[2][4]
    truncated = [b["completion_mask"].sum(1) == 0 for b in batches]
    assert 0 < sum(int(t.sum()) for t in truncated) < 32
    for batch in batches:
        mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
        assert batch["signal"][~mask].eq(0).all()
        assert batch["signal"][mask].ne(0).any() or not mask.any()
    tokens = sum(int((b["completion_mask"] * b["tool_mask"]).sum()) for b in batches)
    assert with_key(trainer, "fixed_set/tokens")[0]["fixed_set/tokens"] == tokens


def test_the_set_is_as_large_as_the_data_allow(path, tmp_path):
    args = settings(tmp_path, prompts_per_round=None)
    assert ERPDTrainer(path, right_or_wrong, ERPDConfig(**args), tiny.prompts(31))._host.prompts_per_round == 30
    assert ERPDTrainer(path, right_or_wrong, ERPDConfig(**args), tiny.prompts(1999))._host.prompts_per_round == 1000


def test_prompts_without_signal_are_counted(path, tmp_path):
    def reward(prompts, completions, **kwargs):
        """Alike for the prompts that end in an even number, of which the set below has 5."""
        odd = [int(prompt.rstrip("=").split("+")[1]) % 2 for prompt in prompts]
        return [is_odd * r for is_odd, r in zip(odd, right_or_wrong(completions), strict=True)]

    args = ERPDConfig(**settings(tmp_path, shuffle_dataset=False, num_generations=8, extraction_loss="sapo"))
    rows = [{"prompt": f"1+{i}="} for i in (0, 1, 2, 4, 6, 8, 3, 5)]
    trainer = ERPDTrainer(path, reward, args, Dataset.from_list(rows))
    trainer.train()
    log = with_key(trainer, "fixed_set/prompts")[0]
    assert (log["fixed_set/prompts"], log["fixed_set/rollouts"]) == (8, 64)
    assert log["fixed_set/prompts_without_signal"] == 5


@pytest.mark.parametrize("extraction_loss", ["sapo", "ce", "mse"])
def test_any_rewards_will_do(path, tmp_path, extraction_loss):
    """Negative ones, several functions with weights, a term of length, and none for some rollouts."""

    def length(completions, **kwargs):
        return [None if text.startswith("a") else -0.3 * len(text) for text in completions]

    trainer = make_run(
        path, tmp_path, trainer_class=Recorder, reward=[right_or_wrong, length, tiny.digits_reward],
        reward_weights=[1.0, 0.5, 2.0], extraction_loss=extraction_loss,
    )  # fmt: skip
    trainer.train()
    batches = trainer.record[0][4]
    rewards = torch.cat([batch["rewards"] for batch in batches]).double()
    outcomes = torch.cat([batch["outcomes"] for batch in batches]).double()
    expected = (rewards - rewards.min()) / (rewards.max() - rewards.min())
    torch.testing.assert_close(outcomes, expected, rtol=0, atol=1e-6)
    assert len(set(rewards.tolist())) > 4
    assert all(log["grad_norm"] > 0 for log in with_key(trainer, "grad_norm"))


@pytest.mark.parametrize("skips", [False, True])
def test_prompts_whose_rollouts_agree_may_be_left_out(path, tmp_path, skips):
    """Each prompt's rollouts have one reward: `ce` still learns which prompts are solved, unless it is told not to."""

    def by_prompt(prompts, **kwargs):
        return [float("1" in prompt) for prompt in prompts]

    trainer = make_run(path, tmp_path, by_prompt, extraction_skips_agreeing_prompts=skips, extraction_passes=1)
    trainer.train()
    gradients = [log["grad_norm"] for log in with_key(trainer, "grad_norm") if log["stage"] == 1]
    assert all((norm == 0) == skips for norm in gradients)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.5, 2.0)])
def test_any_two_rewards_are_right_and_wrong(path, tmp_path, low, high):
    """And None is neither."""

    def reward(completions, **kwargs):
        rewards = [high if r else low for r in right_or_wrong(completions)]
        return [None if text.startswith("a") else r for r, text in zip(rewards, completions, strict=True)]

    trainer = make_run(path, tmp_path, trainer_class=Recorder, reward=reward)
    trainer.train()
    for batch in trainer.record[0][4]:
        for reward_, outcome in zip(batch["rewards"].tolist(), batch["outcomes"].tolist(), strict=True):
            assert outcome == {low: 0.0, high: 1.0}.get(reward_) or (math.isnan(reward_) and math.isnan(outcome))
