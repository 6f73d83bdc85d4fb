"""A DRPOTrainer on a tiny policy, its metrics, and a rollout batch that is some way off it."""

import math

import tiny
import torch

from trl_ext import DRPOConfig, DRPOTrainer


REGION_METRICS = {
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "probability_shift/mean",
    "probability_shift/max",
    "outside_region/positive",
    "outside_region/negative",
}
REGULARIZER_METRICS = REGION_METRICS | {"gradient_weight/mean", "gradient_weight/min", "regularizer"}
MASK_METRICS = REGION_METRICS | {"masked/positive", "masked/negative"}


def make_trainer(path, tmp_path, config_class=DRPOConfig, trainer_class=DRPOTrainer, eval_dataset=None, **kwargs):
    trainer_arguments = ("peft_config", "rollout_func", "callbacks")
    arguments = {name: kwargs.pop(name) for name in trainer_arguments if name in kwargs}
    args = config_class(**tiny.grpo_settings(tmp_path, **kwargs))
    return trainer_class(path, tiny.digits_reward, args, tiny.prompts(), eval_dataset, **arguments)


def region_metrics(log):
    return {name for name in log if name in REGULARIZER_METRICS | MASK_METRICS}


def stale_batch(trainer, sampler=False):
    """A rollout batch whose old policy, and sampler, are some way off the current policy."""
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
    generator = torch.Generator().manual_seed(0)
    shape = inputs["completion_ids"].shape
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        shape[1],
    )
    inputs["old_per_token_logps"] = logps.detach() + 0.5 * torch.randn(shape, generator=generator)
    if sampler:
        inputs["sampling_per_token_logps"] = logps.detach() + 0.5 * torch.randn(shape, generator=generator)
        inputs["sampling_per_token_logps"][:, 1] = math.nan
    return inputs
