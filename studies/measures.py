"""The measures of a policy, the same for every method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset

from studies.tasks import Task


ROWS = 1000  # sampled at a time


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: Dataset,
    *,
    base: Any,
    teacher: Any = None,
    samples: int | None = None,
    greedy: bool = True,
) -> dict[str, float]:
    r"""
    On `problems`, with `samples` completions each (default: the task's), drawn from the policy at temperature 1:

    - `accuracy`: share of correct completions, and `accuracy_greedy`;
    - `kl_to_base`: \\( \mathrm{KL}(\pi \| \pi_0) \\) in nats per sequence, and `kl_to_teacher`, in nats per token. At
      each sampled prefix the divergence of the next token is summed over the vocabulary, which is unbiased and never
      negative;
    - `entropy` of the next token, nats per token; `length`, tokens per completion.

    The random numbers are the same for every policy, and the caller's random state does not change.
    """
    was_training = model.training
    model.eval()
    samples = samples or task.samples
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sums = torch.zeros(4, dtype=torch.float64)  # KL to base, KL to teacher, entropy, tokens
        correct = 0
        for rows in batches(problems, samples):
            tokens, prompt_length, right = sample(model, tokenizer, task, rows)
            correct += right
            # Divergences vary little: one completion of each problem is enough
            sums += torch.tensor(compare(model, tokens[::samples], prompt_length, base, teacher))
        to_base, to_teacher, entropy, length = (sums / len(problems)).tolist()
        measures = {"accuracy": correct / (len(problems) * samples)}
        measures |= {"kl_to_base": to_base, "entropy": entropy / length, "length": length}
        if teacher is not None:
            measures["kl_to_teacher"] = to_teacher / length
        if greedy:
            right = sum(sample(model, tokenizer, task, rows, greedy=True)[2] for rows in batches(problems, 1))
            measures["accuracy_greedy"] = right / len(problems)
    model.train(was_training)
    return {name: round(value, 5) for name, value in measures.items()}


def batches(problems: Dataset, samples: int) -> Iterator[dict[str, list[str]]]:
    size = max(ROWS // samples, 1)
    for start in range(0, len(problems), size):
        rows = problems[start : start + size]
        yield {name: [value for value in rows[name] for _ in range(samples)] for name in ("prompt", "answer")}


def sample(
    model: Any, tokenizer: Any, task: Task, rows: dict[str, list[str]], greedy: bool = False
) -> tuple[torch.Tensor, int, int]:
    """Tokens of prompts and completions, the length of the prompts, and how many completions are correct."""
    inputs = tokenizer(rows["prompt"], padding=True, return_tensors="pt", return_token_type_ids=False)
    # top_k=0 and top_p=1: from the whole vocabulary, as in training
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    tokens = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=task.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prompt_length = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    right = sum(task.is_right(text, gold) for text, gold in zip(texts, rows["answer"], strict=True))
    return tokens, prompt_length, right


def compare(
    model: Any, tokens: torch.Tensor, prompt_length: int, base: Any, teacher: Any
) -> tuple[float, float, float, float]:
    """Sums over the completion tokens: KL to base, KL to teacher, entropy, 1."""
    pad = model.config.pad_token_id
    mask = tokens[:, prompt_length:] != pad

    def log_probs(scorer: Any) -> torch.Tensor:
        logits = scorer(input_ids=tokens, attention_mask=(tokens != pad).long()).logits
        return logits[:, prompt_length - 1 : -1].float().log_softmax(-1)

    own = log_probs(model)
    probs = own.exp()

    def divergence(other: Any) -> float:
        return (probs * (own - log_probs(other))).sum(-1)[mask].sum().item()

    to_teacher = divergence(teacher) if teacher is not None else 0.0
    entropy = -(probs * own).sum(-1)[mask].sum().item()
    return divergence(base), to_teacher, entropy, mask.sum().item()
