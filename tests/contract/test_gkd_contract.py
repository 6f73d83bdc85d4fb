"""What TrOPDTrainer relies on in TRL's GKDTrainer and SFTTrainer and in transformers' Trainer."""

import inspect
from dataclasses import fields
from textwrap import dedent

import pytest
import tiny
from transformers import Trainer
from trl import GRPOConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.utils import DataCollatorForChatML
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import unwrap_model_for_generation

from trl_ext import TrOPDConfig, TrOPDTrainer
from trl_ext.teacher import TeacherMixin
from trl_ext.tropd.prompts import PromptCollator
from trl_ext.tropd.vllm_settings import VLLMSettings
from trl_ext.whole_checkpoint import WholeCheckpoints


HERE = "see trl_ext/tropd/tropd_trainer.py"


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return dedent(inspect.getsource(inspect.unwrap(function)))


def test_the_chain_of_classes():
    assert TrOPDTrainer.__bases__ == (TeacherMixin, WholeCheckpoints, GKDTrainer)
    assert GKDTrainer.__mro__[1] is SFTTrainer, HERE  # whose constructor is called
    assert issubclass(TrOPDConfig, GKDConfig)


@pytest.mark.parametrize(
    ("owner", "method", "expected"),
    [
        (Trainer, "get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        (Trainer, "_get_num_items_in_batch", ["self", "batch_samples", "device"]),
        (Trainer, "_prepare_inputs", ["self", "inputs"]),
        (Trainer, "_get_train_sampler", ["self", "train_dataset"]),
        (Trainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (SFTTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (SFTTrainer, "prediction_step", ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"]),
        (GKDTrainer, "training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        (SFTTrainer, "log", ["self", "logs", "start_time"]),
    ],
)
def test_signatures_of_overridden_methods(owner, method, expected):
    assert parameters(getattr(owner, method)) == expected, f"{owner.__name__}.{method} changed, {HERE}"


def test_random_state_is_restored_after_the_batches_and_before_the_first_step():
    """The order of events that keeps rollouts out of get_batch_samples."""
    text = source(Trainer._run_epoch)
    fetched, restored, step = (
        text.index(fragment)
        for fragment in ("self.get_batch_samples(", "if rng_to_sync:", "self.training_step(model, inputs")
    )
    assert fetched < restored < step, HERE


def test_a_scaled_loss_is_not_divided_again():
    assert "if self.loss_is_scaled_for_ga is not None:" in source(Trainer.training_step), HERE


def test_gkds_constructor_does_nothing_else_that_we_skip():
    """Our constructor calls that of SFTTrainer, and sets what GKD's sets."""
    names = set()
    for line in source(GKDTrainer.__init__).splitlines():
        if line.strip().startswith("self.") and " = " in line:
            names.add(line.strip().split(" = ")[0])
    known = {"lmbda", "beta", "temperature", "seq_kd", "teacher_model", "generation_config", "generation_kwargs"}
    assert names == {f"self.{name}" for name in known} | {"self.generation_config.eos_token_id"}, HERE


def test_our_collator_has_the_keys_that_we_read_of_gkds():
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}]
    theirs = DataCollatorForChatML(tiny.tokenizer(), max_length=64)(rows)
    assert PromptCollator(tiny.tokenizer())(rows).keys() <= theirs.keys()


def test_vllm_settings_are_those_of_grpo():
    theirs = {setting.name: setting.default for setting in fields(GRPOConfig)}
    for setting in fields(VLLMSettings):
        assert theirs[setting.name] == setting.default, f"{setting.name} changed, see trl_ext/tropd/vllm_settings.py"
    unknown = {name for name in theirs if name.startswith(("vllm", "use_vllm"))} - {
        f.name for f in fields(VLLMSettings)
    }
    assert all("importance_sampling" in name for name in unknown), f"TRL has new vLLM settings: {unknown}"


def test_names_that_are_ours():
    theirs = {setting.name for setting in fields(GKDConfig)}
    ours = {setting.name for setting in fields(TrOPDConfig)} - theirs
    assert {"objective", "trust_region", "outlier_loss", "guidance", "num_generations"} <= ours, "TRL took a name"


def test_generation():
    names = parameters(unwrap_model_for_generation)
    assert names[:2] == ["model", "accelerator"]
    expected = {"gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs"}
    assert expected <= set(names), "see trl_ext/tropd/sampling.py"
    assert {"prompts", "images", "num_generations"} <= set(parameters(VLLMGeneration.generate))
    assert hasattr(VLLMGeneration, "sync_weights")
