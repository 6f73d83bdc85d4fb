"""What TrOPD refuses before anything is loaded, and what it warns about; each message says how to fix it."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from trl_ext.arguments import changed_settings, check_choice, in_code
from trl_ext.losses import GUIDANCE_SCHEDULES, OUTLIER_LOSSES
from trl_ext.teacher import Teacher
from trl_ext.tropd.objective import OBJECTIVES, objective_of, unused_settings
from trl_ext.tropd.prompts import check_columns


CHOICES: dict[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "trust_region": ("sampled", "expected"),
    "outlier_loss": OUTLIER_LOSSES,
    "guidance": ("none", "dataset", "teacher"),
    "guidance_schedule": GUIDANCE_SCHEDULES,
    "guidance_prefix": ("random", "longest"),
    "vllm_mode": ("colocate", "server"),
}
# Of GKDConfig and SFTConfig: settings of batches, losses or columns that TrOPDTrainer makes itself
NEVER_READ = {
    "average_tokens_across_devices",
    "beta",
    "completion_only_loss",
    "dataset_num_proc",
    "dataset_text_field",
    "eval_packing",
    "packing_strategy",
    "shuffle_dataset",
    "truncation_mode",
}


def check_tropd_args(args: Any) -> None:
    """Raises a `ValueError` for settings that TrOPD cannot honour."""
    for name, choices in CHOICES.items():
        check_choice(name, getattr(args, name), choices)
    for name in ("outlier_top_k", "eopd_top_k", "num_generations", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} leaves nothing to compute: set it to 1 or more.")
    for name in ("guidance_share", "reopold_top_entropy_share", "lmbda"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{name}={getattr(args, name)} is not a share: set it between 0 and 1.")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"temperature={args.temperature} cannot be sampled at: set it above 0, e.g. to 1.0.")
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"max_length={args.max_length} leaves no prompt: set it to 1 or more, or to None.")
    for name, learned in {"guidance_coef": "the prefixes", "outlier_clip_coef": "what the teacher prefers"}.items():
        if not 0 <= getattr(args, name) < float("inf"):
            raise ValueError(f"{name}={getattr(args, name)} would unlearn {learned}: set it to 0 or more.")
    for name, kind in {"guidance_max_length": "a length", "reopold_switch_step": "an optimizer step"}.items():
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} is not {kind}: set it to 0 or more, or to None.")
    if not args.eopd_entropy_threshold >= 0:
        raise ValueError(
            f"eopd_entropy_threshold={args.eopd_entropy_threshold} is below every entropy: set it to 0 nats or more."
        )
    for name in ("outlier_clip_floor", "reopold_floor"):
        if not getattr(args, name) <= 0:
            raise ValueError(
                f"{name}={getattr(args, name)} would reward tokens that the teacher finds less likely: set it to 0 "
                "nats or less."
            )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} sorts by the length of rows, but their "
            "completions are yet to be sampled: set it to 'random' or 'sequential'."
        )
    for name in ("packing", "padding_free", "assistant_only_loss"):
        if getattr(args, name):
            raise ValueError(
                f"TrOPDTrainer trains on completions that it samples itself, for which {name}=True has no meaning: "
                f"remove {name}."
            )
    if args.label_smoothing_factor > 0 or args.loss_type != "nll":
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} and loss_type={args.loss_type!r} belong to a "
            "likelihood loss, which TrOPDTrainer does not have: leave them at 0 and 'nll', and choose an objective."
        )


def settings_without_effect(args: Any) -> tuple[str, ...]:
    """Names of the settings that the values of others leave without an effect."""
    names = (NEVER_READ - objective_of(args).settings) | unused_settings(args)
    if args.pad_to_multiple_of is not None:  # the default, "auto", becomes None
        names.add("pad_to_multiple_of")
    if args.lmbda == 1:
        names.add("seq_kd")
    for prefix, in_use in {"guidance_": args.guidance != "none", "vllm_": args.use_vllm}.items():
        if not in_use:
            names |= {setting.name for setting in fields(args) if setting.name.startswith(prefix)}
    return tuple(sorted(names))


def warning_of_unused_settings(args: Any, trainer: str) -> str | None:
    """One sentence that names the settings that were changed and have no effect; `None` if there are none."""
    unused = changed_settings(args, settings_without_effect(args))
    if not unused:
        return None
    return (
        f"{in_code(unused)} has no effect in {trainer} with the other settings given: remove it, or see docs/tropd.md "
        "for the settings that it belongs to."
    )


def check_datasets(args: Any, trainer: str, train_dataset: Any, eval_dataset: Any) -> str | None:
    """
    Raises a `ValueError` for datasets whose columns cannot be used. Returns the setting that needs completions, or
    `None` if none does.
    """
    needs = f"lmbda={args.lmbda}" if args.lmbda < 1 and not args.seq_kd else None
    needs = "guidance='dataset'" if args.guidance == "dataset" else needs
    check_columns(trainer, train_dataset, "train_dataset", needs)
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for key, dataset in evals.items():
        check_columns(trainer, dataset, f"eval_dataset[{key!r}]" if key else "eval_dataset", None)
    return needs


def check_served_teacher(args: Any, teacher: Teacher) -> None:
    """Raises a `ValueError` for settings that need more of the teacher than a server gives."""
    if teacher.is_local:
        return
    needs_entropy = "teacher_entropy" in objective_of(args).tensors
    faults = {
        "guidance='teacher'": (args.guidance == "teacher", "set guidance='dataset' with completions of its own"),
        "seq_kd=True": (args.seq_kd and args.lmbda < 1, "set lmbda=1.0"),
        f"objective={args.objective!r}": (needs_entropy, "choose another objective"),
    }
    for setting, (at_fault, fix) in faults.items():
        if at_fault:
            raise ValueError(
                f"{setting} needs the teacher's own samples or entropies, which the server {teacher.name} does not "
                f"give here: {fix}, or load the teacher here."
            )
