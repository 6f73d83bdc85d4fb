"""What TrOPD counts, evaluates and looks up beside its loss."""

import pytest
import tiny
import torch
from transformers import AutoTokenizer
from tropd_runs import make_trainer, micro_batches


def test_reopold_evaluates_one_objective_before_and_after_the_switch(tmp_path):
    trainer = make_trainer(tmp_path, objective="reopold", reopold_switch_step=0)
    assert "uncertain" in micro_batches(trainer)[0]
    assert "uncertain" not in micro_batches(trainer, training=False)[0]


@pytest.mark.parametrize("counting", ["all", "non_padding"])
def test_tokens_are_counted_once(tmp_path, counting):
    counts = []
    for folder, settings in (("without", {}), ("with", {"include_num_input_tokens_seen": counting})):
        trainer = make_trainer(tmp_path / folder, max_steps=2, **settings)
        trainer.train()
        counts.append([log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log])
    assert counts[0] == counts[1]
    assert trainer.state.num_input_tokens_seen == counts[0][-1] > 0


def test_a_step_that_was_given_up_is_not_counted(tmp_path):
    """As with auto_find_batch_size, which starts the training again where a batch did not fit."""
    plain, begun = make_trainer(tmp_path / "plain", max_steps=1), make_trainer(tmp_path / "begun", max_steps=1)
    micro_batches(begun)
    for trainer in (plain, begun):
        trainer.train()
    names = ("num_tokens", "completions/mean_length")
    logs = [[log[name] for name in names] for log in (plain.state.log_history[0], begun.state.log_history[0])]
    assert logs[0] == logs[1]


def test_a_pad_token_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pad_token='nosuch' is not in the tokenizer's vocabulary"):
        make_trainer(tmp_path, pad_token="nosuch")


@pytest.mark.parametrize("num_generations", [1, 2])
def test_data_seed_orders_the_prompts(tmp_path, num_generations):
    def order(data_seed: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, data_seed=data_seed, num_generations=num_generations)
        return next(iter(trainer.get_train_dataloader()))["input_ids"]

    assert torch.equal(order(7), order(7))
    assert not torch.equal(order(7), order(8))
    if num_generations == 2:
        assert torch.equal(order(None), order(make_trainer(tmp_path).args.seed))


def test_a_teacher_that_was_not_loaded_is_looked_up_nowhere(tmp_path, monkeypatch, caplog):
    asked = []

    def from_pretrained(name, *args, **kwargs):
        asked.append(name)
        raise OSError(name)

    teacher = tiny.policy(seed=1)
    teacher.config._name_or_path = ""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    make_trainer(tmp_path, teacher=teacher)
    assert not asked
    assert "no tokenizer that could be loaded" in caplog.text
