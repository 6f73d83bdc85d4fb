"""Samples the fixed set of a round with TRL's own rollouts."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger

from trl_ext.erpd.fixed_set import FixedSet, Row, collate, rows_of, share_out
from trl_ext.losses import outcomes_of


if TYPE_CHECKING:
    from trl_ext.erpd.erpd_trainer import ERPDTrainer

logger = get_logger(__name__)


def sample_fixed_set(trainer: "ERPDTrainer", round_number: int) -> tuple[FixedSet, dict[str, float]]:
    """The rollouts of a round, generation by generation as GRPO makes them, and what is worth logging about them."""
    dataset = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    prompts = prompts_of_round(trainer, round_number)
    per_generation = trainer.args.generation_batch_size // trainer.num_generations
    chunks: list[list[Row]] = []
    rewards_of_chunks: list[torch.Tensor] = []  # of all processes
    for start in range(0, len(prompts), per_generation):
        trainer.describe(f"Round {round_number}/{trainer.schedule.rounds}: sampling, prompt {start}/{len(prompts)}")
        rows = [dataset[i] for i in prompts[start : start + per_generation]]
        rows = [dict(row) for row in rows for _ in range(trainer.num_generations)]
        local = len(rows) // trainer.accelerator.num_processes
        first = trainer.accelerator.process_index * local
        rollouts, rewards = trainer.sample(rows[first : first + local])
        if rollouts.get("num_images") is not None:
            raise ValueError(
                "The rollouts hold images, and the fixed set keeps tokens alone: leave images out of the prompts, or "
                "train with DRPOTrainer."
            )
        chunks.append(rows_of(rollouts, rewards))
        rewards_of_chunks.append(trainer.rewards.float().cpu())
    all_rewards = torch.stack(rewards_of_chunks)  # (chunk, rollout)
    groups = all_rewards.view(-1, trainer.num_generations)
    agrees = ((groups - groups.nanmean(1, keepdim=True)).abs().nan_to_num() < 1e-6).all(1)
    agreeing = int(agrees.sum())
    outcomes = outcomes_of(all_rewards)
    if trainer.args.extraction_skips_agreeing_prompts:
        outcomes.view_as(groups)[agrees] = torch.nan
    for chunk, chunk_outcomes in zip(chunks, outcomes, strict=True):
        first = trainer.accelerator.process_index * len(chunk)
        for row, outcome in zip(chunk, chunk_outcomes[first:], strict=False):
            row["outcomes"] = outcome
    if agreeing == len(prompts):
        logger.warning(
            f"Round {round_number}: the rollouts of every prompt have the same reward, so that the set teaches "
            "nothing: choose easier or harder prompts, or raise num_generations."
        )
    padded = partial(
        collate, pad_token_id=trainer._tokenizer.pad_token_id, pad_to_multiple_of=trainer.pad_to_multiple_of
    )
    size, seed = trainer.args.per_device_train_batch_size, trainer.args.seed + round_number
    fixed_set = share_out(chunks, trainer.accelerator, size, seed, padded)
    return fixed_set, {
        "fixed_set/prompts": len(prompts),
        "fixed_set/prompts_without_signal": agreeing,
        "fixed_set/rollouts": len(prompts) * trainer.num_generations,
        "fixed_set/tokens": fixed_set.num_tokens,
    }


def prompts_of_round(trainer: "ERPDTrainer", round_number: int) -> list[int]:
    """Indices into the data set: no prompt comes again before a round needs more than are left."""
    length, size = len(trainer.train_dataset), trainer.prompts_per_round
    epoch, place = divmod(round_number - 1, length // size)
    order = torch.arange(length)
    if trainer.shuffle_dataset:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(trainer.args.seed + epoch))
    return order[place * size : (place + 1) * size].tolist()
