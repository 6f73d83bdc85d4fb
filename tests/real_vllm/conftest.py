"""
Tests with vLLM itself, on the CPU, in an environment of its own: see scripts/vllm_environment.sh.

An engine changes the process that it runs in (environment, threads, `torch.distributed`) and keeps its memory, so each
test runs in a process of its own, or in `@pytest.mark.processes(n)` of them.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
IN_OWN_PROCESS = "TRL_EXT_TEST_IN_OWN_PROCESS"
ENGINE = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; it would take 0.92 of all memory
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    skip = pytest.mark.skip(reason="vLLM is not installed: scripts/vllm_environment.sh makes an environment with it")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if missing:
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs the test in new processes instead of this one, unless this is one of those."""
    if os.environ.get(IN_OWN_PROCESS):
        return None
    marker = pyfuncitem.get_closest_marker("processes")
    processes = marker.args[0] if marker else 1
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"] if marker else []
    command = [sys.executable, "-m", *launch, "pytest", "-q", "-p", "no:cacheprovider", "-x", "--tb=short"]
    test = f"{pyfuncitem.path}::{pyfuncitem.name}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {**ENGINE, IN_OWN_PROCESS: "1"}
    result = subprocess.run([*command, test], capture_output=True, text=True, timeout=1500, env=environment)
    if result.returncode != 0:
        pytest.fail("\n".join((result.stdout + result.stderr).splitlines()[-100:]), pytrace=False)
    assert "1 passed" in result.stdout, result.stdout
    return True


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if os.environ.get(IN_OWN_PROCESS) and config.stash.get(EXIT_STATUS, None) is not None:
        sys.stdout.flush()
        os._exit(config.stash[EXIT_STATUS])  # gloo's threads may abort a process in its teardown


EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.fixture(autouse=True)
def _engine_for_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM in TRL with little memory, and with weights that can be replaced, which its CPU build packs away."""
    if not os.environ.get(IN_OWN_PROCESS):
        return
    import engine

    engine.adapt(monkeypatch)
