"""How the examples read their flags: TRL's parser, with other defaults for an embedded task."""

from __future__ import annotations

from typing import Any

from trl import ModelConfig, TrlParser


# What TRL reads only where another setting is not there, or not beside it: who gives the latter means it
HINDERED = {"steps_per_generation": "generation_batch_size", "max_steps": "num_train_epochs"}


def parse_arguments(script_class: Any, config_class: Any, embedded_defaults: dict[str, Any]) -> tuple[Any, Any, Any]:
    """
    Script arguments, training arguments and [`~trl.ModelConfig`]: flags over the config file (`--config`) over, in the
    embedded task, `embedded_defaults` over TRL's defaults.

    The embedded task is what is trained without a model; a script that has a `dataset_name` wants both or neither.
    """
    first_look = TrlParser((script_class, ModelConfig), allow_abbrev=False, add_help=False)
    script_args, model_args, others = first_look.parse_args_and_config(return_remaining_strings=True)
    embedded = model_args.model_name_or_path is None
    if hasattr(script_args, "dataset_name") and (script_args.dataset_name is None) != embedded:
        raise ValueError(
            "--model_name_or_path and --dataset_name go together: give both, or neither to train the embedded policy "
            "on sums."
        )
    parser = TrlParser((script_class, config_class, ModelConfig), allow_abbrev=False)
    if embedded:
        given = {flag.removeprefix("--").split("=")[0].replace("-", "_") for flag in others}
        defaults = {name: value for name, value in embedded_defaults.items() if HINDERED.get(name) not in given}
        parser.set_defaults_with_config(**defaults)
    return parser.parse_args_and_config()


def add_model_init_kwargs(training_args: Any, model_args: ModelConfig) -> None:
    """The model's flags, for `from_pretrained`, beneath those that `training_args.model_init_kwargs` holds."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
