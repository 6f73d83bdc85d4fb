"""Random numbers of a step or a measurement of its own, without a trace in those of the training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


@contextmanager
def isolated_rng(accelerator: Accelerator, seed: int) -> Iterator[None]:
    """Random draws of torch inside this context depend on `seed` alone and do not change the draws after it."""
    device = accelerator.device
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


def engine_index(args: Any, process_index: int) -> int:
    """
    The number of the sampler that this process has, or has a part of: the ranks of one colocated vLLM engine must draw
    alike, all other processes differently.
    """
    ranks = args.vllm_tensor_parallel_size if args.use_vllm and args.vllm_mode == "colocate" else 1
    return process_index // ranks
