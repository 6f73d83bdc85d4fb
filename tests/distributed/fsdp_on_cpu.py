"""Lets accelerate use FSDP on the CPU, where torch's FSDP runs, but which accelerate does not look for."""

from accelerate.state import AcceleratorState, DistributedType, PartialState


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
