"""
Kills a run at random moments (SIGKILL), and starts it again each time, until it ends where the undisturbed run ends.

    python tests/resilience/killed_runs.py --trainers drpo --kills 20 --seed 0 --folder /tmp/killed

Every attempt is a process of its own, forked once everything is imported. Every other kill waits for a checkpoint that
is being written, the moment at which most can go wrong.
"""

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from resumable import RUNS, weights
from tiny import save_policy

from trl_ext.whole_checkpoint import newest_first, newest_whole_checkpoint


with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed")  # seconds, which every attempt would take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainers", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--kills", type=int, default=20, help="how often each is killed at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, required=True)
    flags = parser.parse_args()
    failures = 0
    for trainer in flags.trainers:
        try:
            kill_and_resume(trainer, flags.kills, random.Random(flags.seed), flags.folder / trainer)
        except AssertionError:  # the others are killed nevertheless
            traceback.print_exc()
            failures += 1
    sys.exit(failures)


def kill_and_resume(trainer_name: str, most_kills: int, moments: random.Random, folder: Path) -> None:
    """Prints a line when the killed run has ended as the undisturbed one."""
    policy = str(folder / "policy")
    assert Attempt(lambda: save_policy(Path(policy))).result() == 0

    def train(name: str) -> None:
        trainer = RUNS[trainer_name](policy, folder / name)
        try:
            newest_whole_checkpoint(str(folder / name))
            resume = True
        except ValueError:
            resume = False  # it was killed before a checkpoint was whole
        (folder / f"{name}.began").touch()
        trainer.train(resume_from_checkpoint=resume)
        torch.save(weights(trainer), folder / f"{name}.pt")

    undisturbed = Attempt(lambda: train("undisturbed"))
    undisturbed.wait_until((folder / "undisturbed.began").exists)
    start = time.monotonic()
    assert undisturbed.result() == 0
    seconds = time.monotonic() - start

    kills = halves = 0
    while True:
        (folder / "killed.began").unlink(missing_ok=True)
        attempt = Attempt(lambda: train("killed"))
        if kills < most_kills:
            attempt.wait_until((folder / "killed.began").exists)
            attempt.wait_until(at(time.monotonic() + moments.uniform(0, 0.5) * seconds))
            if kills % 2:
                attempt.wait_until(lambda: is_half_written(folder / "killed", since=folder / "killed.began"))
            attempt.kill()
        if (code := attempt.result()) == 0 and (kills or not most_kills):
            break
        if code == 0:  # it was too fast, once
            seconds /= 2
            shutil.rmtree(folder / "killed")
            continue
        assert code == -signal.SIGKILL, f"an attempt failed with {code}"
        kills += 1
        halves += is_half_written(folder / "killed", since=folder / "killed.began")
    expected, ours = (torch.load(folder / f"{name}.pt") for name in ("undisturbed", "killed"))
    assert expected.keys() == ours.keys()
    different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    assert not different, f"after {kills} kills {different} differ"
    print(
        f"{trainer_name}: killed {kills} times, {halves} of them with a half-written checkpoint; equal to the bit",
        flush=True,
    )


def at(moment: float) -> Callable[[], bool]:
    return lambda: time.monotonic() >= moment


def is_half_written(out: Path, since: Path) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed, that is newer than the file `since`."""
    if not since.exists():
        return False
    return any(
        folder.stat().st_mtime > since.stat().st_mtime and not (folder / "trainer_state.json").exists()
        for folder in newest_first(out)
    )


class Attempt:
    """`work` in a process of its own."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.code: int | None = None
        self.child = os.fork()
        if self.child == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds or the process has ended."""
        while self.code is None and not condition():
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
            time.sleep(0.001)

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.child, signal.SIGKILL)

    def result(self) -> int:
        """The exit code, or minus the signal that ended the process."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        return self.code


if __name__ == "__main__":
    main()
