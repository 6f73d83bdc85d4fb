"""How ERPD's fixed set is sampled: which prompts, which rewards, how it is put in batches."""

from functools import partial
from types import SimpleNamespace

import tiny
import torch
from tiny_erpd import right_or_wrong
from tiny_erpd_trainer import make_trainer

from trl_ext.erpd.host import Sampled
from trl_ext.erpd.sampling import make_fixed_set, prompts_of_round, sample_rollouts
from trl_ext.erpd.trainer_host import TrainerHost


def sample_set(trainer, rewards, round_number=1):
    """The set of rollouts that differ only in their rewards and in their advantages, which number them."""
    number = iter(range(10**6))

    def sample(rows):
        advantages = torch.tensor([float(next(number)) for _ in rows])
        prompt, completion = torch.full((len(rows), 3), 5), torch.full((len(rows), 9), 6)
        rollouts = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "advantages": advantages}
        rollouts |= {"completion_ids": completion, "completion_mask": torch.ones_like(completion)}
        return Sampled(rollouts, torch.tensor([rewards[int(i)] for i in advantages]), first=0)

    trainer._host.sample = sample
    rollouts = sample_rollouts(trainer._host, round_number, rounds=1, resume_from=None)
    return make_fixed_set(trainer._host, rollouts, round_number)


def test_prompts_come_again_only_when_too_few_are_left_and_in_another_order():
    """Two rounds of 4 of 10 prompts make a pass over the data, whose last 2 are too few for a third."""
    args = SimpleNamespace(seed=3)
    trainer = SimpleNamespace(train_dataset=range(10), shuffle_dataset=True, args=args)
    host = SimpleNamespace(trainer=trainer, prompts_per_round=4)
    host.prompt_order = partial(TrainerHost.prompt_order, host)
    rounds = [prompts_of_round(host, number) for number in range(1, 5)]
    assert all(len(set(first + second)) == 8 for first, second in (rounds[:2], rounds[2:]))
    assert rounds[2:] != rounds[:2]
    args.seed = 2
    assert prompts_of_round(host, 1) != rounds[0]


def test_prompts_come_in_order_where_shuffling_is_off(path, tmp_path):
    trainer = make_trainer(path, tmp_path, dataset=tiny.prompts(5), shuffle_dataset=False)
    assert [prompts_of_round(trainer._host, number) for number in (1, 2, 3)] == [[0, 1], [2, 3], [0, 1]]


def test_each_round_has_other_batches(path, tmp_path):
    """Of rollouts of the same lengths in the same order, so that only chance says which share a batch."""
    trainer = make_trainer(path, tmp_path, prompts_per_round=8)
    rewards = [0.0, 1.0, 0.0, 1.0] * 8

    def batches(round_number):
        return [batch["advantages"].tolist() for batch in sample_set(trainer, rewards, round_number)[0].batches]

    assert sorted(number for batch in batches(1) for number in batch) == list(range(32))
    assert batches(1) == batches(1) != batches(2)


def test_prompts_whose_rollouts_agree(path, tmp_path):
    """They have one reward, or none at all; a rollout without a reward says nothing."""
    nan = torch.nan
    groups = [
        [nan, nan, nan, nan],
        [1.0, 1.0, nan, 1.0],
        [0.0, 0.0, 0.0, 0.0],
        [1.0, nan, 0.0, nan],
        [1.0, 1.0, 1.0, 0.0],
        [1.0, 0.0, 1.0, 0.0],
    ]
    trainer = make_trainer(path, tmp_path, prompts_per_round=6)
    facts = sample_set(trainer, [reward for group in groups for reward in group])[1]
    assert facts["fixed_set/prompts_without_signal"] == 3


def test_batches_are_padded_to_a_multiple(path, tmp_path):
    trainer = make_trainer(path, tmp_path, pad_to_multiple_of=8)
    (batch,) = sample_set(trainer, [0.0, 1.0] * 4)[0].batches
    widths = {name: batch[name].shape[1] for name in batch if name.startswith(("prompt", "completion"))}
    # of 3 and 9 tokens
    assert widths == {"prompt_ids": 8, "prompt_mask": 8, "completion_ids": 16, "completion_mask": 16}
    assert batch["prompt_mask"].sum() == 8 * 3
    assert batch["completion_mask"].sum() == 8 * 9


def test_rewards_are_weighted(path, tmp_path):
    trainer = make_trainer(path, tmp_path, reward=[right_or_wrong, tiny.digits_reward], reward_weights=[1.0, 0.0])
    sampled = trainer._host.sample([dict(trainer.train_dataset[i // 4]) for i in range(8)])
    texts = trainer.processing_class.batch_decode(sampled.rollouts["completion_ids"], skip_special_tokens=True)
    assert sum(tiny.digits_reward(texts)) > 0  # what would be there in excess
    assert sampled.own_rewards.tolist() == right_or_wrong(texts)
