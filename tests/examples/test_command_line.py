"""Flags of the examples over their defaults for the embedded task."""

import warnings

import drpo_math
import erpd_math
import pytest
import rlad_logic
import self_distillation
import tropd_math

from common.command_line import parse_arguments
from embedded import tasks
from trl_ext import DRPOConfig, ERPDConfig, RLADConfig, TrOPDConfig


SCRIPTS = {
    "drpo_math": (drpo_math.DRPOScriptArguments, DRPOConfig, drpo_math.EMBEDDED_DEFAULTS),
    "erpd_math": (erpd_math.ERPDScriptArguments, ERPDConfig, erpd_math.EMBEDDED_DEFAULTS),
    "rlad_logic": (rlad_logic.RLADScriptArguments, RLADConfig, rlad_logic.EMBEDDED_DEFAULTS),
    "self_distillation": (
        self_distillation.SelfDistillationArguments,
        TrOPDConfig,
        self_distillation.EMBEDDED_DEFAULTS,
    ),
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
    assert args.logging_steps == defaults["logging_steps"]
    assert args.learning_rate == 1e-3


@pytest.mark.parametrize("script", ["rlad_logic", "self_distillation", "tropd_math"])
def test_an_unknown_method_is_named_before_a_model_is_made(monkeypatch, tmp_path, script):
    argv = ["script", "--use_cpu", "--output_dir", str(tmp_path), "--method", "tropd", "gpro"]
    monkeypatch.setattr("sys.argv", argv)
    for task in ("sums", "hinted_sums", "puzzles"):  # which make the policy
        monkeypatch.setattr(tasks, task, lambda *args: pytest.fail("A model was made first."))
    main = {"rlad_logic": rlad_logic, "self_distillation": self_distillation, "tropd_math": tropd_math}[script].main
    with pytest.raises(ValueError, match=r"--method .*gpro.* is unknown: choose from .*"):
        main(*parse_arguments(*SCRIPTS[script]))


def test_epochs_are_not_overridden_by_the_default_number_of_steps(parse, request):
    if "erpd_math" in request.node.name:
        pytest.skip("ERPD refuses both: its length follows from the fixed set")
    args, _ = parse("--num_train_epochs", 2)
    assert (args.num_train_epochs, args.max_steps) == (2, -1)


def test_your_own_model_has_trls_defaults(parse, request):
    flags = ["--model_name_or_path", "some/model", "--bf16", "False"]
    if "rlad_logic" not in request.node.name:
        flags += ["--dataset_name", "some/data"]
    args, defaults = parse(*flags)
    assert args.max_steps == -1
    assert args.learning_rate != defaults["learning_rate"]
    assert args.gradient_checkpointing  # as in TRL


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--dataset_name"])
def test_a_model_and_a_data_set_go_together(parse, request, flag):
    if "rlad_logic" in request.node.name and flag == "--model_name_or_path":
        parse(flag, "some/name", "--bf16", "False")  # trained on the script's own puzzles
    else:
        with pytest.raises(ValueError, match="go together"):
            parse(flag, "some/name", "--bf16", "False")


def test_parsing_does_not_warn_of_deprecated_settings(parse):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args, _ = parse()
    assert not args.gradient_checkpointing
    assert not args.dataloader_pin_memory  # which warns without an accelerator


def test_gradient_checkpointing_can_be_set_by_its_old_name(parse):
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        assert parse("--gradient_checkpointing", True)[0].gradient_checkpointing


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("true", True), ("False", None), ("out/checkpoint-2", "out/checkpoint-2")]
)
def test_resume_from_checkpoint_is_a_switch_or_a_folder(parse, text, value):
    assert parse("--resume_from_checkpoint", text)[0].resume_from_checkpoint == value


def test_help_begins_with_the_flags_of_the_script_and_of_the_method(parse, request, capsys):
    script = request.node.name.partition("[")[2].rstrip("]")
    own = {"drpo_math": "trust_region_radius", "erpd_math": "extraction_passes", "rlad_logic": "kdrl_coef"}
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    order = [text.index(flag) for flag in ("--num_held_out", f"--{own.get(script, 'outlier_loss')}", "--adam_beta1")]
    assert order == sorted(order)
    assert len(text.splitlines()) < 200
    with pytest.raises(SystemExit):
        parse("--help_all")
    assert "--adam_beta1 ADAM_BETA1" in capsys.readouterr().out
