"""An RLADTrainer on tiny models, and a rollout batch of it."""

import tiny

from trl_ext import RLADConfig, RLADTrainer


def make_trainer(model, tmp_path, teacher_model=None, config_class=RLADConfig, trainer_class=RLADTrainer, **kwargs):
    names = ("peft_config", "rollout_func", "processing_class", "reward_funcs")
    arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
    args = config_class(**tiny.grpo_settings(tmp_path, **kwargs))
    if trainer_class is RLADTrainer:
        arguments["teacher_model"] = teacher_model
    reward = arguments.pop("reward_funcs", tiny.digits_reward)
    return trainer_class(model, reward, args, tiny.prompts(), **arguments)


def rollout_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
