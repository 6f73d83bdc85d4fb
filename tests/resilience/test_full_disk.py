"""A full disk or a read-only folder stops the run with a clear error, and leaves the last whole checkpoint alone."""

import hashlib
import os
import resource
import shutil
import subprocess

import pytest
import tiny
import torch
from resumable import RUNS, weights
from transformers import TrainerCallback

from trl_ext.whole_checkpoint import newest_whole_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


class AfterStep(TrainerCallback):
    """Does something when step 3 has been trained, before its checkpoint is written."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.action()


def fingerprint(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir()) if f.is_file()}


def assert_stops_and_resumes(name, path, out, undisturbed, break_disk, repair_disk, words):
    before = {}

    def action():
        before.update(fingerprint(out / "checkpoint-2"))
        break_disk()

    trainer = RUNS[name](path, out, callbacks=[AfterStep(action)])
    try:
        with pytest.raises(OSError, match=r"checkpoint-3 could not be written .*: make room on the disk") as error:
            trainer.train()
    finally:
        repair_disk()
    assert f"from {out / 'checkpoint-2'}" in str(error.value)
    assert words in str(error.value)
    assert newest_whole_checkpoint(str(out)) == str(out / "checkpoint-2")
    assert fingerprint(out / "checkpoint-2") == before != {}
    resumed = RUNS[name](path, out)
    resumed.train(resume_from_checkpoint=True)
    for key, expected in undisturbed.items():
        assert torch.equal(weights(resumed)[key], expected), key


@pytest.fixture(scope="module")
def undisturbed(path, tmp_path_factory):
    found = {}

    def final_weights(name):
        if name not in found:
            trainer = RUNS[name](path, tmp_path_factory.mktemp(name))
            trainer.train()
            found[name] = weights(trainer)
        return found[name]

    return final_weights


# The weights take 100 kB, the optimizer's state twice as much
@pytest.mark.parametrize(
    ("name", "limit"), [("drpo", 50_000), ("drpo", 150_000), ("rlad", 150_000), ("tropd", 150_000), ("erpd", 50_000)]
)
def test_a_disk_that_takes_no_more(name, limit, path, tmp_path, undisturbed):
    whole, (soft, hard) = undisturbed(name), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert_stops_and_resumes(
        name,
        path,
        tmp_path,
        whole,
        break_disk=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)),
        repair_disk=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        words="",
    )


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or os.geteuid()
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=20m", "none", folder]).returncode
    ):
        pytest.skip("file systems can only be mounted by root, and not in every container")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_disk(path, disk, undisturbed):
    whole, filler = undisturbed("drpo"), disk / "filler"

    def fill():
        free = shutil.disk_usage(disk).free
        filler.write_bytes(b"0" * (free - 60_000))

    assert_stops_and_resumes("drpo", path, disk / "out", whole, fill, filler.unlink, "No space left on device")


def test_a_read_only_folder(path, disk, undisturbed):
    whole = undisturbed("drpo")
    assert_stops_and_resumes(
        "drpo",
        path,
        disk / "out",
        whole,
        break_disk=lambda: remount(disk, "ro"),
        repair_disk=lambda: remount(disk, "rw"),
        words="Read-only file system",
    )
