"""What ERPD refuses before anything is loaded, each in one sentence that says how to fix it."""

import math
from typing import Any

from datasets import Dataset
from trl import BEMACallback, GRPOConfig

from trl_ext.arguments import changed_settings, check_choice, check_policy_loss_args, in_code
from trl_ext.erpd.extraction import EXTRACTION_LOSSES
from trl_ext.erpd.schedule import LearningRate, as_list, as_text
from trl_ext.erpd.stored_rollouts import count_rollouts, has_stored_rollouts
from trl_ext.losses.erpd import SIGNALS
from trl_ext.trust_regions import check_trust_region


CHOICES: dict[str, tuple[str, ...]] = {
    "extraction_loss": tuple(EXTRACTION_LOSSES),
    "signal": tuple(SIGNALS),
    "signal_normalization": ("standardize", "scale", "none"),
    "distillation_anchor": ("base", "pass"),
}


def stored_rollouts_per_round(args: GRPOConfig, dataset: Dataset) -> int:
    """The size of a set of stored rollouts: whole optimizer steps, or a `ValueError` that says what to set."""
    update = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    number = count_rollouts(dataset)
    if number < update:
        raise ValueError(
            f"The dataset's {number} stored rollouts are fewer than one update takes ({update}): give more rollouts, "
            "or lower per_device_train_batch_size or gradient_accumulation_steps."
        )
    return number // update * update


