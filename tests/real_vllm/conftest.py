"""
Tests with vLLM itself, on the CPU, in an environment of its own: see scripts/vllm_environment.sh.

An engine changes the process that it runs in (environment, `torch.distributed`, threads) and keeps its memory, so the
tests of each file run in a process of their own, or in the `n` of `pytestmark = pytest.mark.processes(n)`, which have
the time to import vLLM in common. Their reports become those of this process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import engine
import pytest


HERE = Path(__file__).parent
REPORTS = "TRL_EXT_TEST_REPORTS"  # in the processes of a file: the folder for their reports
TIMEOUT = 2400  # seconds per file, on cores that others use too
ENGINE = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
RUNS: pytest.StashKey[dict] = pytest.StashKey()
EXIT_STATUS: pytest.StashKey[int] = pytest.StashKey()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    skip = pytest.mark.skip(reason="vLLM is not installed: scripts/vllm_environment.sh makes an environment with it")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if missing:
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Replays the reports of the processes that run the file."""
    if REPORTS in os.environ or HERE not in item.path.parents or item.get_closest_marker("skip"):
        return None
    runs = item.config.stash.setdefault(RUNS, {})
    if item.path not in runs:
        runs[item.path] = run_file(item)
    reports, output = runs[item.path]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    ended = [process.get(item.nodeid, []) for process in reports]
    failed = [report for process in ended for report in process if report.failed]
    for report in failed or ended[0]:
        item.ihook.pytest_runtest_logreport(report=report)
    if not failed and not all(process and process[-1].when == "teardown" for process in ended):
        text = f"The test did not end in {len(ended)} process(es):\n{output}"
        lost = pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
        item.ihook.pytest_runtest_logreport(report=lost)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def run_file(item: pytest.Item) -> tuple[list[dict[str, list[pytest.TestReport]]], str]:
    """The reports of each process, by test, of all tests of the item's file that are to run, and the last output."""
    import engine

    tests = [other.nodeid for other in item.session.items if other.path == item.path]
    marker = item.get_closest_marker("processes")
    processes = marker.args[0] if marker else 1
    command = [sys.executable, "-m"]
    if marker:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command += ["pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-x"] if marker else []  # a process would wait for another that has failed
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        environment |= {**ENGINE, REPORTS: folder}
        process = subprocess.Popen(
            [*command, *tests], stdout=output, stderr=output, env=environment, cwd=item.config.rootpath
        )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {TIMEOUT} s\n")
        finally:
            engine.kill(process)
        reports = [read_reports(item.config, path) for path in sorted(Path(folder).glob("*.jsonl"))]
        output.seek(0)
        return reports + [{}] * (processes - len(reports)), "\n".join(output.read().splitlines()[-100:])


def read_reports(config: pytest.Config, path: Path) -> dict[str, list[pytest.TestReport]]:
    reports = defaultdict(list)
    for line in path.read_text().splitlines():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        reports[report.nodeid].append(report)
    return reports


class Reporter:
    """Writes the reports of a process of a file."""

    def __init__(self, config: pytest.Config, folder: str) -> None:
        self.config, self.path = config, Path(folder) / f"{os.environ.get('RANK', 0)}.jsonl"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        session.config.stash[EXIT_STATUS] = int(exitstatus)


def pytest_configure(config: pytest.Config) -> None:
    if REPORTS in os.environ:
        config.pluginmanager.register(Reporter(config, os.environ[REPORTS]))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if EXIT_STATUS in config.stash:
        sys.stdout.flush()
        os._exit(config.stash[EXIT_STATUS])  # gloo's threads may abort a process in its teardown


@pytest.fixture(autouse=True)
def _engine_for_tiny_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM in TRL with little memory, and with weights that can be replaced, which its CPU build packs away."""
    import engine

    environment: dict[str, Any] = dict(os.environ)
    engine.adapt(monkeypatch)
    yield
    os.environ.clear()  # else the next test's one process takes itself for one of several
    os.environ.update(environment)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The policy. Each process saves its own before they form a group, in which only the first one would write."""
    return engine.save_policy(tmp_path_factory.mktemp("policy"))
