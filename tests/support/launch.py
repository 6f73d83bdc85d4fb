"""Runs a script on one process or several, as a user would launch it, and compares what they trained."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def run_script(script, path, out, processes, *flags, zero_stage=None):
    """The final weights and the logs that the script has written to `out`."""
    out.mkdir()
    if zero_stage is None:
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    else:
        launch = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", zero_stage]
        launch += ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--main_process_port", 0, "--zero3_save_16bit_model", "true"]
        flags = (*flags, "--deepspeed")
    command = [sys.executable, "-m", *launch, script, "--path", path, "--out", out, *flags]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-100:])
    weights = next((out / "final").glob("*.safetensors"))
    return load_file(weights), torch.load(out / "logs.pt")


def assert_same_training(ours, theirs):
    assert all(log["grad_norm"] > 0.01 for log in theirs[1])  # else there would be nothing to compare
    assert set(ours[0]) == set(theirs[0])
    for name, expected in theirs[0].items():
        torch.testing.assert_close(
            ours[0][name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for step, (ours_log, theirs_log) in enumerate(zip(ours[1], theirs[1], strict=True)):
        for name, expected in theirs_log.items():
            assert ours_log[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), f"{name} at step {step}"
