"""A short run of ERPD whose rollouts depend on the prompt alone: run by test_erpd_distributed.py."""

import argparse
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig


sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]
torch.set_num_threads(1)

import tiny  # noqa: E402
from tiny_erpd import parameters, right_or_wrong, settings  # noqa: E402
from train_once import rollout  # noqa: E402

from trl_ext import ERPDConfig, ERPDTrainer  # noqa: E402
from trl_ext.erpd.base_policy import WeightsCopy  # noqa: E402
from trl_ext.erpd.stages import Stages  # noqa: E402


class Watched(ERPDTrainer):
    """Stops where the base policy was not restored to the bit, or the optimizer remembers something."""

    def watch(self):
        begin = Stages._begin_phase

        def begin_phase(stages, phase, new_round):
            begin(stages, phase, new_round)
            weights = WeightsCopy(self).take().tensors
            assert all(map(torch.equal, weights, stages.base.tensors)) or not stages.base.tensors
            full = self.full_weights()
            if new_round:
                self.start = full
            assert all(torch.equal(full[name], expected) for name, expected in self.start.items()), phase
            optimizer = self.optimizer
            while hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            assert not optimizer.state, phase

        Stages._begin_phase = begin_phase

    def full_weights(self):
        """As the forward pass sees them: gathered where they are sharded."""
        if self.args.deepspeed_plugin is None or self.args.deepspeed_plugin.zero_stage < 3:
            return parameters(self)
        from deepspeed import zero

        with zero.GatheredParameters(list(self.model.parameters())):
            return parameters(self)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", type=int, required=True, help="per process")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--deepspeed", action="store_true", help="launched with DeepSpeed")
    parser.add_argument("--extraction_loss", default="ce")
    parser.add_argument("--resume_from")
    parser.add_argument("--save", action="store_true", help="a checkpoint at every step")
    flags = parser.parse_args()
    overrides = settings(
        Path(flags.out),
        per_device_train_batch_size=flags.batch,
        rounds=2,
        extraction_loss=flags.extraction_loss,
        extraction_passes=1,
        distillation_passes=2,
        signal="unlearned_reference",
        distillation_anchor="pass",
        beta=0.05,
        learning_rate=0.05,
        extraction_learning_rate=0.01,
        optim="sgd",  # so that a difference of gradients shows as it is
        optim_args="momentum=0.9",
        max_grad_norm=1e9,
        save_strategy="steps" if flags.save else "no",
        save_steps=1,
        per_device_eval_batch_size=flags.batch,
    )
    if flags.deepspeed:
        del overrides["use_cpu"]  # it would keep DeepSpeed out
        overrides["ddp_backend"] = "gloo"
    trainer = Watched(
        flags.path,
        right_or_wrong,
        ERPDConfig(**overrides),
        tiny.prompts(64),
        tiny.prompts(8),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if flags.lora else None,
        rollout_func=rollout,
    )
    if not flags.resume_from:
        trainer.watch()
    trainer.train(resume_from_checkpoint=flags.resume_from)
    trainer.save_model(str(Path(flags.out) / "final"))
    if trainer.accelerator.is_main_process:
        names = ("loss", "grad_norm", "kl", "signal", "fixed_set", "base/", "teacher_", "unlearned_", "distilled/")
        names += ("extraction/", "round", "stage", "clip_ratio/high_mean")
        logs = [{k: v for k, v in log.items() if k.startswith(names)} for log in trainer.state.log_history[:-1]]
        torch.save(logs, Path(flags.out) / "logs.pt")
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process in its teardown, which is not what is tested here


if __name__ == "__main__":
    main()
