"""The settings of generation with vLLM, with the names, defaults and meanings of `GRPOConfig`."""

from dataclasses import dataclass, field


@dataclass
class VLLMSettings:
    """
    A mixin for the configuration of a trainer that samples. [`~trl.GRPOConfig`] documents each setting.

    Parameters:
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample with vLLM instead of `generate`.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: in the training process. `"server"`: on a server started with `vllm serve`.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            vLLM's implementation of the model, `"vllm"` or `"transformers"`.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether to take vLLM off the device during the optimizer step.
        vllm_structured_outputs_regex (`str`, *optional*):
            Regular expression that completions must match.
        vllm_server_base_url (`str`, *optional*):
            URL of the server.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Its host, if no URL is given.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Its port, if no URL is given.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for it.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port over which the weights are sent to it.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the device's memory for a colocated vLLM.
        vllm_max_model_length (`int`, *optional*):
            Its context length, in tokens.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of devices that it is split over.
    """

    use_vllm: bool = field(default=False, metadata={"help": "Whether to sample with vLLM instead of `generate`."})
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'colocate': vLLM in the training process. 'server': on a server started with `vllm serve`.",
            "choices": ["colocate", "server"],
        },
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "vLLM's implementation of the model: 'vllm' or 'transformers'."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Whether to take vLLM off the device during the optimizer step."}
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "Regular expression that completions must match."}
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "URL of the vLLM server."})
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the vLLM server, if no URL is given."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the vLLM server, if no URL is given."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the vLLM server."})
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port over which the weights are sent to the vLLM server."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the device's memory for a colocated vLLM."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Context length of a colocated vLLM, in tokens."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Number of devices that a colocated vLLM is split over."}
    )
