"""What is measured of a policy between the stages: on held-out prompts with its own samples, and on the fixed set."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from trl_ext.erpd.host import Host
from trl_ext.random_state import engine_index, isolated_rng


Samples = list[dict[str, Any]]  # one dict per batch, on the CPU


def sampling_seed(trainer: Any) -> int:
    """A seed that differs between processes that sample independently."""
    return trainer.args.seed + engine_index(trainer.args, trainer.accelerator.process_index)


def own_samples(host: Host) -> Samples:
    """
    Completions of the held-out prompts, sampled and scored by the policy as it is, with their rewards.

    Every policy gets the same random numbers, so that policies are compared on equal terms, and the training continues
    as if nothing had been sampled.
    """
    trainer: Any = host.trainer
    # By name, because TRL keeps the loader of each name where data loader workers are persistent
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {None: trainer.eval_dataset}
    samples = []
    with isolated_rng(trainer.accelerator, sampling_seed(trainer)), host.measuring():
        for name, dataset in datasets.items():
            for number, rows in enumerate(trainer.get_eval_dataloader(name)):
                sampled = host.sample(rows)
                batch, rewards = sampled.rollouts, sampled.own_rewards
                logps, entropies = host.score(batch)
                if hasattr(dataset, "__len__"):  # the last batches are filled with prompts from the beginning
                    size, accelerator = trainer.args.per_device_eval_batch_size, trainer.accelerator
                    first = (number * accelerator.num_processes + accelerator.process_index) * size
                    again = torch.arange(first, first + len(rows)) >= len(dataset) * trainer.num_generations_eval
                    again = again.to(rewards.device)
                    rewards = rewards.masked_fill(again, torch.nan)
                    batch["completion_mask"] = batch["completion_mask"] * ~again[:, None]
                sample = {**batch, "rewards": rewards, "logps": logps, "entropies": entropies}
                samples.append({n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in sample.items()})
    return samples


def measure_samples(host: Host, samples: Samples, base_is_loaded: bool) -> dict[str, float]:
    r"""
    `reward`, `entropy` (nats per token) and, if the trainer holds the base policy now, the divergence
    \\( \mathrm{KL}(\pi \| \pi_0) \\) of the policy that `samples` are from: `kl_per_sequence` and `kl_per_token`.

    The estimate is the mean of \\( \log \pi - \log \pi_0 \\), which is unbiased and may come out below 0 for a small
    divergence.
    """
    accelerator = host.trainer.accelerator
    device = accelerator.device
    sums = torch.zeros(6, dtype=torch.float64)  # rewards, how many; entropy, tokens; log-ratio, sequences
    with host.measuring():
        for sample in samples:
            mask = (sample["completion_mask"] * sample.get("tool_mask", 1)).bool()
            rewards = sample["rewards"][sample["rewards"].isfinite()].double()
            sums[0] += rewards.sum()
            sums[1] += len(rewards)
            sums[2] += sample["entropies"][mask].double().sum()
            sums[3] += mask.sum()
            sums[5] += mask.any(1).sum()
            if base_is_loaded:
                batch = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in sample.items()}
                base_logps = host.score(batch)[0].cpu()
                sums[4] += (sample["logps"] - base_logps)[mask].double().sum()
    rewards, count, entropy, tokens, log_ratio, sequences = reduced(accelerator, sums)
    measures = {"reward": rewards / count if count else math.nan, "entropy": entropy / max(tokens, 1)}
    if base_is_loaded:
        measures |= {"kl_per_sequence": log_ratio / max(sequences, 1), "kl_per_token": log_ratio / max(tokens, 1)}
    return measures


def reduced(accelerator: Accelerator, sums: torch.Tensor) -> list[float]:
    """Sums over all processes."""
    # Not every device has float64: each sum travels as two float32, the second of which is the rounding error
    coarse = sums.float()
    parts = torch.stack([coarse, (sums - coarse.double()).float()]).to(accelerator.device)
    return accelerator.gather(parts[None]).cpu().double().sum(dim=(0, 1)).tolist()
