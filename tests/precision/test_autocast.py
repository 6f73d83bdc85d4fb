"""Each trainer under bfloat16 and float16 autocast trains what it trains in float32, within a stated error."""

from pathlib import Path

import pytest
import tiny
import torch
import tropd_runs
from fixed_rollouts import rollout
from tiny_erpd import right_or_wrong
from tiny_erpd import settings as erpd_settings

from trl_ext import (
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    RLADConfig,
    RLADTrainer,
    TrOPDConfig,
    TrOPDTrainer,
)


# The dtype's own rounding, 2^-9 and 2^-12, grows through two layers and the head
ERRORS = {torch.bfloat16: 0.05, torch.float16: 0.01}
COMMON = {"learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 1e9}


def make_trainer(name: str, path: str, out: Path, bf16: bool):
    common = COMMON | {"bf16": bf16}
    if name == "tropd":
        trainer = TrOPDTrainer(
            path,
            tiny.policy(seed=1),
            TrOPDConfig(**tropd_runs.settings(out, **common, max_steps=2)),
            train_dataset=tropd_runs.sums(16),
            processing_class=tiny.tokenizer(),
        )
        tropd_runs.hash_rollouts(trainer)
        return trainer
    trainer_class, config_class = {
        "drpo": (DRPOTrainer, DRPOConfig),
        "rlad": (RLADTrainer, RLADConfig),
        "erpd": (ERPDTrainer, ERPDConfig),
    }[name]
    if name == "erpd":
        settings = erpd_settings(out, **common, prompts_per_round=4, extraction_passes=1, distillation_passes=1)
        settings |= {"extraction_learning_rate": 0.05}  # the teacher's signal is not to be lost in the rounding
    else:
        settings = tiny.grpo_settings(out, **common, max_steps=2, beta=0.05, shuffle_dataset=False)
    return trainer_class(
        path,
        right_or_wrong if name == "erpd" else tiny.digits_reward,
        config_class(**settings),
        tiny.prompts(16),
        rollout_func=rollout,
        **({"teacher_model": tiny.policy(seed=1)} if name == "rlad" else {}),
    )


def train(name: str, path: str, out: Path, dtype: torch.dtype):
    """Losses and gradient norms of a run, its weights, and the dtypes in which the model and the loss computed."""
    trainer = make_trainer(name, path, out, bf16=dtype != torch.float32)
    if dtype == torch.float16:  # accelerate refuses it on a CPU, where torch's autocast runs
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    projections, losses = set(), set()
    hook = trainer.model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: projections.add(output.dtype)
    )
    compute_loss = trainer.compute_loss

    def remember(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.add(loss.dtype)
        return loss

    trainer.compute_loss = remember
    trainer.train()
    hook.remove()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    return torch.tensor(logs), dict(trainer.model.named_parameters()), projections, losses


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def in_float32(path, tmp_path_factory):
    runs = {}

    def of(name):
        if name not in runs:
            runs[name] = train(name, path, tmp_path_factory.mktemp("run"), torch.float32)
        return runs[name]

    return of


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=pytest.mark.supports(name, f"{title} autocast"), id=f"{name}-{title}")
        for dtype, title in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"))
        for name in ("drpo", "rlad", "tropd", "erpd")
    ],
)
def test_autocast_trains_what_float32_trains(name, dtype, path, in_float32, tmp_path):
    expected, expected_weights, projections, _ = in_float32(name)
    assert projections == {torch.float32}
    assert (expected[:, 1] > 0.01).all()  # else there would be nothing to compare
    logs, weights, projections, losses = train(name, path, tmp_path, dtype)
    assert projections == {dtype}
    assert losses == {torch.float32}
    torch.testing.assert_close(logs, expected, rtol=ERRORS[dtype], atol=ERRORS[dtype])
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    start = dict(tiny.policy().named_parameters())
    moved, expected = (
        torch.cat([(run[name] - start[name]).flatten() for name in start]) for run in (weights, expected_weights)
    )
    assert 0 < (moved - expected).norm() < 2 * ERRORS[dtype] * expected.norm()
