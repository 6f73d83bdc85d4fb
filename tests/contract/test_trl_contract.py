"""What we rely on in TRL. When one of these fails, TRL has changed: the message says what, and where we rely on it."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from textwrap import dedent

import pytest
import tiny
import torch
import trl
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

from trl_ext import DRPOConfig, DRPOTrainer, PolicyLossTrainer, RLADTrainer
from trl_ext.arguments import AGGREGATIONS


HERE = "see trl_ext/policy_loss_trainer.py"


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return dedent(inspect.getsource(inspect.unwrap(function)))


def test_version():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), (
        "raise the range in pyproject.toml on purpose"
    )


@pytest.mark.parametrize("trainer_class", [PolicyLossTrainer, DRPOTrainer])
def test_constructor_takes_the_same_arguments_in_the_same_order(trainer_class):
    theirs, ours = inspect.signature(GRPOTrainer.__init__), inspect.signature(trainer_class.__init__)
    assert list(ours.parameters) == list(theirs.parameters), f"GRPOTrainer's arguments changed, {HERE}"
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default, f"the default of {name} changed, {HERE}"


def test_rlad_takes_a_teacher_besides():
    theirs, ours = inspect.signature(GRPOTrainer.__init__), inspect.signature(RLADTrainer.__init__)
    assert list(ours.parameters) == [*theirs.parameters, "teacher_model"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_generate", ["self", "prompts"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("log", ["self", "logs", "start_time"]),
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (
            "get_off_policy_mask",
            ["advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold"],
        ),
    ],
)
def test_signatures_of_overridden_methods(method, expected):
    assert parameters(getattr(GRPOTrainer, method)) == expected, f"GRPOTrainer.{method} changed, {HERE}"


def test_scoring_takes_the_model_first_and_returns_three_values():
    method = GRPOTrainer._get_per_token_logps_and_entropies
    assert parameters(method)[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"], HERE
    returned = [node for node in ast.walk(ast.parse(source(method))) if isinstance(node, ast.Return)]
    assert [len(node.value.elts) for node in returned] == [3], f"its return value changed, {HERE}"


def line_of(text, fragment):
    positions = [i for i, line in enumerate(text.splitlines()) if fragment in line]
    assert positions, f"GRPOTrainer._compute_loss no longer contains {fragment!r}, {HERE}"
    return positions[0]


def test_the_loss_reads_advantages_and_clips_after_the_log_probabilities():
    """The order of events that the inherited loss relies on."""
    text = source(GRPOTrainer._compute_loss)
    scored = line_of(text, "self._get_per_token_logps_and_entropies(")
    for fragment in (
        'advantages = inputs["advantages"]',
        'inputs.get("old_per_token_logps")',
        'inputs.get("sampling_per_token_logps", old_per_token_logps)',
        "self.get_off_policy_mask(",
        "coef_2 = torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "coef_1 = torch.clamp(coef_1, max=self.args.delta)",
        "per_token_loss = -torch.min(per_token_loss1, per_token_loss2)",
    ):
        assert line_of(text, fragment) > scored, f"{fragment!r} now comes before the log-probabilities, {HERE}"
    aggregated = f'self.loss_type in ["{AGGREGATIONS[0]}", "bnpo", "dr_grpo", "dapo", "luspo"]'
    assert line_of(text, aggregated) > scored, f"the loss types with clipping changed, {HERE}"
    kl = line_of(text, "per_token_kl = per_token_kl * coef_1")
    assert kl < line_of(text, "coef_1 = torch.clamp("), f"the KL now reads the clipped ratio, {HERE}"


def test_the_old_pass_comes_before_the_reference_pass_under_the_same_condition():
    text = source(GRPOTrainer._generate_and_score_completions)
    condition = "if self.args.gradient_accumulation_steps % generate_every != 0 or ("
    assert condition in text, f"when old log-probabilities are computed changed, {HERE}"
    assert text.index("old_per_token_logps, _, _ = self._get") < text.index("ref_per_token_logps, _, _ = self._get")
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in text, HERE


def test_the_fifth_value_of_generate_is_the_samplers_log_probabilities():
    returned = [node for node in ast.walk(ast.parse(source(GRPOTrainer._generate))) if isinstance(node, ast.Return)]
    names = [element.id for element in returned[-1].value.elts]
    assert names[4] == "logprobs", f"GRPOTrainer._generate returns {names}, {HERE}"
    assert len(names) == 8


def test_batch_keys(tmp_path):
    path = tiny.save_policy(tmp_path / "policy")
    args = GRPOConfig(**tiny.grpo_settings(tmp_path, beta=0.1))
    trainer = GRPOTrainer(path, tiny.digits_reward, args, tiny.prompts(), rollout_func=tiny.rollout)
    trainer.model.train()
    batch = trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
    expected = {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
        "sampling_per_token_logps",
        "ref_per_token_logps",
    }
    assert set(batch) == expected, f"the rollout batch changed, {HERE}"
    assert batch["advantages"].shape == (8,)
    assert batch["sampling_per_token_logps"].isnan().any(), "a missing log-probability is no longer NaN"


def test_state_that_is_saved_and_restored(tmp_path):
    path = tiny.save_policy(tmp_path / "policy")
    args = GRPOConfig(**tiny.grpo_settings(tmp_path))
    trainer = GRPOTrainer(path, tiny.digits_reward, args, tiny.prompts())
    message = "see trl_ext/rollout_checkpoint.py"
    assert trainer._step == 0, message
    assert trainer._buffered_inputs is None, message
    for name in ("epsilon_low", "epsilon_high", "use_vllm", "vllm_importance_sampling_correction", "num_iterations"):
        assert hasattr(trainer, name), f"GRPOTrainer.{name} is gone, {HERE}"


def test_config_fields():
    names = {field.name for field in fields(GRPOConfig)}
    relied_on = {
        *("importance_sampling_level", "loss_type", "epsilon", "epsilon_high", "delta", "steps_per_generation"),
        *("gradient_accumulation_steps", "num_iterations", "vllm_importance_sampling_mode", "top_p", "top_k", "min_p"),
        *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "repetition_penalty"),
    }
    assert relied_on <= names, f"GRPOConfig lost {relied_on - names}"
    ours = {field.name for field in fields(DRPOConfig)} - names
    own = {"trust_region", "trust_region_radius", "trust_region_anchor", "dppo_ratio_cap"}
    assert ours == own, "TRL took one of our names"


def test_a_clip_beyond_every_ratio_is_a_constant_without_a_gradient():
    """The property of `torch.clamp` and `torch.min` that the inherited loss needs."""
    ratio = torch.tensor([1e-9, 1.0, 4e8], requires_grad=True)
    loss = torch.tensor([0.3, -2.0, 0.0], requires_grad=True)
    first, second = ratio.clamp(1 - float("inf"), 1 - 2.0), ratio.clamp(max=-1.0)
    surrogate = -torch.min(first * loss, second * loss)
    surrogate.sum().backward()
    assert torch.equal(surrogate, loss)
    assert torch.equal(loss.grad, torch.ones(3))
    assert torch.equal(ratio.grad, torch.zeros(3))


def test_plain_import_is_light():
    """`import trl_ext`, its losses and the packages of its methods import neither TRL nor transformers."""
    modules = ", ".join(f"trl_ext.{name}" for name in ("losses", "drpo", "rlad", "tropd", "erpd"))
    code = f"import sys, {modules}; print([name for name in ('trl', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
