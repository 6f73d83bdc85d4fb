"""The configurations that DRPOTrainer takes, what it refuses and what it warns about."""

import math

import pytest
import tiny
from datasets import Dataset, DatasetDict
from tiny_drpo import make_trainer
from trl import GRPOConfig

from trl_ext import DRPOConfig, DRPOTrainer
from trl_ext.arguments import as_config, changed_settings


def test_a_plain_grpo_config_has_the_defaults(path, tmp_path):
    args = GRPOConfig(**tiny.grpo_settings(tmp_path, temperature=0.7))
    trainer = DRPOTrainer(path, tiny.digits_reward, args, tiny.prompts())
    assert isinstance(trainer.args, DRPOConfig)
    assert type(args) is GRPOConfig  # the user's own object stays what it is
    assert (trainer.args.trust_region, trainer.trust_region_radius, trainer.args.temperature) == ("drpo", 0.5, 0.7)
    assert trainer.args.to_dict()["trust_region"] == "drpo"
    trainer.train()


def test_a_users_own_subclass_of_grpo_config(path, tmp_path):
    class TheirConfig(GRPOConfig):
        pass

    trainer = make_trainer(path, tmp_path, config_class=TheirConfig)
    assert isinstance(trainer.args, TheirConfig)
    assert trainer.trust_region_radius == 0.5


def test_no_config_at_all_takes_trls_output_directory(path):
    assert as_config(None, str, "org/model", "DRPO") == "model-DRPO"
    assert as_config(None, str, tiny.policy(), "DRPO") == "policy-DRPO"


@pytest.mark.parametrize(
    ("trust_region", "radius"), [("drpo", 0.5), ("spo", 0.2), ("dppo_tv", 0.15), ("dppo_kl", 0.05)]
)
def test_default_radius(path, tmp_path, trust_region, radius):
    trainer = make_trainer(path, tmp_path, trust_region=trust_region)
    assert trainer.trust_region_radius == radius


def test_the_model_card_names_the_paper(path, tmp_path):
    trainer = make_trainer(path, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "2606.09821" in card
    assert "drpo" in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_sampling_level": "sequence"}, "set it to 'token'"),
        ({"loss_type": "cispo"}, "set it to one of 'grpo'"),
        ({"loss_type": "sapo"}, "set it to one of 'grpo'"),
        ({"loss_type": "vespo"}, "set it to one of 'grpo'"),
        ({"trust_region": "kl"}, "set it to one of 'drpo'"),
        ({"trust_region_radius": 0.0}, "set a positive number"),
        ({"trust_region_radius": -0.1}, "set a positive number"),
        ({"trust_region_radius": math.nan}, "set a positive number"),
        ({"dppo_ratio_cap": 5.0}, "set trust_region to 'dppo_tv'"),
        ({"trust_region": "dppo_tv", "dppo_ratio_cap": 0.5}, "set it to 1 or more"),
    ],
)
def test_refusals_come_before_the_model(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        DRPOConfig(**tiny.grpo_settings(tmp_path, **settings))
    assert str(error.value).count(". ") == 0  # one sentence
    if set(settings) & {"importance_sampling_level", "loss_type"}:  # a plain config reaches the trainer
        with pytest.raises(ValueError, match=message):
            make_trainer("no such model", tmp_path, GRPOConfig, **settings)


def test_a_wrong_config_class_is_refused(tmp_path):
    from trl import SFTConfig

    with pytest.raises(TypeError, match="create it with DRPOConfig"):
        DRPOTrainer("no such model", tiny.digits_reward, SFTConfig(str(tmp_path), use_cpu=True), tiny.prompts())


def test_a_dataset_without_prompts_is_refused(tmp_path):
    args = DRPOConfig(**tiny.grpo_settings(tmp_path))
    sums = Dataset.from_dict({"question": ["1+1="], "answer": ["2"]})
    with pytest.raises(ValueError, match="'question', 'answer': rename yours"):
        DRPOTrainer("no such model", tiny.digits_reward, args, sums)
    with pytest.raises(
        ValueError, match=r"one split as `train_dataset`, got all of them: pass e.g. dataset\['train'\]"
    ):
        DRPOTrainer("no such model", tiny.digits_reward, args, DatasetDict({"train": tiny.prompts()}))
    with pytest.raises(ValueError, match=r"eval_dataset\['sums'\]"):
        DRPOTrainer("no such model", tiny.digits_reward, args, tiny.prompts(), {"sums": sums})


def test_prompts_made_by_a_transform_are_found(path, tmp_path):
    sums = Dataset.from_dict({"a": list(range(8))})
    sums.set_transform(lambda rows: {"prompt": [f"{a}+{a}=" for a in rows["a"]]})
    args = DRPOConfig(**tiny.grpo_settings(tmp_path))
    DRPOTrainer(path, tiny.digits_reward, args, sums).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_kwargs": {"top_p": 0.5}}, "sample with top_p=1.0"),
        ({"epsilon": 0.1, "epsilon_high": 0.28}, "epsilon=0.1, epsilon_high=0.28 has no effect"),
        ({"delta": 1.5}, "delta=1.5 has no effect"),
        ({"trust_region_radius": 12.5}, "never binds"),
        ({"top_p": 0.9}, "sample with top_p=1.0"),
        ({"trust_region_anchor": "old_policy"}, "leave trust_region_anchor at 'sampler'"),
    ],
)
def test_settings_without_effect_bring_one_warning(path, tmp_path, caplog, settings, message):
    make_trainer(path, tmp_path, rollout_func=tiny.rollout, **settings)
    warnings = [record.message for record in caplog.records if record.name.startswith("trl_ext")]
    assert len(warnings) == 1
    assert message in warnings[0]


def test_a_good_configuration_brings_no_warning(path, tmp_path, caplog):
    make_trainer(path, tmp_path, loss_type="dr_grpo", beta=0.1)
    make_trainer(path, tmp_path, rollout_func=tiny.rollout, top_k=None, min_p=0.0)
    assert not [record for record in caplog.records if record.name.startswith("trl_ext")]


def test_a_setting_that_was_set_to_none_was_set(tmp_path):
    args = DRPOConfig(**tiny.grpo_settings(tmp_path, vllm_importance_sampling_clip_max=None))
    names = ("vllm_importance_sampling_clip_max", "epsilon_high", "no_such_setting")
    assert changed_settings(args, names) == {"vllm_importance_sampling_clip_max": None}
