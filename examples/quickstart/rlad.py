"""
GRPO with a teacher in its ratio, on math problems.

Meant for a GPU, where it has not been run yet: accelerate launch examples/quickstart/rlad.py
"""

from datasets import load_dataset
from trl.rewards import accuracy_reward  # needs math-verify: pip install ".[math]"

from trl_ext import RLADConfig, RLADTrainer


trainer = RLADTrainer(
    model="Qwen/Qwen3-0.6B",
    teacher_model="Qwen/Qwen3-4B",  # with the same tokenizer; it only scores the student's completions
    reward_funcs=accuracy_reward,
    args=RLADConfig(
        output_dir="rlad_quickstart",
        learning_rate=1e-6,
        num_generations=8,
        per_device_train_batch_size=8,
        steps_per_generation=8,
        num_iterations=2,
        max_completion_length=2048,
        logging_steps=8,
        chat_template_kwargs={"enable_thinking": False},
    ),
    train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
)
trainer.train()
trainer.save_model()
