"""How the examples read their flags: TRL's parser, with other defaults for the embedded task."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, TrlParser

from common.console import ignore_deprecated_names


# A default of ours -> the flag that, if given, removes it, because TRL reads that flag only without the default
SUPERSEDED_BY = {
    "steps_per_generation": "generation_batch_size",
    "max_steps": "num_train_epochs",
    "activation_checkpointing": "gradient_checkpointing",
}


def parse_arguments(script_class: Any, config_class: Any, embedded_defaults: dict[str, Any]) -> tuple[Any, Any, Any]:
    """
    Script arguments, training arguments and [`~trl.ModelConfig`]. Flags override the config file (`--config`), which
    overrides `embedded_defaults` (in the embedded task), which override TRL's defaults.

    The embedded task is what is trained without `--model_name_or_path`. `--dataset_name` needs a model, and a model
    needs a dataset where the script has none of its own (`needs_dataset`).
    """
    if help_flags := {"-h", "--help", "--help_all"} & set(sys.argv[1:]):
        print(help_text(script_class, config_class, embedded_defaults, trl="--help_all" in help_flags))
        sys.exit()
    first_look = TrlParser((script_class, ModelConfig), allow_abbrev=False, add_help=False)
    script_args, model_args, others = first_look.parse_args_and_config(return_remaining_strings=True)
    embedded = model_args.model_name_or_path is None
    has_dataset = script_args.dataset_name is not None
    if has_dataset == embedded and (has_dataset or getattr(script_class, "needs_dataset", True)):
        raise ValueError(
            "--model_name_or_path and --dataset_name go together: give both, or neither to train the embedded policy."
        )
    given = {flag.removeprefix("--").split("=")[0].replace("-", "_") for flag in others}
    defaults = {**quiet_defaults(config_class, embedded), **(embedded_defaults if embedded else {})}
    parser = TrlParser((script_class, config_class, ModelConfig), allow_abbrev=False, add_help=False)
    parser.set_defaults_with_config(
        **{name: value for name, value in defaults.items() if SUPERSEDED_BY.get(name) not in given}
    )
    ignore_deprecated_names()
    script_args, training_args, model_args = parser.parse_args_and_config()
    # The command line gives text, and the trainer would take "True" for the name of a folder
    switch = {"true": True, "false": None}
    resume = training_args.resume_from_checkpoint
    training_args.resume_from_checkpoint = switch.get(str(resume).lower(), resume)
    return script_args, training_args, model_args


def chosen_methods(chosen: list[str], known: Collection[str], default: list[Any]) -> list[Any]:
    """What `--method` names, or `default` without it."""
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"--method {' '.join(unknown)} is unknown: choose from {', '.join(known)}.")
    return chosen or default


def quiet_defaults(config_class: Any, embedded: bool) -> dict[str, Any]:
    """TRL's defaults, but such that they do not warn, and without gradient checkpointing in the embedded task."""
    defaults: dict[str, Any] = {"dataloader_pin_memory": torch.accelerator.is_available()}
    return {**defaults, **checkpointing(config_class, not embedded)}


def checkpointing(config_class: Any, wanted: bool) -> dict[str, bool]:
    """Gradient checkpointing, under the name that the installed transformers has not deprecated."""
    names = {field.name for field in fields(config_class)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": wanted}


def help_text(script_class: Any, config_class: Any, embedded_defaults: dict[str, Any], trl: bool = False) -> str:
    """
    The flags: first the script's, then those that our configuration adds to TRL's, then TRL's, of which only the names
    are listed unless `trl` asks for their help.
    """
    parser = TrlParser((script_class, config_class, ModelConfig), allow_abbrev=False, add_help=False)
    parser.set_defaults_with_config(**embedded_defaults)
    actions = {action.dest: action for action in parser._actions}
    for action in actions.values():
        action.option_strings = action.option_strings[:1]  # without the variants with hyphens
    formatter = argparse.ArgumentDefaultsHelpFormatter(prog=Path(sys.argv[0]).name, width=100)
    description = sys.modules["__main__"].__doc__ or ""
    parts = [f"usage: {Path(sys.argv[0]).name} [flags]", description.strip()]
    ours = [cls for cls in config_class.__mro__ if cls.__module__.startswith("trl_ext")]
    theirs = [cls for cls in (*script_class.__mro__[1:], *config_class.__mro__, ModelConfig) if cls not in ours]
    names_of_theirs: list[str] = []
    for cls in (script_class, *ours, *theirs):
        own = [actions.pop(name) for name in vars(cls).get("__annotations__", {}) if name in actions]
        if not own:
            continue
        if cls in theirs and not trl:
            flags = " ".join(f"--{action.dest}" for action in own)
            names_of_theirs.append(textwrap.fill(f"{cls.__name__}: {flags}", 100, subsequent_indent="  "))
            continue
        formatter.start_section("Flags of this script" if cls is script_class else f"Settings of {cls.__name__}")
        formatter.add_arguments(own)
        formatter.end_section()
    parts.append(formatter.format_help().strip())
    if names_of_theirs:
        parts += ["TRL's flags (--help_all explains them):", *names_of_theirs]
    parts.append("--config FILE.yaml: any of these settings from a file.")
    parts.append("Defaults shown are those of the embedded task; with a model of your own they are TRL's and ours.")
    return "\n\n".join(parts)


def add_model_init_kwargs(training_args: Any, model_args: ModelConfig) -> None:
    """Passes the model's flags to `from_pretrained`; what `training_args.model_init_kwargs` holds overrides them."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
