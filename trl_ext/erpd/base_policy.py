"""The base policy of a round, kept in CPU memory while other policies are trained in its place."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file


class WeightsCopy:
    """
    A copy, in CPU memory, of the weights that a trainer trains: all of them, or only the adapter's.

    Where every process has all weights (one process, DDP), only the main process keeps the copy. Where they are
    sharded, each process keeps its shard: DeepSpeed's float32 master partitions, from which the weights of the model
    are derived when it is restored. Restoring is exact to the bit.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, once its model is prepared for training.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        self.keeps = self.sharded or trainer.accelerator.is_main_process
        self.tensors: list[torch.Tensor] = []

    @torch.no_grad()
    def take(self) -> "WeightsCopy":
        """Copies the weights as they are now."""
        if self.keeps:
            self.tensors = [weight.detach().to("cpu", copy=True) for weight in self._weights()]
        return self

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the copied weights. Every process must call this."""
        optimizer: Any = self.trainer.model_wrapped.optimizer if self.trainer.is_deepspeed_enabled else None
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            optimizer._partition_all_parameters()
        for i, weight in enumerate(self._weights()):
            if self.keeps:
                weight.copy_(self.tensors[i])
            if not self.sharded and self.trainer.accelerator.num_processes > 1:
                broadcast(weight.data)
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3: as at the end of its step
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            optimizer.invalidate_secondary_tensor()
        elif optimizer is not None:
            optimizer.update_lp_params()

    def save(self, folder: str) -> None:
        """Writes what this process keeps, as safetensors."""
        if self.keeps:
            Path(folder).mkdir(parents=True, exist_ok=True)  # the main process may not have made it yet
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(self.tensors)}, self._path(folder))

    def load(self, folder: str) -> "WeightsCopy":
        """Reads what `save` wrote."""
        if self.keeps:
            tensors = load_file(self._path(folder))
            self.tensors = [tensors[str(i)] for i in range(len(tensors))]
        return self

    def _path(self, folder: str) -> Path:
        return Path(folder) / self.file_name(self.trainer.accelerator.process_index)

    def file_name(self, process: int) -> str:
        """Name of a process's file in a checkpoint."""
        return f"base_policy_{process}.safetensors" if self.sharded else "base_policy.safetensors"

    def _weights(self) -> list[torch.Tensor]:
        """The tensors to copy, always in the same order."""
        if self.trainer.is_fsdp_enabled:
            reshard(self.trainer.model_wrapped)
        if not self.trainer.is_deepspeed_enabled:
            weights = [p for p in self.trainer.model.parameters() if p.requires_grad]
            return [getattr(weight, "_local_tensor", weight) for weight in weights]  # of FSDP2: the shard
        optimizer = self.trainer.model_wrapped.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3, ZeRO-1 and 2
            if hasattr(optimizer, name):
                return [group.data for group in getattr(optimizer, name)]
        raise ValueError(
            f"ERPD restores the base policy into the master weights of ZeRO-1, 2 and 3, but DeepSpeed runs with "
            f"{type(optimizer).__name__}: set zero_stage to 1, 2 or 3."
        )


def reshard(model: torch.nn.Module) -> None:
    """
    Makes FSDP free the gathered weights, so that `model.parameters()` are the shards that the optimizer updates.

    A forward pass without a backward pass leaves units gathered, the root unit by default: their parameters are then
    the gathered copies, and what is written to them is lost or overwrites the wrong elements.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard as free_gathered_weights

    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP2
            # Not module.reshard(): before PyTorch 2.13 it leaves the unit of the final norm and the LM head as it is,
            # which waits for the end of its forward pass, because TRL does not call the LM head
            state = module._get_fsdp_state()
            state._modules_to_run_forward.clear()
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in filter(None, groups):  # a unit without weights of its own has none
                group._to_sharded()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle  # None of a unit without weights of its own
            # Before the first forward pass there is no such attribute, and nothing gathered
            if handle is not None and hasattr(handle.flat_param, "_local_shard"):
                free_gathered_weights(module, handle, True)


def save_whole_policy(trainer: Any, folder: str) -> None:
    """`trainer.save_model`, which writes nothing where FSDP's checkpoints are shards (SHARDED_STATE_DICT)."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        trainer.save_model(folder, _internal_call=True)  # or it would be pushed to the Hub
        return
    of_checkpoints, plugin.state_dict_type = plugin.state_dict_type, "FULL_STATE_DICT"
    try:
        trainer.save_model(folder, _internal_call=True)
    finally:
        plugin.state_dict_type = of_checkpoints


def clear_optimizer_state(optimizer: Any) -> None:
    """Clears the averages and step counts of an optimizer, however it is wrapped."""
    while True:
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            optimizer._hp_optimizer_states_linked = False  # ZeRO's parameters refer to the old state
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # DeepSpeed's fused Adam counts here
