"""Rollouts that depend on nothing but the prompt and the completion's number in its group."""

import hashlib
from typing import Any


def rollout(prompts: list, trainer: Any) -> dict[str, list]:
    """A `rollout_func`: completions of 2 to 10 tokens, every 7th of which comes without a log-probability."""
    output: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for i, prompt in enumerate(prompts):
        digest = hashlib.sha256(f"{prompt}{i % 4}".encode()).digest()
        length = 2 + digest[0] % 9
        output["prompt_ids"].append(trainer.processing_class(prompt)["input_ids"])
        output["completion_ids"].append([3 + byte % 45 for byte in digest[1 : length + 1]])
        output["logprobs"].append([None if byte % 7 == 0 else -0.5 - byte / 64 for byte in digest[12 : length + 12]])
    return output
