"""Where the fixed set of a round comes from: TRL's own rollouts, or rollouts that are stored in the dataset."""

from enum import Enum
from typing import Any

import torch
from accelerate.logging import get_logger

from trl_ext.erpd.extraction import EXTRACTION_LOSSES
from trl_ext.erpd.fixed_set import FixedSet, RoundRollouts, Row, rows_of, share_out
from trl_ext.erpd.growing_set import GrowingSet, set_aside_later_rounds
from trl_ext.erpd.host import Host
from trl_ext.erpd.schedule import as_list
from trl_ext.losses import outcomes_of
from trl_ext.losses.erpd import MIN_DIFFERENCE


logger = get_logger(__name__)

# What the policy of a later round was trained with, beside the teachers, signals and passes in `Host.identity`
POLICY_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "loss_type", "beta"),
    *("extraction_learning_rate", "extraction_lr_scheduler_type", "extraction_warmup_steps", "extraction_beta"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "signal_normalization", "signal_clip"),
    *("distillation_epsilon", "distillation_epsilon_high", "epsilon", "epsilon_high", "delta", "trust_region"),
    *(
        "distillation_learning_rate_decay",
        "trust_region_radius",
        "distillation_anchor",
        "outcome_advantage_weight",
        "use_bias_correction_kl",
    ),
    *("entropy_coef", "top_entropy_quantile", "optim", "weight_decay", "max_grad_norm"),
)
MIN_ADVANTAGE = 1e-2  # below it, an advantage is what rounding makes of equal rewards


def sample_rollouts(host: Host, round_number: int, rounds: int, resume_from: str | None) -> RoundRollouts:
    """
    The rollouts of a round, generation by generation as GRPO makes them.

    Each generation is written to the output directory as soon as it has its rewards. A run that was interrupted
    continues with the first missing generation, from the random state that this would have had.

    Args:
        resume_from (`str`, *optional*):
            Output directory of the run that is resumed.
    """
    args, accelerator = host.trainer.args, host.trainer.accelerator
    dataset, prompts = host.prompts(), prompts_of_round(host, round_number)
    per_generation = args.generation_batch_size // host.num_generations
    # Later rounds are sampled by a policy that the run itself has trained
    settings = {name: plain(getattr(args, name)) for name in POLICY_SETTINGS} if round_number > 1 else {}
    on_disk = GrowingSet(str(args.output_dir), round_number, host.identity() | settings, accelerator)
    if round_number == 1 and resume_from is None:
        set_aside_later_rounds(str(args.output_dir), accelerator)
    finished = on_disk.begin(resume_from)
    chunks: list[list[Row]] = []
    rewards: list[torch.Tensor] = []
    for number, start in enumerate(range(0, len(prompts), per_generation)):
        if number < finished:
            rows, rewards_of_generation, progress = on_disk.read(number)
            if number == finished - 1:
                host.restore_progress(progress)
                host.load_random_state(on_disk.generation_folder(number))
        else:
            host.describe(f"Round {round_number}/{rounds}: sampling, prompt {start}/{len(prompts)}")
            inputs = [dataset[i] for i in prompts[start : start + per_generation] for _ in range(host.num_generations)]
            local = len(inputs) // accelerator.num_processes
            first = accelerator.process_index * local
            sampled = host.sample([dict(row) for row in inputs[first : first + local]])
            if sampled.rollouts.get("num_images") is not None:
                raise ValueError(
                    "The rollouts hold images, but the fixed set keeps only tokens: leave images out of the prompts, "
                    "or train with DRPOTrainer."
                )
            rows, rewards_of_generation = rows_of(sampled.rollouts, sampled.own_rewards), sampled.rewards.float().cpu()
            host.save_random_state(on_disk.generation_folder(number))
            on_disk.write(number, rows, rewards_of_generation, host.progress())
        chunks.append(rows)
        rewards.append(rewards_of_generation)
    numbers = torch.arange(len(prompts)).repeat_interleave(host.num_generations)
    return RoundRollouts(chunks, torch.cat(rewards), numbers)


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return value.value if isinstance(value, Enum) else value


