"""Runs cases of distributed_cases.py, one after the other: one process of a launch of one or two."""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]
torch.set_num_threads(1)

import tiny  # noqa: E402
import tropd_runs  # noqa: E402
from distributed_cases import CASES, LAYOUTS, Case  # noqa: E402
from erpd_boundary import watch_boundaries  # noqa: E402
from fixed_rollouts import rollout  # noqa: E402
from fsdp_on_cpu import allow_fsdp_on_cpu  # noqa: E402
from many_runs import prepare_for_many_runs  # noqa: E402
from tiny_erpd import right_or_wrong  # noqa: E402

from trl_ext import (  # noqa: E402
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    RLADConfig,
    RLADTrainer,
    TrOPDConfig,
    TrOPDTrainer,
)
from trl_ext.erpd.base_policy import save_whole_policy  # noqa: E402


CLASSES = {
    "drpo": (DRPOTrainer, DRPOConfig),
    "rlad": (RLADTrainer, RLADConfig),
    "tropd": (TrOPDTrainer, TrOPDConfig),
    "erpd": (ERPDTrainer, ERPDConfig),
}
BATCH = 8
COMMON = {
    "optim": "sgd",  # so that a difference of gradients shows as it is
    "optim_args": "momentum=0.9",
    "learning_rate": 0.05,
    "max_grad_norm": 1e9,
    "ddp_timeout": 120,  # seconds: a process that waits for one that has failed
}
ONLINE = {"num_iterations": 2, "max_steps": 6, "beta": 0.05, "shuffle_dataset": False}
SETTINGS = {
    "drpo": ONLINE,
    "rlad": ONLINE,
    "tropd": {
        "trust_region": "expected",
        "guidance": "dataset",
        "guidance_prefix": "longest",
        "guidance_coef": 0.1,
        "lmbda": 1.0,
    },
    "erpd": {  # 4 updates a pass: two of 8 rollouts each
        "num_iterations": 1,
        "max_steps": -1,
        "prompts_per_round": 4,
        "rounds": 2,
        "extraction_loss": "ce",
        "extraction_passes": 1,
        "distillation_passes": 2,
        "signal": "unlearned_reference",
        "distillation_anchor": "pass",
        "beta": 0.05,
        "extraction_learning_rate": 0.01,
    },
}
EVALUATED = {"num_generations": 2, "eval_strategy": "steps", "eval_steps": 2}


@contextmanager
def sampling_by_quantile(group: int) -> Iterator[None]:
    """
    While this is active, row `i` of a batch samples the token at the quantile `((i % group) + 0.5) / group` of its
    distribution, so that a prompt's completions differ, but do not depend on how many processes share the batch.
    """
    multinomial = torch.multinomial

    def at_quantile(probabilities, num_samples, *args, **kwargs):
        quantiles = (torch.arange(len(probabilities), device=probabilities.device) % group + 0.5) / group
        return (probabilities.cumsum(-1) < quantiles[:, None]).sum(-1, keepdim=True)

    torch.multinomial = at_quantile
    try:
        yield
    finally:
        torch.multinomial = multinomial


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **overrides)


def settings_of(case: Case, out: Path) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = case.accumulation if world > 1 else 1
    batch = BATCH // world // accumulation
    make = tropd_runs.settings if case.trainer == "tropd" else tiny.grpo_settings
    settings = COMMON | SETTINGS[case.trainer] | case.settings
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings |= {"per_device_eval_batch_size": BATCH // world}
    if case.trainer == "tropd" and case.generates:
        settings |= EVALUATED
    if case.trainer in ("drpo", "rlad"):
        settings |= {"steps_per_generation": accumulation}
    if case.resumes and world > 1:
        settings |= {"save_strategy": "steps", "save_steps": case.resumes}
    settings = make(out, **settings)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        del settings["use_cpu"]  # it would keep DeepSpeed out
    return {**settings, "ddp_backend": "gloo"} if world > 1 else settings


def make_trainer(case: Case, paths: Path, out: Path) -> Any:
    trainer_class, config_class = CLASSES[case.trainer]
    args = config_class(**settings_of(case, out))  # before a model is loaded, which ZeRO-3 shards as it is
    student, teacher = str(paths / "student"), str(paths / "teacher")
    if case.adapter_teacher == "folder":
        teacher = str(paths / "adapter")
    elif case.adapter_teacher == "beside":
        torch.manual_seed(0)
        student, teacher = get_peft_model(AutoModelForCausalLM.from_pretrained(student), lora()), "expert"
        student.add_adapter(teacher, lora())
    torch.manual_seed(1)  # of the adapter
    peft_config = {None: None, "lora": lora(), "head": lora(modules_to_save=["lm_head"])}[case.lora]
    if case.trainer == "tropd":
        trainer = trainer_class(
            student,
            teacher,
            args,
            train_dataset=tropd_runs.sums(64),
            eval_dataset=tropd_runs.sums(8),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config,
        )
        if not case.generates:
            tropd_runs.hash_rollouts(trainer)
        return trainer
    trainer = trainer_class(
        student,
        right_or_wrong if case.trainer == "erpd" else tiny.digits_reward,
        args,
        tiny.prompts(64),
        tiny.prompts(8) if case.trainer == "erpd" else None,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        rollout_func=None if case.generates else rollout,
        **({"teacher_model": teacher} if case.trainer == "rlad" else {}),
    )
    if case.fault == "unscored" and trainer.accelerator.process_index == 1:
        trainer.rollout_func = lambda *arguments: {**rollout(*arguments), "logprobs": None}
    return trainer


def train(case: Case, paths: Path, out: Path, resume_from: Path | None = None) -> None:
    """Writes the final weights and the logs to `out`."""
    trainer = make_trainer(case, paths, out)
    if case.trainer == "erpd" and resume_from is None:
        watch_boundaries(trainer)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    save_whole_policy(trainer, str(out / "final"))
    if trainer.accelerator.is_main_process:
        logs = [log for log in trainer.state.log_history if "train_runtime" not in log]
        torch.save(logs, out / "logs.pt")
    trainer.accelerator.wait_for_everyone()


def run(case: Case, paths: Path, out: Path) -> None:
    quantiles = sampling_by_quantile(1 if case.trainer == "tropd" else 4)
    with quantiles if case.generates else nullcontext():
        train(case, paths, out)
    if case.resumes and torch.distributed.is_initialized():
        checkpoint = out / f"checkpoint-{case.resumes}"
        if case.fault == "lost_rollouts":
            (checkpoint / "rollouts_1.safetensors").unlink(missing_ok=True)
            torch.distributed.barrier()
        gc.collect()
        train(case, paths, out / "resumed", checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--paths", type=Path, required=True, help="folder of the student and the teachers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, help="layout/case")
    flags = parser.parse_args()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    launched_with = dict(os.environ)
    prepare_for_many_runs()
    for name in flags.runs:
        layout, case = name.split("/")
        os.environ.update(launched_with | (LAYOUTS[layout].environment if layout in LAYOUTS else {}))
        out = flags.out / name
        out.mkdir(parents=True, exist_ok=True)
        try:
            run(CASES[case], flags.paths, out)
        except Exception:  # the other cases run nevertheless
            (out / f"error_{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
        gc.collect()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process in its teardown, which is not what is tested here


if __name__ == "__main__":
    main()
