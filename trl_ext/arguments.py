"""Checks of the settings that a user passes to a trainer, made before any model is loaded."""

import copy
import inspect
import json
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from accelerate.utils import is_peft_model
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig

from trl_ext.ranges import GRPO, TRAINING, check_ranges


ConfigT = TypeVar("ConfigT", bound=TrainingArguments)

# GRPO's aggregations of a per-token loss. Its other loss types define that loss themselves.
AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


# How TRL corrects for vLLM's log-probabilities, where it does
VLLM_CORRECTION_SETTINGS = (
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)

# Values that leave the sampler's distribution equal to the model's
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "min_tokens": (None, 0),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "logits_processors": (None, []),
    "vllm_structured_outputs_regex": (None,),
}


def as_config(args: TrainingArguments | None, config_class: type[ConfigT], model: Any, method: str) -> ConfigT:
    """
    `args` as a `config_class`: itself where it is one, else a copy with the method's own settings at their defaults.

    TRL's plain configuration, of which `config_class` is a subclass (or a user's subclass of it), keeps all its
    values; `None` gives the defaults with TRL's usual output directory, `{model}-{method}`. The configuration of
    another trainer is refused with a `TypeError`, because its own settings would be ignored.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None) or "policy"
        return config_class(f"{name.rstrip('/').split('/')[-1]}-{method}")
    plain_class = trl_config(config_class)
    if not isinstance(args, plain_class):
        raise TypeError(
            f"`args` must be a {config_class.__name__} or a trl {plain_class.__name__}, got {type(args).__name__}: "
            f"create it with {config_class.__name__}(output_dir=...)."
        )
    theirs = library_config(type(args))
    if not issubclass(config_class, theirs) and (config_class is plain_class or not isinstance(args, config_class)):
        raise TypeError(
            f"`args` is a {theirs.__name__}, the configuration of another trainer, whose own settings would be "
            f"ignored: create it with {config_class.__name__}(output_dir=...)."
        )
    if not isinstance(args, config_class):
        converted: Any = copy.copy(args)
        for setting in fields(config_class):
            if not hasattr(converted, setting.name):
                default = setting.default if setting.default_factory is MISSING else setting.default_factory()
                setattr(converted, setting.name, default)
        if type(args) is plain_class:  # so that our settings reach the logs and training_args.bin too
            converted.__class__ = config_class
        args = converted
    check_values(args, config_class)
    return args  # or, of a user's own class, with all of its settings


def library_config(config_class: type) -> type:
    """The configuration class of TRL or of this package that `config_class` extends, or is."""
    return next(
        base
        for base in config_class.__mro__
        if base.__module__.split(".")[0] in ("trl", "trl_ext") and issubclass(base, TrainingArguments)
    )


def check_values(args: Any, config_class: type) -> None:
    """
    Raises a `ValueError` if one of this package's settings does not have its declared type, or one of TRL's is out of
    range. Call it before TRL's `__post_init__`, which computes with them.
    """
    check_ranges(args, GRPO if issubclass(config_class, GRPOConfig) else TRAINING)
    own = {
        name
        for base in config_class.__mro__
        if base.__module__.split(".")[0] == "trl_ext"
        for name in inspect.get_annotations(base)
    }
    hints = get_type_hints(config_class)
    for setting in fields(config_class):
        value = getattr(args, setting.name)
        if setting.name in own and not _fits(value, hints[setting.name]):
            raise ValueError(
                f"{setting.name}={value!r} has the wrong type ({type(value).__name__}): set it to "
                f"{_in_words(hints[setting.name])}."
            )
        if setting.name in own and isinstance(value, str) and _takes_dictionary(hints[setting.name]):
            _check_json(setting.name, value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a `ValueError` where the value of the setting `name` is not among its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: set it to one of {', '.join(map(repr, choices))}.")


def _takes_dictionary(hint: Any) -> bool:
    return any(get_origin(option) is dict for option in get_args(hint))


def _check_json(name: str, text: str) -> None:
    """Raises a `ValueError` where the text of a setting that is a dictionary is not the JSON that TRL would parse."""
    try:
        fault = None if isinstance(json.loads(text), dict) else "it is not an object"
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ValueError(
            f'{name}={text!r} is not a dictionary in JSON ({fault}): write it like \'{{"dtype": "float32"}}\'.'
        )


_KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
    list: ((list, tuple), "a list"),
    dict: (dict, "a dictionary"),
    type(None): (type(None), "None"),
}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    kind = get_origin(hint) or hint
    if kind not in _KINDS:
        return True
    if isinstance(value, bool) and kind is not bool:  # to Python, a bool is an int
        return False
    fits = isinstance(value, _KINDS[kind][0])
    return fits and (kind is not list or all(_fits(item, get_args(hint)[0]) for item in value))


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(option) for option in get_args(hint))
    words = _KINDS[get_origin(hint) or hint][1]
    return f"{words} of {_in_words(get_args(hint)[0]).split(' ', 1)[1]}s" if get_origin(hint) is list else words


def trl_config(config_class: type) -> type:
    """TRL's own configuration class that `config_class` extends, or is."""
    return next(base for base in config_class.__mro__ if base.__module__.split(".")[0] == "trl")


