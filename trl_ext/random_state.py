"""Random numbers for one step or one measurement, which leave the random state of the training unchanged."""

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
    The index of the sampler that this process runs or shares: the ranks of one colocated vLLM engine must draw the
    same samples, all other processes different ones.
    """
    ranks = args.vllm_tensor_parallel_size if args.use_vllm and args.vllm_mode == "colocate" else 1
    return process_index // ranks
