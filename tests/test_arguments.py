"""What is refused, and what is warned of, before a model is loaded. Each message says what to do instead."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig
from trl.experimental.gkd import GKDConfig

from trl_ext import (
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    PolicyLossTrainer,
    RLADConfig,
    RLADTrainer,
    TrOPDConfig,
    TrOPDTrainer,
)
from trl_ext.arguments import as_config, check_sharded_adapter, check_values, sampling_that_biases_the_ratio
from trl_ext.dataset_columns import check_prompt_column, known_columns
from trl_ext.policy_loss_checks import checked_token_loss, without_advice


TRAINERS = {
    DRPOTrainer: DRPOConfig,
    RLADTrainer: RLADConfig,
    ERPDTrainer: ERPDConfig,
    TrOPDTrainer: TrOPDConfig,
}


def config(config_class, **settings):
    return config_class(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **settings)


# ---- another trainer's configuration


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("config_class", TRAINERS.values())
def test_a_siblings_configuration_is_refused(trainer_class, config_class):
    if TRAINERS[trainer_class] is config_class:
        return
    message = f"`args` .* {TRAINERS[trainer_class].__name__}.*{config_class.__name__}"
    message += f"|{config_class.__name__}, the configuration of another trainer, .*{TRAINERS[trainer_class].__name__}"
    with pytest.raises(TypeError, match=message):
        trainer_class("no such model", args=config(config_class), train_dataset=tiny.prompts())


def test_a_configuration_with_settings_is_not_for_a_loss_of_ones_own():
    """Its trust region would be ignored."""
    with pytest.raises(TypeError, match="whose own settings would be ignored: create it with GRPOConfig"):
        PolicyLossTrainer("no such model", args=config(DRPOConfig))


def test_users_own_classes_are_accepted():
    class TheirGRPO(GRPOConfig):
        pass

    class TheirDRPO(DRPOConfig):
        pass

    class Both(DRPOConfig, RLADConfig):
        pass

    for given in (TheirGRPO, TheirDRPO, GRPOConfig, DRPOConfig, Both):
        converted = as_config(config(given), DRPOConfig, "model", "DRPO")
        assert converted.trust_region == "drpo"
        assert isinstance(converted, given)
    assert isinstance(as_config(config(GKDConfig), TrOPDConfig, "model", "TrOPD"), TrOPDConfig)


# ---- types


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (ERPDConfig, {"prompts_per_round": "4"}, r"prompts_per_round='4' .*\(str\): set it to a whole number or None"),
        (ERPDConfig, {"rounds": 1.5}, r"rounds=1.5 .*\(float\): set it to a whole number\."),
        (ERPDConfig, {"signal": None}, r"signal=None .*: set it to a string or a list of strings\."),
        (ERPDConfig, {"signal_weights": 1.0}, r"signal_weights=1.0 .*: set it to a list of numbers or None"),
        (ERPDConfig, {"signal_weights": ["1"]}, r"set it to a list of numbers or None"),
        (ERPDConfig, {"keep_teachers": "yes"}, r"keep_teachers='yes' .*: set it to True or False"),
        (DRPOConfig, {"trust_region_radius": "0.1"}, r"trust_region_radius='0.1' .*: set it to a number or None"),
        (DRPOConfig, {"trust_region": 3}, r"trust_region=3 .*: set it to a string"),
        (RLADConfig, {"teacher_mixture_alpha": None}, r"teacher_mixture_alpha=None .*: set it to a number"),
        (RLADConfig, {"kdrl_coef": True}, r"kdrl_coef=True .*: set it to a number"),
        (RLADConfig, {"teacher_model_init_kwargs": 3}, "set it to a dictionary or a string or None"),
        (TrOPDConfig, {"outlier_top_k": 8.0}, r"outlier_top_k=8.0 .*: set it to a whole number"),
        (TrOPDConfig, {"temperature": "1"}, r"temperature='1' .*: set it to a number"),
    ],
)
def test_settings_of_another_type_are_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config(config_class, **settings)


def test_a_setting_that_is_changed_later_is_checked_too():
    args = config(DRPOConfig)
    args.trust_region_radius = "0.1"
    with pytest.raises(ValueError, match=r"trust_region_radius='0.1' has the wrong type"):
        DRPOTrainer("no such model", tiny.digits_reward, args, tiny.prompts())


def test_numbers_of_numpy_are_numbers():
    check_values(config(DRPOConfig, trust_region_radius=np.float32(0.1)), DRPOConfig)
    check_values(config(ERPDConfig, rounds=np.int64(2), signal_weights=[1]), ERPDConfig)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_the_name_of_a_tokenizer_is_not_one(trainer_class):
    arguments = {"teacher_model": tiny.policy()} if trainer_class in (RLADTrainer, TrOPDTrainer) else {}
    with pytest.raises(TypeError, match=r"got a str: pass AutoTokenizer.from_pretrained\('org/name'\)"):
        trainer_class(
            "no such model",
            args=config(TRAINERS[trainer_class]),
            train_dataset=tiny.prompts(),
            processing_class="org/name",
            **arguments,
        )


# ---- data


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (("id", "question"), r"dataset.rename_column\('question', 'prompt'\)"),
        (("answer", "Problem"), r"dataset.rename_column\('Problem', 'prompt'\)"),
        (("sentence",), r"dataset.rename_column\('sentence', 'prompt'\)"),
        (("id", "answer"), r"rename the one that holds the prompts to 'prompt' with dataset.rename_column\(\)"),
        (
            ("id", "messages"),
            r"dataset.map\(lambda row: \{'prompt': row\['messages'\]\[:-1\]\}, remove_columns='messages'\)",
        ),
    ],
)
def test_the_advice_names_the_column_that_holds_the_prompts(columns, advice):
    dataset = Dataset.from_dict({column: ["1+1="] for column in columns})
    with pytest.raises(ValueError, match=f"but `train_dataset` has only .*: .*{advice}"):
        check_prompt_column("DRPOTrainer", dataset)


def test_conversations_are_renamed_where_messages_are_read():
    dataset = Dataset.from_dict({"conversations": [[{"role": "user", "content": "1"}]]})
    with pytest.raises(ValueError, match=r"dataset.rename_column\('conversations', 'messages'\)"):
        known_columns("TrOPDTrainer", dataset, "train_dataset", ("messages", "prompt"))


def test_what_the_advice_makes_of_messages_are_the_prompts():
    question, answer = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
    dataset = Dataset.from_dict({"messages": [[question, answer]]})
    with pytest.raises(ValueError, match="make prompts of the messages") as error:
        check_prompt_column("DRPOTrainer", dataset)
    code = str(error.value).split("e.g. ")[1].rstrip(".")
    assert eval(code, {"dataset": dataset}).to_list() == [{"prompt": [question]}]


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_dict({"prompt": []}),
        Dataset.from_list([]),
        [],
        IterableDataset.from_generator(lambda: iter([])),
    ],
    ids=["no rows", "nothing at all", "a list", "a stream"],
)
def test_an_empty_dataset_is_refused(dataset):
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"`{name}` has no rows: check whether its file is empty"):
            check_prompt_column("DRPOTrainer", **{"train_dataset": tiny.prompts(), name: dataset})


def test_datasets_that_are_not_one():
    with pytest.raises(ValueError, match=r"pass datasets.load_dataset\('org/data', split='train'\)"):
        check_prompt_column("DRPOTrainer", "org/data")
    with pytest.raises(ValueError, match=r"pass e.g. dataset\['test'\]"):
        check_prompt_column("DRPOTrainer", DatasetDict({"test": tiny.prompts()}))


# ---- what a policy loss returns

LOGPS = torch.zeros(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (LOGPS.sum(), ValueError, r"loss of shape \(\) for tokens of shape \(2, 3\): return one value per token"),
        (LOGPS.mean(1), ValueError, r"loss of shape \(2,\)"),
        (0.5, TypeError, "policy_loss returned a float: return a trl_ext.losses.TokenLoss, or a tensor"),
        (None, TypeError, "policy_loss returned a NoneType"),
        ((LOGPS, {}), TypeError, "policy_loss returned a tuple"),
        (LOGPS.detach(), ValueError, "a loss without a gradient: compute it from per_token_logps"),
    ],
)
def test_losses_that_would_be_broadcast_are_refused(result, error, message):
    with pytest.raises(error, match=message):
        checked_token_loss(result, LOGPS, "MyTrainer")


def test_a_plain_tensor_is_a_loss():
    assert checked_token_loss(-LOGPS, LOGPS, "MyTrainer").metrics == {}
    with torch.no_grad():
        checked_token_loss(LOGPS.detach(), LOGPS, "MyTrainer")  # of an evaluation


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (0.5, TypeError, "the metric 'x' as float: return a tensor"),
        (torch.zeros(3), ValueError, r"'x' in shape \(3,\): return one value per token, \(2, 3\), or per sequence"),
        ((torch.zeros(2),) * 2, ValueError, r"shape \(2,\): return one value and one weight per token, \(2, 3\)\."),
    ],
)
def test_metrics_that_cannot_be_averaged_are_refused(metric, error, message):
    from trl_ext.losses import TokenLoss

    with pytest.raises(error, match=message):
        checked_token_loss(TokenLoss(LOGPS, {"x": metric}), LOGPS, "MyTrainer")


@pytest.mark.parametrize("returns", ["a tensor", "a scalar"])
def test_a_users_loss_in_a_trainer(tmp_path, returns):
    class Reinforce(PolicyLossTrainer):
        def policy_loss(self, per_token_logps, behaviour_logps, advantages, mask, inputs):
            loss = -per_token_logps * advantages
            return loss if returns == "a tensor" else loss.mean()

    args = GRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=1))
    trainer = Reinforce(tiny.policy(), tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer())
    if returns == "a tensor":
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0
    else:
        with pytest.raises(ValueError, match=r"Reinforce.policy_loss returned a loss of shape \(\)"):
            trainer.train()


# ---- the sampler's settings


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"top_p": 1.0, "top_k": -1, "min_p": 0.0, "generation_kwargs": {"seed": 1, "stop": ["."]}}, []),
        ({"top_k": 5, "repetition_penalty": 1.1}, ["top_k", "repetition_penalty"]),
        ({"generation_kwargs": {"top_p": 0.5, "logit_bias": {3: -100}}}, ["top_p", "logit_bias"]),
        ({"generation_kwargs": {"temperature": 0.5}}, ["temperature"]),
        ({"temperature": 0.5, "generation_kwargs": {"temperature": 0.5}}, []),
        ({"generation_kwargs": {"frequency_penalty": 0.5}}, ["frequency_penalty"]),
        ({"generation_kwargs": {"presence_penalty": 0.5}}, ["presence_penalty"]),
        ({"generation_kwargs": {"bad_words": ["a"]}}, ["bad_words"]),
        ({"generation_kwargs": {"min_tokens": 5}}, ["min_tokens"]),
        ({"generation_kwargs": {"allowed_token_ids": [5]}}, ["allowed_token_ids"]),
        ({"generation_kwargs": {"structured_outputs": {"regex": "a"}}}, ["structured_outputs"]),
        ({"vllm_structured_outputs_regex": "[0-9]"}, ["vllm_structured_outputs_regex"]),
    ],
)
def test_settings_that_bias_the_ratio(settings, names):
    assert sorted(sampling_that_biases_the_ratio(config(DRPOConfig, **settings))) == sorted(names)


def test_the_advice_of_a_sequence_level_ratio_is_not_given(tmp_path, caplog):
    """TRL's for loss_type='luspo', which we would refuse."""
    trl_logger = logging.getLogger("trl.trainer.grpo_trainer")
    settings = tiny.grpo_settings(tmp_path, loss_type="luspo")
    arguments = (tiny.digits_reward, GRPOConfig(**settings), tiny.prompts())
    DRPOTrainer(tiny.policy(), *arguments, processing_class=tiny.tokenizer())
    assert "importance_sampling_level" not in caplog.text
    assert not trl_logger.filters
    from trl import GRPOTrainer

    GRPOTrainer(tiny.policy(), *arguments, processing_class=tiny.tokenizer())
    assert "When using `'luspo'` loss, `importance_sampling_level` should be" in caplog.text


