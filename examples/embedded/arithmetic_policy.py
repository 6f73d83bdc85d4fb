"""Small policies for the embedded tasks, taught on the spot and kept in a cache.

The default is a Qwen3 of 0.36M parameters with a character-level tokenizer, taught sums (see `arithmetic`) by
next-token training on the solutions of a pupil who makes slips and forgets carries. It answers about 40 % of the
problems correctly when sampled, and about half of them greedily. Other arguments make a teacher: no mistakes, another
`style` of writing the steps, a larger model. More `digits` need more `num_steps`. Another task is another subclass of
`PolicyRecipe`, as in `puzzle_policy`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_linear_schedule_with_warmup

from embedded.arithmetic import (
    CHARACTERS,
    EOS,
    HintedProblem,
    Mistakes,
    Problem,
    character_tokenizer,
    split_problems,
)


@dataclass(frozen=True)
class PolicyRecipe(ABC):
    """How a policy is made. Every field, also of a subclass, is part of the policy's name in the cache."""

    num_steps: int = 300
    batch_size: int = 128  # worked solutions per step
    learning_rate: float = 2e-3
    hidden_size: int = 96
    num_layers: int = 3
    seed: int = 0
    start: PolicyRecipe | None = None  # a policy of the same size, which is trained further

    task: ClassVar[str]  # one word
    characters: ClassVar[str]  # of prompts and solutions: the vocabulary

    @abstractmethod
    def batches(self) -> Iterator[tuple[list[str], list[str]]]:
        """Prompts and worked solutions, batch after batch without end."""


@dataclass(frozen=True)
class Recipe(PolicyRecipe):
    """A policy for sums."""

    digits: int = 2
    style: str = "columns"  # of writing the steps, see `Problem.worked_solution`
    slip_rate: float = 0.2  # 0 here and below: no mistakes, a teacher
    forgotten_carry_rate: float = 0.6

    task = "sums"
    characters = CHARACTERS

    def batches(self) -> Iterator[tuple[list[str], list[str]]]:
        problems = split_problems(self.digits).train
        generator = random.Random(self.seed)
        mistakes = Mistakes(self.slip_rate, self.forgotten_carry_rate, generator)
        while True:
            lessons = [self.lesson(problem, mistakes) for problem in generator.choices(problems, k=self.batch_size)]
            yield [prompt for prompt, _ in lessons], [solution for _, solution in lessons]

    def lesson(self, problem: Problem, mistakes: Mistakes) -> tuple[str, str]:
        """Prompt and solution."""
        return problem.prompt, problem.worked_solution(self.style, mistakes)


@dataclass(frozen=True)
class HintedRecipe(Recipe):
    """A pupil who makes no mistakes where the prompt holds the hint, and the usual ones where it does not."""

    hint_share: float = 0.5  # of the lessons with the hint in the prompt

    task = "hinted-sums"

    def lesson(self, problem: Problem, mistakes: Mistakes) -> tuple[str, str]:
        if mistakes.generator.random() < self.hint_share:
            return HintedProblem(*problem).prompt, problem.worked_solution(self.style)
        return super().lesson(problem, mistakes)


PUPIL = Recipe()
HINTED_PUPIL = HintedRecipe()

_VERSION = 2  # part of the names in the cache: raise it when the code below or the form of the solutions changes


def prepare_policy(recipe: PolicyRecipe = PUPIL, cache_dir: str | Path | None = None) -> str:
    """
    Path of the policy made by `recipe` (model and tokenizer, for `from_pretrained`): from the cache, or made now.

    The cache is `cache_dir`, else `$TRL_EXT_CACHE`, else `trl_ext` among the user's caches. Several processes may call
    this at once: the main process of a node prepares while the others wait. A policy gets its name in one step once it
    is complete, so that an incomplete one is never read.
    """
    user_caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache = Path(cache_dir or os.environ.get("TRL_EXT_CACHE") or user_caches / "trl_ext").expanduser()
    path = cache / cache_name(recipe)
    start = prepare_policy(recipe.start, cache) if recipe.start else None
    with PartialState().local_main_process_first():
        if not path.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = tempfile.mkdtemp(prefix=f".{path.name}-", dir=cache)
            try:
                model, tokenizer = _teach(recipe, start)
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
                Path(unfinished, "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
                os.chmod(unfinished, 0o755)  # mkdtemp's 0700 would shut others out of a shared cache
                _move(Path(unfinished), path)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return str(path)


def cache_name(recipe: PolicyRecipe) -> str:
    """Name of the policy's folder in the cache."""
    key = hashlib.sha256(json.dumps([_VERSION, asdict(recipe)]).encode()).hexdigest()[:12]
    return f"{recipe.task}-{key}"


def _move(unfinished: Path, path: Path) -> None:
    try:
        os.rename(unfinished, path)
    except OSError:
        if not path.is_dir():  # if it is, another job has made the same policy
            raise


def _teach(recipe: PolicyRecipe, start: str | None) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """AdamW on the recipe's solutions, with a linear decay to 0."""
    tokenizer = character_tokenizer(recipe.characters)
    with torch.random.fork_rng():  # the caller's random state must not depend on the cache
        torch.manual_seed(recipe.seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=3 * recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=recipe.hidden_size // 4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        model = Qwen3ForCausalLM.from_pretrained(start) if start else Qwen3ForCausalLM(config)
        model.train().to(PartialState().device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
        schedule = get_linear_schedule_with_warmup(optimizer, recipe.num_steps // 10, recipe.num_steps)
        progress = tqdm(range(recipe.num_steps), desc=f"Training a policy for {recipe.task} (only the first time)")
        for _, (prompts, solutions) in zip(progress, recipe.batches(), strict=False):
            loss = _next_token_loss(model, tokenizer, prompts, solutions)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model, tokenizer


def _next_token_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], solutions: list[str]
) -> torch.Tensor:
    """Mean cross-entropy in nats over the tokens of the solutions and their end; prompts are not learned."""
    texts = [prompt + solution + EOS for prompt, solution in zip(prompts, solutions, strict=True)]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100  # one token per character
    return model(**inputs.to(model.device), labels=labels.to(model.device), use_cache=False).loss