def resolve_prompts_per_round(args: GRPOConfig, num_prompts: int) -> int:
    """The size of the set: whole optimizer steps and whole generations, or a `ValueError` that says what to set."""
    update = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    unit = math.lcm(update, args.generation_batch_size) // args.num_generations
    wanted, smaller = args.prompts_per_round, "per_device_train_batch_size, gradient_accumulation_steps or "
    smaller += "steps_per_generation"
    if num_prompts < unit:
        raise ValueError(
            f"The dataset's {num_prompts} prompts with {args.num_generations} rollouts each are less than one batch, "
            f"which takes {unit} prompts: give more prompts, or lower {smaller}."
        )
    if wanted is None:
        return max(min(1000, num_prompts) // unit, 1) * unit
    if wanted > num_prompts:
        raise ValueError(
            f"prompts_per_round={wanted} is more than the dataset has: set it to {num_prompts // unit * unit} or less."
        )
    if wanted < unit:
        raise ValueError(
            f"prompts_per_round={wanted} with {args.num_generations} rollouts each is less than one batch: set it to "
            f"{unit}, or lower {smaller}."
        )
    if wanted % unit:
        raise ValueError(
            f"prompts_per_round={wanted} does not make whole batches of {unit} prompts with {args.num_generations} "
            f"rollouts each: set it to {wanted // unit * unit}."
        )
    return wanted


def check_erpd_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError` for settings that ERPD cannot honour."""
    check_policy_loss_args(args, owner)
    for name, choices in CHOICES.items():
        for value in as_list(getattr(args, name)):
            check_choice(name, value, choices)
    losses, signals, weights = as_list(args.extraction_loss), as_list(args.signal), args.signal_weights
    if not losses:
        raise ValueError("extraction_loss is empty, so that there is no teacher: set it to 'mse', for example.")
    if len(set(losses)) < len(losses):
        raise ValueError(f"extraction_loss={losses} would train the same teacher twice: name each once.")
    if len(signals) not in (1, len(losses)):
        raise ValueError(
            f"There are {len(losses)} teachers and {len(signals)} signals: give one signal, or one per teacher."
        )
    if weights is not None and len(weights) != len(losses):
        raise ValueError(f"There are {len(losses)} teachers and {len(weights)} signal_weights: give one per teacher.")
    if weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
        raise ValueError(f"signal_weights={weights} leave nothing to distil: give finite numbers, not all 0.")
    for name in ("rounds", "extraction_passes", "distillation_passes"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} leaves nothing to train: set it to 1 or more.")
    rates = ("learning_rate", "extraction_learning_rate", "distillation_learning_rate_decay")
    bounds = ("signal_clip", "distillation_epsilon", "distillation_epsilon_high")
    for name in (*rates, "extraction_beta", *bounds):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be positive and finite: set it above 0.")
    if not math.isfinite(args.outcome_advantage_weight):
        raise ValueError(
            f"outcome_advantage_weight={args.outcome_advantage_weight} must be finite: set it to 0 for the signal "
            "alone, or to 0.5, for example."
        )
    if not 0 <= args.extraction_warmup_steps < math.inf:
        raise ValueError(
            f"extraction_warmup_steps={args.extraction_warmup_steps} must be at least 0: set it to a number of "
            "updates, or to a share of them below 1."
        )
    check_trust_region(args)
    _check_trl_args(args, owner)


def _check_trl_args(args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError` for settings of GRPO and transformers that make no sense in a run of two stages."""
    if changed := changed_settings(args, ("max_steps", "num_train_epochs")):
        raise ValueError(
            f"{in_code(changed)} would end {owner}'s run within a stage, because rounds, passes and the set say how "
            "long it is: remove it, and set prompts_per_round, extraction_passes, distillation_passes or rounds."
        )
    if args.num_iterations != 1:
        raise ValueError(
            f"num_iterations={args.num_iterations} has no meaning with a fixed set: set it to 1, and "
            "extraction_passes and distillation_passes to the number of passes."
        )
    for name in ("extraction_lr_scheduler_type", "lr_scheduler_type"):
        if as_text(getattr(args, name)) in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"{name}={as_text(getattr(args, name))!r} depends on evaluations and cannot restart with each "
                "stage: set it to 'constant', 'linear' or 'cosine', for example."
            )
    refused = {
        "off_policy_mask_threshold": (None, "needs one advantage per sequence, but here each token has its own"),
        "sync_ref_model": (False, "moves the reference, which must be the base policy of each round"),
        "load_best_model_at_end": (
            False,
            "would load a checkpoint of any stage instead of the distilled policy",
        ),
        "ignore_data_skip": (False, "would make a resumed run begin its pass over the set again"),
    }
    for name, (value, reason) in refused.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name}={getattr(args, name)} {reason}: set it to {value}.")
    for name, kwargs in (("extraction_lr_scheduler_type", None), ("lr_scheduler_type", args.lr_scheduler_kwargs)):
        try:
            LearningRate(args.learning_rate, as_text(getattr(args, name)), 0).factors(1, kwargs)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}={as_text(getattr(args, name))!r} cannot be made ({error}): set it to 'constant', 'linear' or "
                "'cosine', for example."
            ) from error
    if str(as_text(args.optim)).startswith("schedule_free"):
        raise ValueError(
            f"optim={as_text(args.optim)!r} keeps averages outside of its state, which each stage resets: "
            "set it to 'adamw_torch_fused', for example."
        )


def unused_settings(args: GRPOConfig) -> list[tuple[tuple[str, ...], str]]:
    """Names of settings that the values of others leave without an effect, each with the reason and what to do."""
    losses, clips = as_list(args.extraction_loss), args.trust_region == "ppo_clip"
    of_sequences = [loss for loss in losses if EXTRACTION_LOSSES[loss].of_sequences]
    unused: list[tuple[tuple[str, ...], str]] = []
    if not of_sequences:
        reason = f" with extraction_loss={args.extraction_loss!r}: remove it, or add 'ce' or 'mse'"
        unused.append((("extraction_beta", "extraction_skips_agreeing_prompts"), reason))
    if not clips:
        reason = f" with trust_region={args.trust_region!r}: set trust_region_radius instead"
        return [*unused, (("distillation_epsilon", "distillation_epsilon_high"), reason)]
    own = args.distillation_epsilon
    if own is not None:
        reason = f", because the clip range of stage 2 is distillation_epsilon={own}"
        unused.append((("epsilon",), f"{reason}: set distillation_epsilon instead, or to None"))
    if args.epsilon_high is not None:
        unused.append(
            (("distillation_epsilon_high",), f" beside epsilon_high={args.epsilon_high}: remove one of them")
        )
    return unused


def _check_stored_rollouts(given: dict[str, Any], args: GRPOConfig, owner: str) -> None:
    if args.rounds > 1:
        raise ValueError(
            f"rounds={args.rounds} cannot be made of stored rollouts, because a later round needs rollouts of the "
            f"policy that the one before has trained: set rounds to 1, or remove the columns of the rollouts "
            f"for {owner} to sample."
        )
    if args.prompts_per_round is not None:
        raise ValueError(
            f"prompts_per_round={args.prompts_per_round} has no meaning for stored rollouts, all of which are used: "
            "remove it, and choose rows with dataset.select."
        )
    if given.get("eval_dataset") is not None and given.get("reward_funcs") is None:
        raise ValueError(
            "The completions of eval_dataset are sampled and need a reward: pass reward_funcs, or leave out "
            "eval_dataset."
        )


def check_data(given: dict[str, Any], args: GRPOConfig, owner: str) -> None:
    """Raises a `ValueError` for arguments of the trainer's constructor that ERPD cannot honour."""
    dataset = given.get("train_dataset")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{owner} draws the prompts of each round from a dataset of known length and cannot use train_dataset="
            f"{type(dataset).__name__}: pass a datasets.Dataset, e.g. Dataset.from_list(rows)."
        )
    for callback in given.get("callbacks") or []:
        if issubclass(callback if isinstance(callback, type) else type(callback), BEMACallback):
            raise ValueError(
                f"BEMACallback averages the weights of the whole run, which with {owner} are those of several "
                "policies: leave it out."
            )
    if has_stored_rollouts(dataset):
        _check_stored_rollouts(given, args, owner)
    if images := {"image", "images"} & set(dataset.column_names):
        raise ValueError(
            f"{owner} keeps the tokens of its rollouts but no images, and cannot use the column {images.pop()!r}: "
            "remove it with dataset.remove_columns."
        )
    if given.get("optimizers", (None, None))[1] is not None:
        raise ValueError(
            f"{owner}'s learning rate restarts with each stage, which a scheduler of your own does not do: pass "
            "optimizers=(optimizer, None), and set lr_scheduler_type and extraction_lr_scheduler_type."
        )
    completions = args.num_generations_eval or args.num_generations
    if given.get("eval_dataset") is not None and args.per_device_eval_batch_size * args.world_size % completions:
        raise ValueError(
            f"The held-out prompts are measured with {completions} completions each, which batches of "
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} on {args.world_size} process(es) would "
            "split: set num_generations_eval=1, or per_device_eval_batch_size to a multiple."
        )