def test_other_advice_is_given(caplog):
    with without_advice("some.logger", "When using"):
        logging.getLogger("some.logger").warning("When using this, do that.")
        logging.getLogger("some.logger").warning("Mind the gap.")
    assert "Mind the gap." in caplog.text
    assert "do that" not in caplog.text


# ---- adapters under FSDP


def refused(situation, *trainers):
    return [pytest.mark.supports(trainer, situation, refused=True) for trainer in trainers]


FSDP1 = "FSDP1, because PEFT then saves an empty one: set fsdp_version to 2"
HEAD = "cannot train the LM head .* remove it from modules_to_save"


@pytest.mark.parametrize(
    ("version", "lora", "fused_head", "message"),
    [
        pytest.param(1, {}, True, FSDP1, marks=refused("FSDP1, LoRA", "drpo", "rlad", "erpd")),
        pytest.param(1, {}, False, FSDP1, marks=refused("FSDP1, LoRA", "tropd")),
        pytest.param(
            *(2, {"modules_to_save": ["lm_head"]}, True, HEAD),
            marks=refused("FSDP2, LoRA with a trained head", "drpo", "rlad", "erpd"),
        ),
        (2, {"modules_to_save": ["lm_head"]}, False, None),
        (2, {}, True, None),
        (2, None, True, None),
        (1, None, True, None),
        (None, {"modules_to_save": ["lm_head"]}, True, None),
    ],
)
def test_adapters_that_fsdp_would_not_train_or_save(version, lora, fused_head, message):
    model = tiny.policy()
    if lora is not None:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **lora))
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    trainer = SimpleNamespace(
        is_fsdp_enabled=version is not None, model=model, accelerator=SimpleNamespace(state=state)
    )
    if message is None:
        check_sharded_adapter(trainer, fused_head)
    else:
        with pytest.raises(ValueError, match=message):
            check_sharded_adapter(trainer, fused_head)
