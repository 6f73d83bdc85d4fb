"""A short run whose rollouts depend on the prompt alone: run by test_distributed.py on one process or two."""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
torch.set_num_threads(1)

import tiny  # noqa: E402

from trl_ext import DRPOConfig, DRPOTrainer, RLADConfig, RLADTrainer  # noqa: E402


def rollout(prompts, trainer):
    """Completions, log-probabilities and lengths from a hash of the prompt and its number in the group."""
    output = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for i, prompt in enumerate(prompts):
        digest = hashlib.sha256(f"{prompt}{i % 4}".encode()).digest()
        length = 2 + digest[0] % 9
        output["prompt_ids"].append(trainer.processing_class(prompt)["input_ids"])
        output["completion_ids"].append([3 + byte % 45 for byte in digest[1 : length + 1]])
        output["logprobs"].append([None if byte % 7 == 0 else -0.5 - byte / 64 for byte in digest[12 : length + 12]])
    return output


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", type=int, required=True, help="per process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--loss_type", default="dapo")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--deepspeed", action="store_true", help="launched with DeepSpeed")
    parser.add_argument("--resume_from")
    parser.add_argument("--save", action="store_true", help="a checkpoint at every step")
    parser.add_argument("--unscored_rank", type=int, help="whose rollouts come without log-probabilities")
    parser.add_argument("--teacher", help="trains with RLAD and this teacher instead of DRPO")
    flags = parser.parse_args()
    settings = tiny.grpo_settings(
        Path(flags.out),
        per_device_train_batch_size=flags.batch,
        gradient_accumulation_steps=flags.accumulation,
        steps_per_generation=flags.accumulation,
        num_iterations=2,
        max_steps=6,
        loss_type=flags.loss_type,
        beta=0.05,
        learning_rate=0.05,
        optim="sgd",  # so that a difference of gradients shows as it is
        max_grad_norm=1e9,
        shuffle_dataset=False,
        save_strategy="steps" if flags.save else "no",
        save_steps=1,
    )
    if flags.deepspeed:
        del settings["use_cpu"]  # it would keep DeepSpeed out
        settings["ddp_backend"] = "gloo"
    trainer_class, config_class, teacher = DRPOTrainer, DRPOConfig, {}
    if flags.teacher:
        trainer_class, config_class, teacher = RLADTrainer, RLADConfig, {"teacher_model": flags.teacher}
    trainer = trainer_class(
        flags.path,
        tiny.digits_reward,
        config_class(**settings),
        tiny.prompts(64),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if flags.lora else None,
        rollout_func=rollout,
        **teacher,
    )
    if trainer.accelerator.process_index == flags.unscored_rank:
        trainer.rollout_func = lambda *arguments: {**rollout(*arguments), "logprobs": None}
    trainer.train(resume_from_checkpoint=flags.resume_from)
    trainer.save_model(str(Path(flags.out) / "final"))
    if trainer.accelerator.is_main_process:
        names = (
            "loss",
            "grad_norm",
            "ratio",
            "probability_shift",
            "outside_region",
            "gradient_weight",
            "regularizer",
            "sampling",
            "teacher",
            "policy_drift",
        )
        logs = [{k: v for k, v in log.items() if k.startswith(names)} for log in trainer.state.log_history[:-1]]
        torch.save(logs, Path(flags.out) / "logs.pt")
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process in its teardown, which is not what is tested here


if __name__ == "__main__":
    main()
