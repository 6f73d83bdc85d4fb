"""
Distil a teacher into a student, on the student's own samples.

Meant for a GPU, where it has not been run yet: accelerate launch examples/quickstart/tropd.py
"""

from datasets import load_dataset

from trl_ext import TrOPDConfig, TrOPDTrainer


trainer = TrOPDTrainer(
    model="Qwen/Qwen3-0.6B",
    teacher_model="Qwen/Qwen3-4B",  # with the same tokenizer
    args=TrOPDConfig(
        output_dir="tropd_quickstart",
        learning_rate=5e-6,
        lr_scheduler_type="constant",
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,  # 8 prompts with 4 completions each per update
        max_new_tokens=1024,
        logging_steps=5,
    ),
    train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),  # no reward, and no completions
)
trainer.train()
trainer.save_model()
