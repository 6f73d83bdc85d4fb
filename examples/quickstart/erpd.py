"""
ERPD on math problems: extract from one set of rollouts, then distil into the policy they came from.

Meant for a GPU, where it has not been run yet: accelerate launch examples/quickstart/erpd.py
"""

from datasets import load_dataset
from trl.rewards import accuracy_reward  # needs math-verify: pip install ".[math]"

from trl_ext import ERPDConfig, ERPDTrainer


problems = load_dataset("trl-lib/DeepMath-103K", split="train").train_test_split(test_size=128, seed=0)
trainer = ERPDTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=accuracy_reward,
    args=ERPDConfig(
        output_dir="erpd_quickstart",
        prompts_per_round=512,  # more prompts rather than more rollouts of each
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,  # 64 rollouts per update: many small updates go further than few large ones
        num_generations_eval=1,
        learning_rate=1e-6,  # of both stages
        max_completion_length=1024,
        logging_steps=16,
    ),
    train_dataset=problems["train"],
    eval_dataset=problems["test"],  # the policies are measured on these between the stages
)
trainer.train()
trainer.save_model()
