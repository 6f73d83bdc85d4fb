"""A checkpoint of two processes is whole once both have written it, and both resume from the same one."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny


@pytest.mark.slow
def test_a_checkpoint_is_whole_once_both_have_written_it(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    policy = tiny.save_policy(tmp_path / "policy")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*launch, script, policy, tmp_path / "run"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-60:])
    assert result.stdout.count("ended well") == 2
