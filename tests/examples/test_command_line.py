"""Flags of the examples over their defaults for the embedded task."""

import drpo_math
import pytest
import rlad_logic
import tropd_math
from command_line import parse_arguments

from trl_ext import DRPOConfig, RLADConfig, TrOPDConfig


SCRIPTS = {
    "drpo_math": (drpo_math.DRPOScriptArguments, DRPOConfig, drpo_math.EMBEDDED_DEFAULTS),
    "rlad_logic": (rlad_logic.RLADScriptArguments, RLADConfig, rlad_logic.EMBEDDED_DEFAULTS),
    "tropd_math": (tropd_math.TrOPDScriptArguments, TrOPDConfig, tropd_math.EMBEDDED_DEFAULTS),
}


@pytest.fixture(params=SCRIPTS.values(), ids=SCRIPTS)
def parse(request, monkeypatch, tmp_path):
    def with_flags(*flags):
        monkeypatch.setattr("sys.argv", ["script", "--use_cpu", "--output_dir", str(tmp_path), *map(str, flags)])
        return parse_arguments(*request.param)[1], request.param[2]

    return with_flags


def test_defaults_are_those_of_the_embedded_task(parse):
    args, defaults = parse("--learning_rate", 1e-3)
    assert args.max_steps == defaults["max_steps"]
    assert args.learning_rate == 1e-3


def test_epochs_are_not_outdone_by_the_default_number_of_steps(parse):
    args, _ = parse("--num_train_epochs", 2)
    assert (args.num_train_epochs, args.max_steps) == (2, -1)


def test_a_model_of_ones_own_has_trls_defaults(parse, request):
    flags = ["--model_name_or_path", "some/model", "--bf16", "False"]
    if "rlad_logic" not in request.node.name:
        flags += ["--dataset_name", "some/data"]
    args, defaults = parse(*flags)
    assert args.max_steps == -1
    assert args.learning_rate != defaults["learning_rate"]
