"""What ERPD relies on in TRL, transformers and DeepSpeed, in addition to what `test_trl_contract.py` checks."""

import importlib.util
import inspect
from dataclasses import fields
from textwrap import dedent

import pytest
from transformers import ProgressCallback, Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from trl_ext import ERPDConfig, ERPDTrainer


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return dedent(inspect.getsource(inspect.unwrap(function)))


def test_constructor_takes_the_same_arguments_in_the_same_order():
    theirs, ours = inspect.signature(GRPOTrainer.__init__), inspect.signature(ERPDTrainer.__init__)
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default, name


def test_names_of_settings_are_ours():
    """A setting that TRL had too would be shadowed."""
    theirs = {setting.name for setting in fields(GRPOConfig)}
    ours = {setting.name for setting in fields(ERPDConfig)} - theirs
    assert ours == set(vars(ERPDConfig)["__annotations__"]), "TRL took one of our names"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("set_initial_training_values", ["self", "args", "dataloader"]),
        ("create_scheduler", ["self", "num_training_steps", "optimizer"]),
        ("_finalize_training", ["self", "trial", "num_train_samples", "start_time"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("get_train_dataloader", ["self"]),
    ],
)
def test_signatures_of_overridden_methods(method, expected):
    assert parameters(getattr(GRPOTrainer, method)) == expected, "see trl_ext/erpd/erpd_trainer.py"


def test_the_data_loader_takes_a_sampler():
    expected = ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training"]
    assert parameters(Trainer._get_dataloader)[:6] == expected


def test_an_update_reads_the_settings_that_a_stage_changes():
    text = source(GRPOTrainer._compute_loss)
    for fragment in (
        "if self.beta != 0.0:",
        'inputs["ref_per_token_logps"]',
        "if self.top_entropy_quantile < 1.0:",
        "if self._entropy_bonus_enabled:",
        # the mean over sequences of the sum over their tokens
        "loss = (per_token_loss * mask).sum(-1).mean()",
        # the tokens of one accumulation window, of those of `steps_per_generation` micro-batches
        'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
        "normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
    ):
        assert fragment in text, f"GRPOTrainer._compute_loss no longer contains {fragment!r}"


def test_the_schedule_moves_on_before_the_step_counter():
    text = source(Trainer._run_epoch)
    assert text.index("self.lr_scheduler.step()") < text.index("self.state.global_step += 1")
    assert text.index("self.state.global_step += 1") < text.index("self._maybe_log_save_evaluate(")


def test_the_progress_bar():
    assert ProgressCallback().training_bar is None


def test_padding():
    assert parameters(pad) == ["tensors", "padding_value", "padding_side", "pad_to_multiple_of"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeeds_master_weights():
    """What `WeightsCopy` copies and calls; tests/distributed checks that this is enough."""
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "self.single_partition_of_fp32_groups" in source(DeepSpeedZeroOptimizer.update_lp_params)
    stage_3 = inspect.getsource(stage3)
    for fragment in (
        "self._partition_all_parameters()",
        "self._reassign_or_swap_out_partitioned_parameters(sub_group_id)",
        "self.persistent_parameters[0].all_gather(self.persistent_parameters)",
        "self.invalidate_secondary_tensor()",
    ):
        assert fragment in stage_3
    assert "self.fp32_partitioned_groups_flat[sub_group_id].data)" in stage_3
