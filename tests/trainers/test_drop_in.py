"""What runs with `GRPOTrainer` runs with the class name changed: scripts, images, environments, conversations."""

import re
from inspect import getsource
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3Config,
)
from trl import GRPOConfig, GRPOTrainer
from trl.scripts import grpo

from trl_ext import DRPOTrainer, RLADTrainer


@pytest.mark.slow
def test_trls_own_script_with_the_class_name_changed(tmp_path, run_script):
    """TRL's GRPO script, with one word replaced and one import added, trains to the end on a local file."""
    source = getsource(grpo)
    changed, count = re.subn(
        r"from trl import GRPOTrainer,", "from trl_ext import DRPOTrainer as GRPOTrainer\n    from trl import", source
    )
    assert count == 1
    (tmp_path / "script.py").write_text(changed)
    reward = getsource(tiny.digits_reward).replace("def digits_reward", "def reward")
    (tmp_path / "rewards.py").write_text("from typing import Any\n" + reward)
    tiny.prompts().to_json(tmp_path / "data" / "train.jsonl")
    path = tiny.save_policy(tmp_path / "policy")
    flags = [
        "--model_name_or_path",
        path,
        "--dataset_name",
        str(tmp_path / "data"),
        "--reward_funcs",
        "rewards.reward",
    ]
    flags += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "False", "--report_to", "none"]
    flags += ["--max_steps", "3", "--num_generations", "4", "--num_iterations", "2", "--max_completion_length", "8"]
    flags += ["--logging_steps", "1", "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    printed, _ = run_script(tmp_path / "script.py", *flags)
    assert "probability_shift/max" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def same_logs(ours, theirs, but=()):
    """Generation and rewards must not notice which trainer they serve."""
    for name in ("reward", "completions/mean_length", "num_tokens", *but):
        assert ours.state.log_history[0][name] == theirs.state.log_history[0][name]


def vision_language_model():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}",
    )
    return LlavaForConditionalGeneration(config), processor


@pytest.mark.supports("drpo", "vision-language model")
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_images_reach_the_model(tmp_path, num_iterations):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+{i}="}],
            "image": Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)),
        }
        for i in range(8)
    ]
    trainers = []
    for trainer_class in (GRPOTrainer, DRPOTrainer):
        model, processor = vision_language_model()
        seen = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: (
                seen.append(kwargs.get("pixel_values")) if kwargs.get("fused_lm_head") else None
            ),
            with_kwargs=True,
        )
        args = GRPOConfig(**tiny.grpo_settings(tmp_path, num_iterations=num_iterations, max_steps=2))
        trainer = trainer_class(model, tiny.digits_reward, args, Dataset.from_list(rows), processing_class=processor)
        trainer.train()
        assert all(pixels is not None and len(pixels) == 8 for pixels in seen)
        trainers.append(trainer)
    same_logs(trainers[1], trainers[0])
    vision = [p for n, p in trainers[1].model.named_parameters() if "multi_modal_projector" in n and "weight" in n]
    fresh = [
        p for n, p in vision_language_model()[0].named_parameters() if "multi_modal_projector" in n and "weight" in n
    ]
    assert vision
    assert not any(torch.equal(ours, start) for ours, start in zip(vision, fresh, strict=True))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_environment_tokens_have_no_gradient_and_no_metrics(tmp_path, loss_type):
    """Tokens that a tool or environment wrote (`tool_mask` 0) neither train nor count."""
    path = tiny.save_policy(tmp_path / "policy")

    def rollout_that_ends_in(token):
        def rollout(prompts, trainer):
            output = tiny.rollout(prompts, trainer)
            # The environment's tokens are the last; their log-probabilities are nonsense, as a sampler has none
            output["env_mask"] = [[1] * len(ids) + [0] * 3 for ids in output["completion_ids"]]
            output["completion_ids"] = [[*ids, 5, 6, token] for ids in output["completion_ids"]]
            output["logprobs"] = [[*scores, None, -1e30, -1e30] for scores in output["logprobs"]]
            return output

        return rollout

    def reward(completions, **kwargs):
        return [float(i % 4) for i in range(len(completions))]

    results = []
    for token in (7, 8):  # nothing follows it, so that it is context to nothing
        args = GRPOConfig(**tiny.grpo_settings(tmp_path, loss_type=loss_type))
        trainer = DRPOTrainer(path, reward, args, tiny.prompts(), rollout_func=rollout_that_ends_in(token))
        trainer.train()
        results.append(trainer)
    assert 0.05 < results[0].state.log_history[0]["sampling/missing_logps"] < 0.25
    assert results[0].state.log_history[0]["ratio/max"] < 2
    for (name, first), (_, second) in zip(
        results[0].model.named_parameters(), results[1].model.named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name


def test_conversations_and_reward_arguments(tmp_path):
    rows = {
        "prompt": [[{"role": "user", "content": f"{i}+1="}] for i in range(16)],
        "answer": [str(i + 1) for i in range(16)],
    }
    seen = []

    def reward(completions, answer, **kwargs):
        seen.extend(answer)
        return tiny.digits_reward(completions)

    trainers = []
    for trainer_class in (GRPOTrainer, DRPOTrainer):
        args = GRPOConfig(**tiny.grpo_settings(tmp_path))
        trainer = trainer_class(
            tiny.policy(), reward, args, Dataset.from_dict(rows), processing_class=tiny.tokenizer()
        )
        trainer.train()
        trainers.append(trainer)
    same_logs(trainers[1], trainers[0], but=("rewards/reward/mean",))
    assert set(seen) <= {str(i + 1) for i in range(16)}
    assert seen


@pytest.mark.supports("rlad", "vision-language model")
def test_images_reach_the_teacher(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "image": image} for i in range(8)]
    model, processor = vision_language_model()
    teacher, _ = vision_language_model()
    for parameter in teacher.parameters():
        parameter.data *= 1.1
    seen = []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values")), with_kwargs=True
    )
    args = GRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=2))
    trainer = RLADTrainer(
        model, tiny.digits_reward, args, Dataset.from_list(rows), processing_class=processor, teacher_model=teacher
    )
    trainer.train()
    assert [len(pixels) for pixels in seen] == [8]
    assert trainer.state.log_history[0]["teacher/log_ratio_abs"] > 0


def test_the_readmes_loss_of_ones_own(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "policy_loss" in block)
    names = {}
    exec(code, names)
    args = GRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=2))
    trainer = names["ReinforceTrainer"](
        tiny.policy(), tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    trainer.train()
    assert any(
        not torch.equal(ours, start)
        for ours, start in zip(trainer.model.parameters(), tiny.policy().parameters(), strict=True)
    )


def test_a_subclass_may_call_trls_methods_by_keyword(path, tmp_path):
    """As one that changes rewards in GRPOTrainer does."""

    class Halved(DRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return 0.5 * super()._calculate_rewards(
                inputs=inputs, prompts=prompts, completions=completions, completion_ids_list=completion_ids_list
            )

    rewards = []
    for trainer_class in (DRPOTrainer, Halved):
        args = GRPOConfig(**tiny.grpo_settings(tmp_path, max_steps=1))
        trainer = trainer_class(path, tiny.digits_reward, args, tiny.prompts())
        torch.manual_seed(0)
        trainer.train()
        rewards.append(trainer.state.log_history[0]["reward"])
    assert rewards[1] == pytest.approx(0.5 * rewards[0])
    assert rewards[0] > 0
