"""Workers for the whole suite, the `slow` marker, and one thread per process."""

import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network
# Before torch is imported: models of a few thousand parameters are slower on more threads
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from many_runs import prepare_for_many_runs


TESTS = Path(__file__).parent
# In the order in which they start, so that no worker is left with a long file at the end. Most of their tests are
# slow, because they start processes, each of which imports torch and TRL.
SLOW_FOLDERS = ("distributed", "real_vllm", "examples", "resilience", "peft_forms")
# In them, the tests that use one of these fixtures do; the others are as fast as any.
STARTS_PROCESSES = {"launch", "one_process", "paths", "path", "cache", "runs", "killed"}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """
    The whole suite takes one worker per core, at most 8. Named tests, `--pdb` and `-n` are left as they are, so that a
    test that is being worked on runs in this process.
    """
    if hasattr(config, "workerinput"):
        return  # a worker, which comes by here too, must not start workers of its own
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:  # some versions of xdist call this in workers, which must start no others
        return
    whole_suite = config.args_source is config.ArgsSource.TESTPATHS
    if not (whole_suite and config.pluginmanager.hasplugin("xdist")) or option.usepdb or option.collectonly:
        return
    if option.numprocesses is None:
        option.numprocesses = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"  # a file's tests share runs
        option.loadscopereorder = False  # the order below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if folder(item) in SLOW_FOLDERS and STARTS_PROCESSES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: SLOW_FOLDERS.index(folder(item)) if folder(item) in SLOW_FOLDERS else 9)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items:
        prepare_for_many_runs()


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    """Runs a script as `__main__` of this process, in `tmp_path`; returns what it printed, and what it warned of."""
    monkeypatch.chdir(tmp_path)

    def start(script: str | Path, *flags: Any) -> tuple[str, str]:
        path = TESTS.parent / script
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            runpy.run_path(str(path), run_name="__main__")
        printed = capfd.readouterr()
        return printed.out, printed.err + "\n".join(str(warning.message) for warning in caught)

    return start


def folder(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]