def check_policy_loss_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError` for GRPO settings that our per-token policy losses cannot honour."""
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"{owner} has one ratio per token and cannot use importance_sampling_level="
            f"{args.importance_sampling_level!r}: set it to 'token'."
        )
    if args.loss_type not in AGGREGATIONS:
        raise ValueError(
            f"{owner} brings its own per-token loss and cannot use loss_type={args.loss_type!r}, which defines "
            f"another: set it to one of {', '.join(map(repr, AGGREGATIONS))}, which only say how tokens are averaged."
        )


def check_sharded_adapter(trainer: Trainer, fused_head: bool) -> None:
    """
    Raises a `ValueError` for adapters that FSDP would not train or save correctly. Call it at the end of a trainer's
    constructor.

    Args:
        fused_head (`bool`):
            Whether the log-probabilities come from TRL's fused LM head, which under FSDP2 does not average the
            gradient of a head that is trained over the processes.
    """
    if not trainer.is_fsdp_enabled or not is_peft_model(trainer.model):
        return
    name = type(trainer).__name__
    if trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            f"{name} cannot train an adapter under FSDP1, because PEFT then saves an empty one: set fsdp_version to 2."
        )
    head: Any = trainer.model.get_output_embeddings()
    if fused_head and head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            f"{name} cannot train the LM head beside an adapter under FSDP2, because TRL's fused head does not "
            "average its gradient over the processes: remove it from modules_to_save, or use DDP or DeepSpeed."
        )


def sampling_that_biases_the_ratio(args: GRPOConfig) -> list[str]:
    """
    The settings that change the sampler's log-probabilities but not the training model's, so that the ratio of the two
    is biased.
    """
    neutral = {**NEUTRAL_SAMPLING, "temperature": (None, args.temperature)}
    sampling = {name: getattr(args, name, None) for name in neutral} | (args.generation_kwargs or {})
    return [name for name, value in sampling.items() if name in neutral and value not in neutral[name]]


def changed_settings(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """The named settings that differ from their default, with their values, in the order of the configuration."""
    names = set(names)
    values = {setting.name: (getattr(args, setting.name), setting.default) for setting in fields(args)}
    return {name: value for name, (value, default) in values.items() if name in names and value != default}


def in_code(settings: dict[str, Any]) -> str:
    """Settings as they are written in a call: `epsilon=0.1, delta=4.0`."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def with_keyword(function: Callable, name: str) -> inspect.Signature:
    """The signature of `function` with one more keyword argument, `name=None`."""
    signature = inspect.signature(function)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*signature.parameters.values(), extra])
