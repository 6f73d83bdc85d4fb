"""A short run of TrOPD whose rollouts depend on the prompt alone: run by test_tropd_distributed.py."""

import argparse
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
torch.set_num_threads(1)

import tropd_runs  # noqa: E402

from trl_ext import TrOPDConfig, TrOPDTrainer  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", type=int, required=True, help="per process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--deepspeed", action="store_true", help="launched with DeepSpeed")
    parser.add_argument("--adapter_teacher", action="store_true", help="an adapter on the student is the teacher")
    parser.add_argument("--samples", action="store_true", help="really samples, of student and teacher")
    flags = parser.parse_args()
    settings = tropd_runs.settings(
        Path(flags.out),
        per_device_train_batch_size=flags.batch,
        gradient_accumulation_steps=flags.accumulation,
        learning_rate=0.05,
        optim="sgd",  # so that a difference of gradients shows as it is
        max_grad_norm=1e9,
        trust_region="expected",
        guidance="teacher" if flags.samples else "dataset",
        guidance_prefix="longest",
        guidance_coef=0.1,
        lmbda=0.5 if flags.samples else 1.0,
        num_generations=2 if flags.samples else 1,
        eval_strategy="steps" if flags.samples else "no",
        eval_steps=2,
    )
    if flags.deepspeed:
        del settings["use_cpu"]  # it would keep DeepSpeed out
        settings["ddp_backend"] = "gloo"
    args = TrOPDConfig(**settings)  # before a model is loaded, which ZeRO-3 shards as it is
    student, teacher = flags.path, flags.teacher
    if flags.adapter_teacher:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        student, teacher = get_peft_model(AutoModelForCausalLM.from_pretrained(student), lora), "expert"
        student.add_adapter(teacher, lora)
    trainer = TrOPDTrainer(
        student,
        teacher,
        args,
        train_dataset=tropd_runs.sums(64),
        eval_dataset=tropd_runs.sums(6),
        processing_class=tropd_runs.tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if flags.lora else None,
    )
    if not flags.samples:
        tropd_runs.hash_rollouts(trainer)
    trainer.train()
    trainer.save_model(str(Path(flags.out) / "final"))
    if trainer.accelerator.is_main_process:
        names = (
            "loss",
            "grad_norm",
            "teacher",
            "outliers",
            "guidance",
            "completions",
            "entropy",
            "num_tokens",
            "eval",
        )
        logs = [{k: v for k, v in log.items() if k.startswith(names)} for log in trainer.state.log_history[:-1]]
        torch.save([{k: v for k, v in log.items() if "runtime" not in k} for log in logs], Path(flags.out) / "logs.pt")
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process in its teardown, which is not what is tested here


if __name__ == "__main__":
    main()
