"""Lets accelerate use FSDP on the CPU, where torch's FSDP runs, but which accelerate does not look for."""

import functools
import os

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import _state_dict_utils


def allow_fsdp_on_cpu() -> None:
    """What `AcceleratorState` does for FSDP on GPUs, for processes on CPUs too."""
    initialize = AcceleratorState.__init__

    def initialize_for_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize_for_fsdp
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # FSDP1 would look for an accelerator
    # What FSDP1 gathers for a state dict it would move to the CPU, and free there, where it is already
    gather = _state_dict_utils._enter_unshard_params_ctx

    @functools.wraps(gather)
    def gather_in_place(module, fsdp_state, writeback=False, rank0_only=False, offload_to_cpu=False, **kwargs):
        gather(module, fsdp_state, writeback, rank0_only, offload_to_cpu=False, **kwargs)

    _state_dict_utils._enter_unshard_params_ctx = gather_in_place
