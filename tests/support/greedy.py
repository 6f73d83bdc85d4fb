"""What a model says of a few prompts: the likeliest texts, and the logits of their tokens."""

from typing import Any, NamedTuple

import tiny
import torch


class Greedy(NamedTuple):
    texts: list[str]
    logits: torch.Tensor  # (prompt, time, vocabulary)


@torch.no_grad()
def greedy(model: Any, tokenizer: Any) -> Greedy:
    """8 tokens after each of 4 prompts. Leaves the model in evaluation mode."""
    model.eval()
    inputs = tokenizer(list(tiny.prompts(4)["prompt"]), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    output = model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    completions = output.sequences[:, inputs["input_ids"].shape[1] :]
    return Greedy(tokenizer.batch_decode(completions), torch.stack(output.logits, dim=1))
