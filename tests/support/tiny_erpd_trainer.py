"""ERPDTrainer on a tiny policy, ready to train or to be asked for one of its steps."""

import tiny
import torch
from tiny_erpd import right_or_wrong, settings

from trl_ext import ERPDConfig, ERPDTrainer


def make_trainer(
    path, tmp_path, reward=right_or_wrong, dataset=None, eval_dataset=None, peft_config=None, **overrides
):
    """One pass in both stages over two prompts, which are one update, unless told otherwise."""
    defaults = {"prompts_per_round": 2, "extraction_passes": 1, "distillation_passes": 1}
    defaults |= {"per_device_eval_batch_size": 8}
    args = ERPDConfig(**settings(tmp_path, **defaults | overrides))
    torch.manual_seed(0)
    dataset = tiny.prompts(8) if dataset is None else dataset
    return ERPDTrainer(path, reward, args, dataset, eval_dataset, peft_config=peft_config)


def at_step(trainer, step):
    """The trainer as it is when it computes the loss of an optimizer step."""
    trainer.state.global_step = step
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def hand_made_batch():
    """A micro-batch of the set: three prompt tokens and four completion tokens, one of which does not count."""
    return {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[3, 4, 5, 0], [6, 7, 8, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "rewards": torch.tensor([1.0, 0.0]),
        "outcomes": torch.tensor([1.0, 0.0]),
    }
