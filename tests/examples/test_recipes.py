"""Every setting of every recipe is accepted as the scripts read it, and has its source beside it."""

import re
from pathlib import Path

import drpo_math
import erpd_math
import pytest
import rlad_logic
import tropd_math
import yaml

from common.command_line import parse_arguments
from trl_ext import DRPOConfig, ERPDConfig, RLADConfig, TrOPDConfig


SCRIPTS = {
    "drpo_math": (drpo_math.DRPOScriptArguments, DRPOConfig, drpo_math.EMBEDDED_DEFAULTS),
    "erpd_math": (erpd_math.ERPDScriptArguments, ERPDConfig, erpd_math.EMBEDDED_DEFAULTS),
    "rlad_logic": (rlad_logic.RLADScriptArguments, RLADConfig, rlad_logic.EMBEDDED_DEFAULTS),
    "tropd_math": (tropd_math.TrOPDScriptArguments, TrOPDConfig, tropd_math.EMBEDDED_DEFAULTS),
}
RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
# What the papers say of an update and of the rollouts, from which micro-batches follow
COMPLETIONS_PER_UPDATE = {
    "drpo_qwen3_4b_base": 256,
    "rlad_qwen3_0.6b_knights_and_knaves": 256,
    "rlad_qwen3_1.7b_math": 256,
    "tropd_qwen3_1.7b": 512,
    "erpd_polaris": 128,
}
GPUS = 8


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def test_every_setting_is_accepted(recipe, monkeypatch, tmp_path):
    """For one process on CPU: 8 GPUs and bf16 are not here."""
    script, command = re.search(r"examples/(\w+)\.py (--config \S+)", recipe.read_text()).groups()
    assert command == f"--config examples/recipes/{recipe.name}"
    here = ["--config", str(recipe), "--bf16", "False", "--use_cpu", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [script, *here])
    parsed = parse_arguments(*SCRIPTS[script])
    settings = yaml.safe_load(recipe.read_text())
    for name, value in settings.items():
        if name not in ("bf16", "output_dir"):
            owner = next(args for args in parsed if hasattr(args, name))
            assert getattr(owner, name) == value, name
    args = parsed[1]
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps * GPUS
    assert update == COMPLETIONS_PER_UPDATE[recipe.stem]
    if script == "erpd_math":
        assert args.prompts_per_round * args.num_generations % update == 0
    elif script == "drpo_math":
        assert args.generation_batch_size == 2 * update
    assert update % args.num_generations == 0


def test_small_steps_are_not_lost_to_bfloat16(recipe):
    """Of 200 steps of 1e-6 in the same direction, weights in bfloat16 alone take 2 %: they need a float32 copy."""
    launch = re.search(r"accelerate launch --config_file (\S+)", recipe.read_text())[1]
    accelerate = yaml.safe_load((recipe.parents[2] / launch).read_text())
    assert accelerate["distributed_type"] == "DEEPSPEED"
    assert accelerate["mixed_precision"] == "bf16"
    assert accelerate["num_processes"] == GPUS


def test_every_setting_has_its_source(recipe):
    text = recipe.read_text()
    assert "Not run by us." in text
    assert re.search(r"Expect about \d+ GB per GPU \(estimated\)", text)
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert re.search(r" # (paper|ours)\b", line), line
