"""Samplers of lower precision than the policy that is trained, with their true log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from studies.runs import UNSCORED


def to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def to_bits(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Symmetric rounding with a scale for each row: an output channel of a weight, a token of an activation."""
    levels = 2 ** (bits - 1) - 1

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-8) / levels
        return (values / scale).round() * scale

    return rounded


SAMPLERS = {"bfloat16": to_bfloat16, **{f"{bits} bits": to_bits(bits) for bits in (8, 6, 5, 4)}}


class LowPrecisionSampler:
    """
    A `rollout_func`: samples from a copy of the policy in which the weights and inputs of all linear layers, including
    the LM head, are rounded; `logprobs` are those of the copy, from which the tokens were really drawn, or `None`
    for a name with the suffix `UNSCORED`.
    """

    def __init__(self, name: str):
        self.rounding = SAMPLERS[name.removesuffix(UNSCORED)]
        self.scores = not name.endswith(UNSCORED)

    def copy_of(self, model: Any) -> Any:
        # Not a deepcopy: the trainer has replaced the model's `forward`, which a copy would share
        sampler = type(model)(model.config).eval()
        sampler.load_state_dict(model.state_dict())
        for module in sampler.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(self.rounding(module.weight.detach()), requires_grad=False)
                module.register_forward_pre_hook(lambda _, inputs: (self.rounding(inputs[0]), *inputs[1:]))
        return sampler

    @torch.no_grad()
    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[list[Any]] | None]:
        tokenizer = trainer.processing_class
        sampler = self.copy_of(trainer.accelerator.unwrap_model(trainer.model))
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        result = sampler.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=trainer.max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = result.sequences[:, inputs["input_ids"].shape[1] :]
        logps = torch.stack(result.logits, dim=1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        lengths = (tokens != tokenizer.pad_token_id).sum(1).tolist()  # the end of sequence is another token
        return {
            "prompt_ids": [
                ids[mask.bool()].tolist()
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ],
            "completion_ids": [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(logps, lengths, strict=True)] if self.scores else None,
        }
