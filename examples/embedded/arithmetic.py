"""The task embedded in the examples: sums with written-out steps. Nothing is downloaded.

`57+68=` is continued as `7+8=15,5+6+1=12,125`: the columns from the right, each with its carry, then the sum. Here are
the problems, the tokenizer, the reward and the accuracy; `arithmetic_policy` makes the policies.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.models import unwrap_model_for_generation


PAD, EOS, UNK = "<|pad|>", "<|end|>", "<|unk|>"
CHARACTERS = "0123456789+=,"
TOKENS_PER_DIGIT = 16  # of a completion, for each digit of the numbers: enough for steps and answer
HINT_TEMPLATE = "{privileged_context},{prompt}"  # TRL's names


@dataclass
class Mistakes:
    """A pupil who at times writes a random sum for two digits, and often forgets a carry. Both are probabilities."""

    slip_rate: float = 0.0
    forgotten_carry_rate: float = 0.0
    generator: random.Random = field(default_factory=random.Random)

    def digit_sum(self, correct: int) -> int:
        return self.generator.randrange(19) if self.generator.random() < self.slip_rate else correct

    def carry(self, correct: int) -> int:
        return 0 if self.generator.random() < self.forgotten_carry_rate else correct


class Problem(NamedTuple):
    """One sum, of two numbers with the same number of digits. Its prompt is `57+68=`, its answer `125`."""

    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> str:
        return str(self.first + self.second)

    def worked_solution(self, style: str = "columns", mistakes: Mistakes | None = None) -> str:
        """
        The steps and the answer: `columns` as in `7+8=15,5+6+1=12,125`, `places` as in `50+60=110,7+8=15,125`, `mixed`
        for one of the two at random.
        """
        if style not in ("columns", "places", "mixed"):
            raise ValueError(f"style={style!r} is unknown: set it to 'columns', 'places' or 'mixed'.")
        mistakes = mistakes or Mistakes()
        if style == "mixed":
            style = mistakes.generator.choice(("columns", "places"))
        columns = list(zip(str(self.first)[::-1], str(self.second)[::-1], strict=True))
        steps: list[str] = []
        answer = carry = 0
        for place, (a, b) in enumerate(columns):
            digit_sum = mistakes.digit_sum(int(a) + int(b))
            total = digit_sum + carry
            if style == "columns":
                steps.append(f"{a}+{b}{'+1' * carry}={total}")
            else:
                steps.insert(0, f"{int(a) * 10**place}+{int(b) * 10**place}={digit_sum * 10**place}")
            last = place == len(columns) - 1
            answer += (total if last else total % 10) * 10**place
            carry = mistakes.carry(total // 10)
        return ",".join([*steps, str(answer)])

    @property
    def hint(self) -> str:
        """The steps with their carries, without the answer: `7+8=15,5+6+1=12`."""
        return self.worked_solution().rpartition(",")[0]


class HintedProblem(Problem):
    """A sum whose prompt begins with the hint: `7+8=15,5+6+1=12,57+68=`."""

    @property
    def prompt(self) -> str:
        return HINT_TEMPLATE.format(privileged_context=self.hint, prompt=super().prompt)


class Splits(NamedTuple):
    """Disjoint lists of problems; `a+b` and `b+a` are always in the same one."""

    train: list[Problem]
    held_out: list[Problem]


def split_problems(digits: int = 2, num_train: int = 6000, num_held_out: int = 1000) -> Splits:
    """Sums of two numbers of `digits` digits each. The same arguments give the same problems, on every machine."""
    low, high = 10 ** (digits - 1), 10**digits
    if digits < 1 or num_train + num_held_out > 0.9 * (high - low) ** 2:
        raise ValueError(
            f"Two numbers of {digits} digits do not make {num_train + num_held_out} different sums: ask for fewer."
        )
    generator = random.Random(digits)
    splits, seen = Splits([], []), set()
    while len(splits.train) < num_train or len(splits.held_out) < num_held_out:
        a, b = generator.randrange(low, high), generator.randrange(low, high)
        if (a, b) not in seen:
            seen |= {(a, b), (b, a)}
            held_out = generator.random() < num_held_out / (num_train + num_held_out)
            splits[held_out].extend([Problem(a, b)] if a == b else [Problem(a, b), Problem(b, a)])
    for split in splits:
        generator.shuffle(split)
    return Splits(splits.train[:num_train], splits.held_out[:num_held_out])


def as_dataset(problems: Sequence[Problem], hints: bool = False) -> Dataset:
    """
    The columns `prompt` and `answer`. With `hints` also `privileged_context`, which is the hint (for TRL's SDFT), and
    `teacher_prompt`, which is the prompt with the hint.
    """
    rows: list[dict[str, str]] = [{"prompt": p.prompt, "answer": p.answer} for p in problems]
    if hints:
        for row, problem in zip(rows, problems, strict=True):
            row |= {"privileged_context": problem.hint, "teacher_prompt": HintedProblem(*problem).prompt}
    return Dataset.from_list(rows)


def correct_answer(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """Verifiable reward: 1.0 where what follows the last comma is the answer, else 0.0. The steps are not judged."""
    return [float(text.rsplit(",", 1)[-1] == gold) for text, gold in zip(completions, answer, strict=True)]


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character of `characters`. Prompts get no beginning-of-sequence token, like Qwen's."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNK, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding would put spaces between the characters
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def complete(
    model: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], greedy: bool
) -> tuple[torch.Tensor, list[str]]:
    """One completion for each problem: token ids of prompt and completion, and the completion as text."""
    # top_k=0 and top_p=1: from the whole vocabulary, as in training
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    inputs = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt", return_token_type_ids=False)
    outputs = model.generate(
        **inputs.to(model.device),
        **sampling,
        max_new_tokens=TOKENS_PER_DIGIT * max(len(str(p.first)) for p in problems),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return outputs, texts


def accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    greedy: bool = False,
    batch_size: int = 500,
) -> float:
    """Share of `problems` answered correctly, with one completion each: sampled at temperature 1, or `greedy`."""
    was_training = model.training
    model.eval()
    right = 0.0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        right += sum(correct_answer(complete(model, tokenizer, batch, greedy)[1], [p.answer for p in batch]))
    model.train(was_training)
    return right / len(problems)


@torch.no_grad()
def compare_with_base(
    model: Any, base: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], num_samples: int = 4
) -> tuple[float, float, float]:
    r"""
    Accuracy of `num_samples` samples of each problem, accuracy of the greedy answer, and \\( \mathrm{KL}(\pi \|
    \pi_0) \\) to `base` in nats per sequence: the mean of \\( \log \pi - \log \pi_0 \\) over the same samples. The
    random numbers are the same for every model.
    """
    right = log_ratio = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(num_samples):
            tokens, texts = complete(model, tokenizer, problems, greedy=False)
            right += sum(correct_answer(texts, [p.answer for p in problems]))
            length = len(tokenizer(problems[0].prompt)["input_ids"])  # of every prompt: they have the same digits
            ended = (tokens[:, length:] == tokenizer.eos_token_id).cumsum(1)
            written = (ended == 0) | ((ended == 1) & (tokens[:, length:] == tokenizer.eos_token_id))
            logps = [_logps(policy, tokens, length) for policy in (model, base)]
            log_ratio += ((logps[0] - logps[1]) * written).sum().item()
    total = num_samples * len(problems)
    return right / total, accuracy(model, tokenizer, problems, greedy=True), log_ratio / total


def _logps(model: Any, tokens: torch.Tensor, start: int) -> torch.Tensor:
    logits = model(tokens).logits[:, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, start:, None]).squeeze(-1)


def held_out_accuracy(trainer: Any, problems: Sequence[Problem]) -> dict[str, float]:
    """`accuracy` of the policy of a TRL trainer, sampled and greedy; each process takes its share of the problems."""
    if not problems:
        return {}
    accelerator = trainer.accelerator
    measures = {}
    with (
        unwrap_model_for_generation(trainer.model_wrapped, accelerator) as model,
        accelerator.split_between_processes(list(problems)) as share,
    ):
        for name, greedy in (("accuracy, sampled", False), ("accuracy, greedy", True)):
            right = accuracy(model, trainer.processing_class, share, greedy) * len(share) if share else 0.0
            total = accelerator.reduce(torch.tensor(right, device=accelerator.device), reduction="sum")
            measures[name] = total.item() / len(problems)
    return measures
