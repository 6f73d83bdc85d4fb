"""Checks of the arguments of a trainer's constructor, made before any model is loaded."""

import inspect
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainingArguments
from transformers.utils import CONFIG_NAME
from trl import GRPOTrainer


def check_model(model: Any, trainer: str) -> None:
    """Raises a `TypeError` for what is neither a name nor a model, and a `ValueError` for the folder of an adapter."""
    if not isinstance(model, str | torch.nn.Module):
        raise TypeError(
            f"{trainer} needs a policy, got {_kind(model)}: pass a hub name, a path or a loaded model as `model`."
        )
    if (
        isinstance(model, str)
        and Path(model, "adapter_config.json").is_file()
        and not Path(model, CONFIG_NAME).is_file()
    ):
        raise ValueError(
            f"{model} is an adapter without its model: load both with "
            "peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True) and pass the result as `model`."
        )


def check_processing_class(processing_class: Any) -> None:
    """Raises a `TypeError` for what is not a tokenizer or processor, a name for example."""
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        fix = f"AutoTokenizer.from_pretrained({processing_class!r})"
        if not isinstance(processing_class, str):
            fix = "what AutoTokenizer.from_pretrained() returns"
        raise TypeError(
            f"`processing_class` must be a tokenizer or a processor, got {_kind(processing_class)}: pass {fix}."
        )


def check_data_collator(data_collator: Any) -> None:
    """Raises a `TypeError` for what cannot be called with a list of rows."""
    if data_collator is not None and not callable(data_collator):
        raise TypeError(
            f"`data_collator` must be a function of a list of rows, got {_kind(data_collator)}: leave it out, or pass "
            "one that returns batches with the keys of GKDTrainer's."
        )


def check_training_arguments(
    args: TrainingArguments, eval_dataset: Any, callbacks: Any, optimizers: Any, peft_config: Any
) -> None:
    """Raises a `TypeError` or a `ValueError` for arguments that every trainer of transformers takes."""
    if eval_dataset is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={getattr(args.eval_strategy, 'value', args.eval_strategy)!r} needs an eval_dataset: pass "
            "one, or set eval_strategy='no'."
        )
    for callback in _listed("callbacks", callbacks, "a list of TrainerCallback"):
        cls = callback if isinstance(callback, type) else type(callback)
        if not issubclass(cls, TrainerCallback):
            raise TypeError(
                f"`callbacks` must be TrainerCallback classes or instances, got {_kind(callback)}: pass a subclass of "
                "transformers.TrainerCallback, or an instance of one."
            )
    if not (isinstance(optimizers, tuple | list) and len(optimizers) == 2):
        raise TypeError(
            f"`optimizers` must be a pair of an optimizer and a scheduler, either of which may be None, got "
            f"{_kind(optimizers)}: pass (optimizer, None)."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a configuration of PEFT, got {_kind(peft_config)}: pass peft.LoraConfig(...)."
        )


def check_rewards_and_tools(
    args: Any, reward_funcs: Any, tools: Any, rollout_func: Any, environment_factory: Any, trainer: str
) -> None:
    """Raises a `TypeError` or a `ValueError` for arguments that GRPO's trainers take."""
    for name, function in (("rollout_func", rollout_func), ("environment_factory", environment_factory)):
        if function is not None and not (callable(function) or isinstance(function, dict)):
            raise TypeError(f"`{name}` must be a function, got {_kind(function)}: pass the function itself.")
    for tool in _listed("tools", tools, "a list of functions"):
        if not callable(tool):
            raise TypeError(f"`tools` must be functions, got {_kind(tool)}: pass the functions themselves.")
    if reward_funcs is None:
        rewards: Sequence[Any] = []
    else:
        rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for reward in rewards:
        if not (isinstance(reward, str | torch.nn.Module) or callable(reward)):
            raise TypeError(
                f"`reward_funcs` must be functions, reward models or names of them, got {_kind(reward)}: pass the "
                "function itself, not its result."
            )
    if environment_factory is not None:  # an environment may bring a reward of its own
        return
    if not rewards:
        raise ValueError(
            f"{trainer} needs a reward: pass reward_funcs=..., a function of the completions that returns one number "
            "per completion."
        )
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        raise ValueError(
            f"There are {len(rewards)} reward function(s) and {len(args.reward_weights)} reward_weights: give one "
            "weight per function."
        )


# What TRL calls a reward function with, beside the columns of the dataset
REWARD_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_reward_signatures(reward_funcs: Any, dataset: Any, dataset_name: str, args: Any) -> None:
    """Raises a `TypeError` for a reward function that TRL could not call with the columns of this dataset."""
    columns = getattr(dataset, "column_names", None)
    row_format = getattr(dataset, "format", None)
    transformed = isinstance(row_format, dict) and row_format.get("type") == "custom"
    known = columns if isinstance(columns, list) and not transformed and not args.remove_unused_columns else []
    given = {*REWARD_KEYWORDS, *known} - {"prompt", "completion"}
    for reward in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if isinstance(reward, str | torch.nn.Module):
            continue
        try:
            parameters = inspect.signature(reward).parameters.values()
            called = inspect.signature(reward, follow_wrapped=False).parameters.values()  # a decorator may filter
        except (TypeError, ValueError):  # of a function that is not written in Python
            continue
        name = getattr(reward, "__name__", type(reward).__name__)
        takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in (*parameters, *called))
        if not takes_all and (refused := sorted(given - takes)):
            raise TypeError(
                f"The reward function {name!r} does not take {', '.join(refused)}, which it is called with: give it "
                "**kwargs."
            )
        needs = {p.name for p in parameters if p.name in takes and p.default is p.empty}
        if known and (missing := sorted(needs - given)):
            raise TypeError(
                f"The reward function {name!r} needs {', '.join(missing)}, but the columns of `{dataset_name}` are "
                f"{', '.join(known)}: add the column, or rename the parameter."
            )


def explain_reward_error(error: Exception) -> None:
    """
    Raises a `TypeError` if TRL could not call a reward function, and a `ValueError` if it returned something that TRL
    could not turn into numbers. What the function itself raised is left as it is.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.filename == inspect.getfile(GRPOTrainer) and "reward function" not in str(error):
        if isinstance(error, TypeError) and re.search("unexpected keyword|missing .* argument", str(error)):
            raise TypeError(
                f"A reward function could not be called ({error}): give it **kwargs, and every dataset a column for "
                "each parameter of its own."
            ) from error
        raise ValueError(
            f"The rewards are not one number, or None, per completion ({error}): return a flat list of numbers from "
            "each reward function."
        ) from error


def _listed(name: str, values: Any, wanted: str) -> Sequence[Any] | set:
    if values is None:
        return []
    if not isinstance(values, list | tuple | set):
        raise TypeError(f"`{name}` must be {wanted}, got {_kind(values)}: put it into a list.")
    return values


def _kind(value: Any) -> str:
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
