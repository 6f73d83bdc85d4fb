"""Checks of what a user passes to a trainer, made before any model is loaded; each message says the mend."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from transformers import TrainingArguments
from trl import GRPOConfig


ConfigT = TypeVar("ConfigT", bound=TrainingArguments)

# GRPO's aggregations of a per-token loss. Its other loss types define that loss themselves.
AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def as_config(args: TrainingArguments | None, config_class: type[ConfigT], model: Any, method: str) -> ConfigT:
    """
    `args` as a `config_class`: itself where it is one, else a copy with the method's own settings at their defaults.

    TRL's plain configuration, of which `config_class` is a subclass (or a user's subclass of it), keeps all its
    values; `None` gives the defaults with TRL's usual output directory, `{model}-{method}`.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None) or "policy"
        return config_class(f"{name.rstrip('/').split('/')[-1]}-{method}")
    if isinstance(args, config_class):
        return args
    plain_class = trl_config(config_class)
    if not isinstance(args, plain_class):
        raise TypeError(
            f"`args` must be a {config_class.__name__} or a trl {plain_class.__name__}, got {type(args).__name__}: "
            f"create it with {config_class.__name__}(output_dir=...)."
        )
    converted: Any = copy.copy(args)
    for setting in fields(config_class):
        if not hasattr(converted, setting.name):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            setattr(converted, setting.name, default)
    if type(args) is plain_class:  # so that our settings reach the logs and training_args.bin too
        converted.__class__ = config_class
    return converted


def trl_config(config_class: type) -> type:
    """TRL's own configuration class that `config_class` extends, or is."""
    return next(base for base in config_class.__mro__ if base.__module__.split(".")[0] == "trl")


def check_prompt_column(trainer: str, train_dataset: Any, eval_dataset: Any = None) -> None:
    """Raises a `ValueError` for a dataset whose columns are known and lack `prompt`."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets.update({f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()})
    else:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
        known_columns(trainer, dataset, name, ("prompt",))


def known_columns(trainer: str, dataset: Any, name: str, wanted: tuple[str, ...]) -> list[str]:
    """
    The columns of a dataset, none where they are not known. Raises a `ValueError` where they are, and none is wanted.

    Args:
        name (`str`):
            What the dataset is to the trainer.
        wanted (`tuple[str, ...]`):
            Columns of which one must be there; the last is the one to rename to.
    """
    columns = getattr(dataset, "column_names", None)
    row_format = getattr(dataset, "format", None)
    if not columns or (isinstance(row_format, dict) and row_format.get("type") == "custom"):
        return []  # a transform makes the columns when a row is read
    if isinstance(columns, dict):
        raise ValueError(
            f"{trainer} needs one split as `{name}`, got all of them: pass e.g. dataset[{next(iter(columns))!r}]."
        )
    if not set(wanted) & set(columns):
        raise ValueError(
            f"{trainer} needs a {' or '.join(map(repr, wanted))} column, but `{name}` has only "
            f"{', '.join(map(repr, columns))}: rename yours, e.g. "
            f"dataset.rename_column({columns[0]!r}, {wanted[-1]!r})."
        )
    return columns


def check_policy_loss_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError` for the settings of GRPO that a per-token policy loss of our own cannot honour."""
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"{owner} has one ratio a token and cannot use importance_sampling_level="
            f"{args.importance_sampling_level!r}: set it to 'token'."
        )
    if args.loss_type not in AGGREGATIONS:
        raise ValueError(
            f"{owner} brings its own per-token loss and cannot use loss_type={args.loss_type!r}, which defines "
            f"another: set it to one of {', '.join(map(repr, AGGREGATIONS))}, which only say how tokens are averaged."
        )


def changed_settings(args: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the named settings that somebody set to another value than the default of the method."""
    defaults = {setting.name: setting.default for setting in fields(args)}
    return {name: getattr(args, name) for name in names if name in defaults and getattr(args, name) != defaults[name]}


def with_keyword(function: Callable, name: str) -> inspect.Signature:
    """The signature of `function` with one more keyword argument, `name=None`."""
    signature = inspect.signature(function)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*signature.parameters.values(), extra])
