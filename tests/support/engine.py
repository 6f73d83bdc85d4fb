"""vLLM's CPU build for models of a few thousand parameters: colocated by TRL, or as a server."""

import functools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch


CACHE_BYTES = 2**24  # VLLM_CPU_KVCACHE_SPACE, if it is set, would take its place, and counts in GiB
HEAD_DIM = 32  # vLLM's kernels for the CPU have 32, 48, 64, ...; tiny.py's 16 is not among them


def save_policy(path: Path, **overrides: Any) -> str:
    """A policy that vLLM can run, with its tokenizer."""
    return tiny.save_policy(path, **{"head_dim": HEAD_DIM, **overrides})


def adapt(monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> None:
    """
    Lets TRL's colocated engine run here: in `dtype`, with little memory, and with linear layers that keep their
    weights. The CPU build packs those and drops the parameter that TRL would load new weights into.
    """
    import trl.generation.vllm_generation as vllm_generation
    import vllm
    import vllm.model_executor.layers.utils as layers
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep_weights)
    # Ranks would share memory under a name that every engine on the machine has, and leave it behind
    monkeypatch.setattr(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda self: False)
    engine = functools.partial(vllm.LLM, dtype=dtype, kv_cache_memory_bytes=CACHE_BYTES)
    monkeypatch.setattr(vllm_generation, "LLM", engine)


@contextmanager
def serve(path: str | Path, *flags: str, **environment: str) -> Iterator[str]:
    """The URL of a vLLM server of the model at `path`, in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(CACHE_BYTES), *flags]
    with open(Path(path) / "server.log", "w") as log:
        environment = {**os.environ, **environment}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(url, server, Path(log.name))
            yield url
        finally:
            kill(server)  # with its engine, which outlives a server that is told to end


def kill(process: subprocess.Popen) -> None:
    """With all processes that it has started."""
    if process.poll() is None:
        for running in [*psutil.Process(process.pid).children(recursive=True), process]:
            running.kill()
    process.wait(60)


def wait_for(url: str, server: subprocess.Popen, log: Path, timeout: float = 1200.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"The server has ended:\n{log.read_text()[-3000:]}", pytrace=False)
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"The server was not up after {timeout:g} s:\n{log.read_text()[-3000:]}", pytrace=False)