def prompts_of_round(host: Host, round_number: int) -> list[int]:
    """Indices into the dataset. No prompt is used again before a round needs more prompts than are left."""
    size = host.prompts_per_round
    epoch, place = divmod(round_number - 1, len(host.trainer.train_dataset) // size)
    return host.prompt_order(host.trainer.args.seed + epoch)[place * size : (place + 1) * size]


def make_fixed_set(host: Host, rollouts: RoundRollouts, round_number: int) -> tuple[FixedSet, dict[str, float]]:
    """The set of a round, and what is worth logging about it."""
    args, accelerator = host.trainer.args, host.trainer.accelerator
    rewards, prompts = rollouts.rewards, rollouts.prompts
    agrees = agreeing_prompts(rewards, prompts)
    outcomes = outcomes_of(rewards)
    # Several rewards may have advantages where all their sums are equal: then no outcome is better than another
    targets = torch.where(rewards.isfinite(), outcomes.nan_to_num(0.5), torch.nan)
    if args.extraction_skips_agreeing_prompts:
        outcomes[agrees[prompts]] = targets[agrees[prompts]] = torch.nan
    place = accelerator.process_index * len(rollouts.chunks[0])
    for chunk in rollouts.chunks:
        for row, outcome in zip(chunk, targets[place:], strict=False):
            row["outcomes"] = outcome
        place += accelerator.num_processes * len(chunk)
    size, seed = args.per_device_train_batch_size, args.seed + round_number
    fixed_set = share_out(rollouts.chunks, accelerator, size, seed, host.collate)

    # Not from the rewards alone: those of several functions may differ and have the same sum
    largest = torch.stack([batch["advantages"].abs().max() for batch in fixed_set.batches]).max()
    largest = accelerator.gather(largest[None].to(accelerator.device)).max()
    differ = bool((~agrees).any()) or bool(largest >= MIN_ADVANTAGE)
    reason = nothing_to_learn(rewards, outcomes, differ, as_list(args.extraction_loss))
    if reason is not None:
        fixed_set.is_informative = False
        logger.warning(f"Round {round_number} is skipped and leaves the policy as it is, because {reason}.")
    return fixed_set, {
        "fixed_set/prompts": len(agrees),
        "fixed_set/prompts_without_signal": int(agrees.sum()),
        "fixed_set/rollouts": len(rewards),
        "fixed_set/tokens": fixed_set.num_tokens,
        "fixed_set/skipped": float(reason is not None),
    }


def agreeing_prompts(rewards: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """
    Whether all rollouts of a prompt have the same reward, of shape `(prompts,)`. A rollout without a reward does not
    count.

    Args:
        rewards, prompts (`torch.Tensor` of shape `(rollouts,)`):
            As in [`RoundRollouts`].
    """
    infinite = torch.full((int(prompts.max()) + 1,), torch.inf)
    known = ~rewards.isnan()
    lowest = infinite.scatter_reduce(0, prompts[known], rewards[known], "amin")
    highest = (-infinite).scatter_reduce(0, prompts[known], rewards[known], "amax")
    return ~(highest - lowest >= MIN_DIFFERENCE)


def nothing_to_learn(rewards: torch.Tensor, outcomes: torch.Tensor, differ: bool, losses: list[str]) -> str | None:
    """
    Why nothing can be learned from a set, and what to do about it; `None` if something can.

    Args:
        rewards, outcomes (`torch.Tensor` of shape `(rollouts,)`):
            NaN for the rollouts that do not count.
        differ (`bool`):
            Whether some rollouts of the same prompt have different advantages.
        losses (`list[str]`):
            The objectives of stage 1.
    """
    known = rewards[~rewards.isnan()]
    if not len(known):
        return "none of its rollouts has a reward: check the reward function, which returned None for every completion"
    if not differ and known.max() - known.min() < MIN_DIFFERENCE:
        return (
            f"all of its {len(known)} rollouts have the same reward ({known[0]:g}): check the reward function, whose "
            "answer parser most likely fails on every completion"
        )
    if any(EXTRACTION_LOSSES[loss].compares_prompts for loss in losses) and outcomes.isfinite().any():
        return None
    if differ:
        return None
    return (
        f"the rollouts of every prompt have the same reward, from which {' and '.join(losses)} cannot learn: choose "
        "easier or harder prompts, or raise num_generations"
    )
