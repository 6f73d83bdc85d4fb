"""
GRPO with DRPO's trust region, on math problems.

Meant for a GPU, where it has not been run yet: accelerate launch examples/quickstart/drpo.py
"""

from datasets import load_dataset
from trl.rewards import accuracy_reward  # needs math-verify: pip install ".[math]"

from trl_ext import DRPOConfig, DRPOTrainer


trainer = DRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=accuracy_reward,
    args=DRPOConfig(
        output_dir="drpo_quickstart",
        learning_rate=1e-6,
        num_generations=8,
        per_device_train_batch_size=8,
        steps_per_generation=8,  # a rollout batch of 8 x 8 = 64 completions
        num_iterations=2,  # two passes over each: the trust region is for rollouts that are used more than once
        max_completion_length=1024,
        logging_steps=8,
    ),
    train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
)
trainer.train()
trainer.save_model()
