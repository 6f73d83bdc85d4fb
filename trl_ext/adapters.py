"""Adapters that a trainer cannot train or score correctly, and the state of adapters that others do not restore."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from peft.utils.other import TrainableTokensWrapper


logger = get_logger(__name__)

# Initializations of LoRA that take from the base's weights what they give to the adapter
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def adapters_kept(model: Any) -> Iterator[None]:
    """
    Which adapters of a model are active, and which parameters are trained, is the same afterwards. PEFT's and TRL's
    ways to use another adapter for a while, and transformers' to load a checkpoint, go back to one adapter, all of it
    trained.
    """
    if not is_peft_model(model):
        yield
        return
    active = list(model.active_adapters)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        if isinstance(model.base_model, BaseTuner) and list(model.active_adapters) != active:
            model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != trained.get(name, parameter.requires_grad):
                parameter.requires_grad_(trained[name])


def load_active_adapters(model: Any, folder: str) -> bool:
    """
    Loads a checkpoint's active adapters where one of them lies in a folder of its own, as all do that are not called
    "default": transformers' `load_best_model_at_end` does not look there. Returns whether this was such a checkpoint;
    of others nothing is loaded.
    """
    if not is_peft_model(model):
        return False
    folders = {name: Path(folder, name) for name in model.active_adapters}
    if not any((path / CONFIG_NAME).is_file() for path in folders.values()):
        return False
    with adapters_kept(model):
        for name, path in folders.items():
            model.load_adapter(str(path if path.is_dir() else folder), name, is_trainable=True)
    return True


def check_trains_something(model: Any, trainer: str) -> None:
    """Raises a `ValueError` for a model without a parameter that is trained."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    raise ValueError(
        f"{trainer} has nothing to train, because no parameter of the model requires a gradient: "
        + (
            "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
            if is_peft_model(model)
            else "call model.requires_grad_(True), or pass peft_config."
        )
    )


def changes_base(config: Any) -> str | None:
    """The setting of an adapter with which the model without it is not the one that the adapter was put on."""
    initialization = getattr(config, "init_lora_weights", None)
    if isinstance(initialization, str) and initialization.lower().startswith(CHANGES_BASE):
        return f"init_lora_weights={initialization!r}"
    bias = getattr(config, "bias", "none")
    return None if bias == "none" else f"bias={bias!r}"


def check_base_teacher(config: Any) -> None:
    """Raises a `ValueError` for the student's adapter where the student without it is not the base model."""
    if setting := changes_base(config):
        raise ValueError(
            f"teacher_model='base' is the student without its adapter, but with {setting} that is not the base model, "
            "whose weights change too: leave the setting out, or pass the name of the base model as the teacher."
        )


def check_reference_adapter(model: Any, peft_config: Any, args: Any) -> None:
    """
    Raises a `ValueError` where TRL would take another adapter than the trained one for the reference of `beta`, and
    warns where its reference is not the policy at the start.
    """
    if not args.beta:
        return
    if not isinstance(model, str) and is_peft_model(model):
        active, adapters = list(model.active_adapters), list(model.peft_config)
        if active != ["default"] or "ref" in adapters:
            raise ValueError(
                f"With beta={args.beta} TRL copies the adapter 'default' to 'ref' as the reference, but this model's "
                f"adapters are {', '.join(map(repr, adapters))} and {', '.join(map(repr, active))} is trained: name "
                "the trained one 'default' and no other 'ref', or set beta=0.0."
            )
    elif peft_config is not None and (setting := changes_base(peft_config)):
        logger.warning(
            f"With beta={args.beta} the reference is the model without its adapter, which with {setting} is not the "
            "policy at the start: pass a PeftModel made with get_peft_model() instead of peft_config, and the "
            "reference is a copy of its adapter."
        )


def check_vllm_adapters(model: Any, args: Any) -> None:
    """Raises a `ValueError` for modules that are trained whole, of an adapter for which TRL has no name in vLLM."""
    if isinstance(model, str) or not is_peft_model(model) or not args.use_vllm:
        return
    for name, config in model.peft_config.items():
        if name != "default" and getattr(config, "modules_to_save", None):
            raise ValueError(
                f"TRL gives vLLM wrong names for the modules_to_save of the adapter {name!r}: call the trained "
                "adapter 'default' and leave modules_to_save out of the others, or set use_vllm=False."
            )


def check_adapter_below_forward(config: Any, owner: str) -> None:
    """
    Raises a `ValueError` for an adapter that needs PEFT's own forward, where only the model below it is called.

    Args:
        config ([`~peft.PeftConfig`] or `None`):
            Of the active adapter.
        owner (`str`):
            Whose adapter it is, for the message.
    """
    if config is None:
        return
    if config.is_prompt_learning:
        why = f"where {config.peft_type.value} puts its prompt"
    elif getattr(config, "alora_invocation_tokens", None):
        why = "which finds alora_invocation_tokens in the prompt"
    else:
        return
    raise ValueError(
        f"{owner} is called below PEFT's forward, {why}: use another adapter, e.g. peft.LoraConfig without "
        "alora_invocation_tokens."
    )


def check_fused_head(model: Any, owner: str) -> None:
    """Raises a `ValueError` for an LM head that TRL's fused head cannot read: one with single tokens trained."""
    if is_peft_model(model) and isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise ValueError(
            f"{owner} trains single tokens of its LM head (trainable_token_indices, on tied embeddings too), which "
            "TRL's log-probabilities do not support: remove that setting, or train the whole head with "
            "modules_to_save."
        )
