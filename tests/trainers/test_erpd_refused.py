"""Settings and data that ERPD refuses, before anything is loaded, or warns of."""

import math

import pytest
import tiny
import torch
from tiny_erpd import right_or_wrong, settings
from tiny_erpd_runs import make_run
from trl import BEMACallback

from trl_ext import ERPDConfig, ERPDTrainer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rounds": 0}, "rounds=0 leaves nothing to train: set it to 1 or more"),
        ({"extraction_passes": 0}, "extraction_passes=0 leaves nothing"),
        ({"distillation_passes": -1}, "distillation_passes=-1 leaves nothing"),
        ({"num_generations": 1}, "num_generations=1 must be a whole number of at least 2"),
        ({"extraction_loss": "dpo"}, "extraction_loss='dpo' is unknown: set it to one of 'sapo', 'ce', 'mse'"),
        ({"extraction_loss": []}, "extraction_loss is empty"),
        ({"extraction_loss": ["ce", "ce"]}, "would train the same teacher twice"),
        ({"signal": "student"}, "signal='student' is unknown"),
        ({"signal": ["teacher", "teacher"]}, "1 teachers and 2 signals"),
        ({"signal_weights": [1.0, 1.0]}, "1 teachers and 2 signal_weights"),
        ({"signal_weights": [0.0]}, "leave nothing to distil"),
        ({"signal_weights": [math.nan]}, "leave nothing to distil"),
        ({"signal_normalization": "batch"}, "signal_normalization='batch' is unknown"),
        ({"signal_clip": 0.0}, "signal_clip=0.0 must be positive and finite"),
        ({"extraction_beta": -1.0}, "extraction_beta=-1.0 must be positive and finite"),
        ({"distillation_epsilon": 0.0}, "distillation_epsilon=0.0 must be positive and finite"),
        (
            {"distillation_learning_rate_decay": 0.0},
            "distillation_learning_rate_decay=0.0 must be positive and finite",
        ),
        ({"extraction_learning_rate": math.inf}, "extraction_learning_rate=inf must be positive and finite"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive and finite"),
        ({"extraction_warmup_steps": -1}, "extraction_warmup_steps=-1 must be at least 0"),
        ({"outcome_advantage_weight": math.nan}, "outcome_advantage_weight=nan must be finite"),
        ({"distillation_anchor": "step"}, "distillation_anchor='step' is unknown"),
        ({"trust_region": "kl"}, "trust_region='kl' is unknown"),
        ({"trust_region_radius": 0.1}, "has no meaning for trust_region='ppo_clip'"),
        ({"trust_region": "drpo", "trust_region_radius": -0.1}, "trust_region_radius=-0.1 must be"),
        ({"max_steps": 4}, "max_steps=4 would end ERPDConfig's run within a stage"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 would end"),
        ({"num_iterations": 2}, "num_iterations=2 has no meaning with a fixed set: set it to 1"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "lr_scheduler_type='reduce_lr_on_plateau' depends on evaluations",
        ),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold=0.1 needs one advantage per sequence"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model=True moves the reference"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True would make a resumed run"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' keeps averages"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence': set it to 'token'"),
        ({"loss_type": "sapo"}, "cannot use loss_type='sapo'"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ERPDConfig(**settings(tmp_path, **overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"extraction_lr_scheduler_type": "foo"}, "extraction_lr_scheduler_type='foo' cannot be made"),
        ({"rounds": 1.5}, "rounds=1.5 has the wrong type"),
    ],
)
def test_more_settings_that_cannot_be_honoured(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        ERPDConfig(**settings(tmp_path, **overrides))


@pytest.mark.parametrize(
    ("overrides", "dataset", "message"),
    [
        ({}, tiny.prompts(1), "The dataset's 1 prompts with 4 rollouts each are less than one batch, which takes 2"),
        ({"prompts_per_round": 1}, tiny.prompts(), "prompts_per_round=1 with 4 rollouts each is less than one batch"),
        ({"prompts_per_round": 34}, tiny.prompts(), "more than the dataset has: set it to 32 or less"),
        ({"prompts_per_round": 7}, tiny.prompts(), "does not make whole batches of 2 prompts .* set it to 6"),
        (
            {},
            tiny.prompts().to_iterable_dataset(),
            "cannot use train_dataset=IterableDataset: pass a datasets.Dataset",
        ),
        ({}, None, "cannot use train_dataset=NoneType"),
        pytest.param(
            {},
            tiny.prompts().add_column("image", [None] * 32),
            "keeps the tokens of its rollouts but no images",
            marks=pytest.mark.supports("erpd", "vision-language model", refused=True),
        ),
    ],
)
def test_data_that_cannot_be_honoured_is_refused_before_anything_is_loaded(tmp_path, overrides, dataset, message):
    args = ERPDConfig(**settings(tmp_path, **overrides))
    with pytest.raises(ValueError, match=message):
        ERPDTrainer("no such model", right_or_wrong, args, dataset, tiny.prompts(4))


def test_a_list_is_no_data_set(path, tmp_path):
    with pytest.raises(ValueError, match=r"Dataset\.from_list"):
        ERPDTrainer("no/model", right_or_wrong, ERPDConfig(**settings(tmp_path)), [{"prompt": "1"}])


def test_a_scheduler_of_ones_own_is_refused(path, tmp_path):
    model = tiny.policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match=r"pass optimizers=\(optimizer, None\)"):
        make_run(path, tmp_path, optimizers=(optimizer, schedule))


def test_warnings_of_settings_without_effect(path, tmp_path, caplog):
    make_run(path, tmp_path, trust_region="drpo", epsilon=0.3)
    assert "epsilon=0.3 has no effect with trust_region='drpo'" in caplog.text
    make_run(path, tmp_path, epsilon=0.3, distillation_epsilon=0.5)
    assert "epsilon=0.3 has no effect, because the clip range of stage 2 is distillation_epsilon=0.5" in caplog.text
    make_run(path, tmp_path, trust_region="drpo", distillation_epsilon=0.5, distillation_epsilon_high=0.7)
    assert "distillation_epsilon=0.5, distillation_epsilon_high=0.7 has no effect with trust_region=" in caplog.text
    make_run(path, tmp_path, epsilon_high=0.4, distillation_epsilon_high=0.7)
    assert "distillation_epsilon_high=0.7 has no effect beside epsilon_high=0.4" in caplog.text
    make_run(path, tmp_path, extraction_loss="sapo", extraction_beta=3.0)
    assert "extraction_beta=3.0 has no effect with extraction_loss='sapo': remove it, or add 'ce'" in caplog.text
    caplog.clear()
    make_run(path, tmp_path, extraction_loss=["sapo", "ce"], extraction_beta=3.0, distillation_epsilon_high=0.7)
    assert "has no effect" not in caplog.text
    make_run(path, tmp_path, prompts_per_round=2, distillation_anchor="pass")
    assert "stage 2 never leaves its anchor" in caplog.text


@pytest.mark.parametrize("callback", [BEMACallback, BEMACallback()])
def test_averages_over_both_stages_are_refused(path, tmp_path, callback):
    with pytest.raises(ValueError, match="BEMACallback averages the weights of the whole run"):
        make_run(path, tmp_path, callbacks=[callback])
