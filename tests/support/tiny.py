"""Tiny models, tokenizers, data and rewards that every test can make on the spot."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


CHARACTERS = "0123456789+-=*();,. abcdefghijklmnopqrstuvwxyz\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + '(' + message.content + ')' }}{% endfor %}"
    "{% if add_generation_prompt %}a({% endif %}"
)


def tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character; ids 0, 1, 2 are padding, end and unknown."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def policy(seed: int = 0, moe: bool = False, **overrides: Any) -> torch.nn.Module:
    """A random two-layer Qwen3 (or Qwen3-MoE) for the tokenizer above, in float32."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(CHARACTERS) + 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.2,  # far enough from uniform for entropies and ratios to differ
    }
    if moe:
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        settings |= {"router_aux_loss_coef": 0.1}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings | overrides))
    return Qwen3ForCausalLM(Qwen3Config(**settings | overrides))


def save_policy(path: Path, **kwargs: Any) -> str:
    """Writes model and tokenizer to `path` and returns it as a string, for trainers that load a reference too."""
    policy(**kwargs).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def prompts(n: int = 32) -> Dataset:
    """Sums of unequal length as plain text prompts."""
    return Dataset.from_dict({"prompt": [f"{i * 7 % 113}+{i}=" for i in range(n)]})


def digits_reward(completions: list, **kwargs: Any) -> list[float]:
    """The share of digits in a completion: something that every completion has a different amount of."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def grpo_settings(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Settings of a run of a few seconds on one core."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "num_iterations": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **overrides,
    }


def all_logps(model: Any, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of every token at each position of the completions, of shape `(batch, time, vocabulary)`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].shape[1] - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)


def naive_logps(model: Any, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the completions from full logits: what every other way to compute them must equal."""
    return all_logps(model, batch, temperature).gather(2, batch["completion_ids"][..., None]).squeeze(2)


def rollout(prompts: list, trainer: Any) -> dict[str, list]:
    """
    A `rollout_func`: samples with `generate` and scores with another model, as an inference engine in low precision
    does. Reproducible given the global seed. Every 5th token comes without a log-probability.
    """
    tokenizer = trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    sampling = GenerationConfig(
        max_new_tokens=trainer.max_completion_length, do_sample=True, eos_token_id=1, pad_token_id=0
    )
    with torch.no_grad():
        sequences = model.generate(**inputs, generation_config=sampling)
        length = inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequences[:, length:])], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    logps = logits[:, length - 1 : -1].float().log_softmax(-1)
    logps = logps.gather(2, sequences[:, length:, None]).squeeze(2)
    logps = logps - 0.3 * torch.sin(torch.arange(logps.numel())).view_as(logps).abs()  # the engine's mismatch
    result: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for i, prompt in enumerate(inputs["input_ids"]):
        completion = sequences[i, length:].tolist()
        end = completion.index(1) + 1 if 1 in completion else len(completion)
        scores: list[float | None] = logps[i, :end].tolist()
        scores[4::5] = [None] * len(scores[4::5])
        result["prompt_ids"].append(prompt[inputs["attention_mask"][i].bool()].tolist())
        result["completion_ids"].append(completion[:end])
        result["logprobs"].append(scores)
    return result


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result
