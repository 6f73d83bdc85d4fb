"""With PPO's clip as the policy loss, `PolicyLossTrainer` is `GRPOTrainer`: same logs, gradients and parameters."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import PolicyLossTrainer
from trl_ext.losses import ppo_clip_loss


class PolicyClipTrainer(PolicyLossTrainer):
    def policy_loss(self, per_token_logps, behaviour_logps, advantages, mask, inputs):
        if behaviour_logps is None:
            behaviour_logps = per_token_logps.detach()
        return ppo_clip_loss(
            per_token_logps,
            behaviour_logps,
            advantages,
            mask,
            epsilon_low=self.args.epsilon,
            epsilon_high=self.args.epsilon_high or self.args.epsilon,
            ratio_cap=self.args.delta,
        )


def env_mask_rollout(prompts, trainer):
    """Every third token is the environment's, not the policy's."""
    output = tiny.rollout(prompts, trainer)
    output["env_mask"] = [[int(i % 3 != 2) for i in range(len(ids))] for ids in output["completion_ids"]]
    return output


OPTIONS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo"},
    "on policy": {"num_iterations": 1},
    "steps_per_generation": {"num_iterations": 1, "steps_per_generation": 4, "per_device_train_batch_size": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
    "accumulation grpo": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "loss_type": "grpo"},
    "clip higher": {"epsilon": 0.1, "epsilon_high": 0.3},
    "two-sided clip": {"delta": 1.25},
    "kl": {"beta": 0.1},
    "kl without bias correction": {"beta": 0.1, "use_bias_correction_kl": False},
    "kl, two-sided clip": {"beta": 0.1, "delta": 1.25, "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.05},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.05},
    "high-entropy tokens": {"top_entropy_quantile": 0.4, "beta": 0.1},
    "the highest entropy alone": {"top_entropy_quantile": 0.0},
    "entropy bonus on high-entropy tokens": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "beta": 0.1},
    "truncated completions": {"mask_truncated_completions": True},
    "unscaled rewards": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "padding": {"pad_to_multiple_of": 8},
    "everything": {
        "loss_type": "bnpo",
        "beta": 0.05,
        "delta": 1.4,
        "entropy_coef": 0.02,
        "top_entropy_quantile": 0.7,
        "off_policy_mask_threshold": 0.02,
        "mask_truncated_completions": True,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
    },
}


def train(trainer_class, path, output_dir, rollout_func=None, peft_config=None, **overrides):
    args = GRPOConfig(**tiny.grpo_settings(output_dir, **overrides))
    trainer = trainer_class(
        path, tiny.digits_reward, args, tiny.prompts(), rollout_func=rollout_func, peft_config=peft_config
    )
    gradients = []
    trainer.add_callback(_GradientRecorder(gradients))
    trainer.train()
    logs = [
        {k: v for k, v in log.items() if "time" not in k and "per_second" not in k}
        for log in trainer.state.log_history
    ]
    return logs, gradients, dict(trainer.model.named_parameters())


class _GradientRecorder(TrainerCallback):
    def __init__(self, gradients):
        self.gradients = gradients

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


OURS_ALONE = {"sampling/fresh_log_ratio_abs"}  # where the sampler gives log-probabilities


def assert_same_run(ours, theirs, micro_batches=1):
    for ours_step, theirs_step in zip(ours[0], theirs[0], strict=True):
        assert set(ours_step) - OURS_ALONE == set(theirs_step)
        for name, expected in theirs_step.items():
            if micro_batches == 1 or not name.startswith(
                "clip_ratio"
            ):  # TRL's mean is over micro-batches, ours tokens
                assert ours_step[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    for ours_step, theirs_step in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(ours_step, theirs_step, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parity(path, tmp_path, options):
    theirs = train(GRPOTrainer, path, tmp_path, **options)
    ours = train(PolicyClipTrainer, path, tmp_path, **options)
    assert_same_run(ours, theirs, options.get("gradient_accumulation_steps", 1))
    if options.get("num_iterations") != 1:  # else the comparison would not have reached the clip
        assert max(log.get("clip_ratio/region_mean", 0.0) for log in theirs[0]) > 0.02


def test_parity_with_rollout_func_and_environment_tokens(path, tmp_path):
    theirs = train(GRPOTrainer, path, tmp_path, rollout_func=env_mask_rollout, beta=0.1)
    ours = train(PolicyClipTrainer, path, tmp_path, rollout_func=env_mask_rollout, beta=0.1)
    assert_same_run(ours, theirs)


def test_parity_with_lora(path, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = train(GRPOTrainer, path, tmp_path, peft_config=lora, beta=0.1)
    ours = train(PolicyClipTrainer, path, tmp_path, peft_config=lora, beta=0.1)
    assert_same_run(ours, theirs)


def test_parity_with_mixture_of_experts(tmp_path):
    path = tiny.save_policy(tmp_path / "moe", moe=True)
    theirs = train(GRPOTrainer, path, tmp_path)
    ours = train(PolicyClipTrainer, path, tmp_path)
    assert theirs[0][0]["aux_loss"] > 0
    assert_same_run(ours, theirs)


def test_parity_of_evaluation(path, tmp_path):
    losses = []
    for trainer_class in (GRPOTrainer, PolicyClipTrainer):
        args = GRPOConfig(**tiny.grpo_settings(tmp_path, per_device_eval_batch_size=8, beta=0.1))
        trainer = trainer_class(path, tiny.digits_reward, args, tiny.prompts(), tiny.prompts(8))
        torch.manual_seed(3)
        metrics = trainer.evaluate()
        losses.append({k: v for k, v in metrics.items() if "time" not in k and "per_second" not in k})
    # In evaluation the policy is on policy, so that both clip nothing; TRL logs the zeros, as we do here
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-7)
    assert not math.isnan(losses[1]["eval_loss"])
