"""Math problems with known answers, from a hub dataset or a local file: prompts, answers, reward."""

from __future__ import annotations

import ast
import re
import threading
import warnings
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl import ScriptArguments


try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError:
    parse = None

INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
QUESTION_COLUMNS = ("prompt", "question", "problem", "conversations")  # the last in ShareGPT's form
HINT_COLUMNS = ("solution", "answer")  # the worked solution
HINT_TEMPLATE = "{prompt}\n\n{privileged_context}"  # TRL's SDFT
ANSWER_COLUMNS = ("answer", "solution", "reward_model")  # `answer` is shorter than `solution`; the last is verl's form
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_problems(
    script_args: ScriptArguments,
    tokenizer: Any,
    num_held_out: int,
    seed: int,
    with_answers: bool = True,
    with_hints: bool = False,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Training and held-out problems, with the columns `prompt` and, `with_answers`, `gold`. `with_hints` also
    `privileged_context`, which holds the worked solution, and `teacher_prompt`, the prompt with it.

    The first `num_held_out` problems of the test split are held out. Without such a split, they are drawn from the
    training split, at most a tenth of it (of a stream they are its first rows), and not trained on.
    """
    name = script_args.dataset_name
    file_format = FILE_FORMATS.get(Path(name).suffix)
    if file_format is not None and not Path(name).is_file():
        raise FileNotFoundError(f"There is no file {name}: give --dataset_name a file that exists, or a hub name.")
    if file_format is not None and _is_blank(Path(name)):
        raise ValueError(f"{name} is empty: give --dataset_name a file with one problem per row.")
    splits = load_dataset(
        file_format or name,
        name=script_args.dataset_config,
        data_files=name if file_format else None,
        streaming=script_args.dataset_streaming,
    )
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"{name} has no split {script_args.dataset_train_split!r}: set --dataset_train_split to one of "
            f"{', '.join(map(repr, splits))}."
        )
    as_problems = partial(
        _as_problems, name=name, tokenizer=tokenizer, with_answers=with_answers, with_hints=with_hints
    )
    train = as_problems(splits[script_args.dataset_train_split])
    if num_held_out == 0:
        return train, None
    if script_args.dataset_test_split in splits and script_args.dataset_test_split != script_args.dataset_train_split:
        test = splits[script_args.dataset_test_split]
        number = num_held_out if isinstance(test, IterableDataset) else min(num_held_out, len(test))
        return train, as_problems(test.take(number))
    return _hold_out(train, num_held_out, seed)


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not file.read(1024).strip()


def _hold_out(
    train: Dataset | IterableDataset, number: int, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    if isinstance(train, IterableDataset):
        if next(iter(train.skip(number)), None) is None:
            raise ValueError(
                f"The dataset has at most {number} rows, all of which would be held out: lower --num_held_out, or "
                "leave out --dataset_streaming."
            )
        return train.skip(number), train.take(number)
    if len(train) < 2:
        return train, None
    parts = train.train_test_split(test_size=min(number, max(1, len(train) // 10)), seed=seed)
    return parts["train"], parts["test"]


def _as_problems(
    dataset: Dataset | IterableDataset, name: str, tokenizer: Any, with_answers: bool, with_hints: bool
) -> Dataset | IterableDataset:
    columns = dataset.column_names or list(next(iter(dataset), ()))
    if not columns or (isinstance(dataset, Dataset) and not len(dataset)):
        raise ValueError(f"{name} has no rows: give --dataset_name a dataset with one problem per row.")
    question = next((column for column in QUESTION_COLUMNS if column in columns), None)
    answer = next((column for column in ANSWER_COLUMNS if column in columns), None)
    if question is None or (with_answers and answer is None):
        answers = " and an 'answer', 'solution' or 'reward_model'" if with_answers else ""
        raise ValueError(
            f"{name} has the columns {', '.join(map(repr, columns))}, but it must have a 'prompt', 'question', "
            f"'problem' or 'conversations'{answers}: rename its columns."
        )
    hint = next((column for column in HINT_COLUMNS if column in columns), None)
    if with_hints and hint is None:
        raise ValueError(
            f"{name} has the columns {', '.join(map(repr, columns))}, but hints need a 'solution' or an 'answer' with "
            "the worked solution: rename its columns."
        )
    conversational = bool(getattr(tokenizer, "chat_template", None))

    def as_problem(row: dict[str, Any]) -> dict[str, Any]:
        asked = _first_question(row[question], name) if question == "conversations" else row[question]
        problem = {"prompt": as_prompt(asked, question == "prompt", conversational)}
        if with_answers and answer is not None:
            # Not named `answer`: `map` would cast it back to the type of that column
            problem["gold"] = gold_answer(row[answer])
        if with_hints and hint is not None:
            problem["privileged_context"] = f"A correct solution, for reference:\n{row[hint]}"
            problem["teacher_prompt"] = hinted_prompt(problem["prompt"], problem["privileged_context"])
        return problem

    asked = dataset.filter(lambda row: bool(row[question]))
    if isinstance(dataset, Dataset) and (left_out := len(dataset) - len(asked)):
        warnings.warn(f"{left_out} rows of {name} have an empty {question!r} and are left out.", stacklevel=2)
    return asked.map(as_problem, remove_columns=columns)


def _first_question(turns: list[dict[str, Any]], name: str) -> str:
    """Of a conversation in ShareGPT's form, or with roles and contents."""
    for turn in turns:
        if turn.get("from", turn.get("role")) in ("human", "user"):
            return turn["value"] if "value" in turn else turn["content"]
    keys = ", ".join(map(repr, turns[0]))
    raise ValueError(
        f"A row of {name} has no turn of the user in its 'conversations', whose turns have the keys {keys}: write "
        "them as 'from' and 'value', or as 'role' and 'content'."
    )


def as_prompt(question: Any, finished: bool, conversational: bool) -> Any:
    """
    The prompt as TRL takes it: a list of messages or, where the tokenizer has no chat template, plain text.

    A `finished` prompt (of a column `prompt`) is left as it is, except that messages become text where the tokenizer
    has no chat template.
    """
    if isinstance(question, list):
        return question if conversational else "\n\n".join(message["content"] for message in question) + "\n\n"
    if finished:
        return question
    text = f"{question}\n\n{INSTRUCTION}"
    return [{"role": "user", "content": text}] if conversational else f"{text}\n\n"


def hinted_prompt(prompt: Any, hint: str) -> Any:
    """A prompt, text or messages, with the hint at its end: in the last message."""
    if isinstance(prompt, str):
        return HINT_TEMPLATE.format(prompt=prompt, privileged_context=hint)
    return [*prompt[:-1], {**prompt[-1], "content": hinted_prompt(prompt[-1]["content"], hint)}]


def gold_answer(answer: Any) -> str:
    """
    The final answer: what follows `####` in GSM8K's worked solutions, else the whole text; in verl's form the
    `ground_truth`, the first if there are several. `1,234` becomes `1234`. Empty where there is none.
    """
    if isinstance(answer, dict):
        answer = _first_of_several(answer["ground_truth"])
    if answer is None:
        return ""
    text = str(answer).rsplit("####", 1)[-1].strip()
    number = _as_number(text)
    return text if number is None else f"{number:f}"


def _first_of_several(answers: Any) -> Any:
    """Of a list, or of text that lists texts: `["7", "8"]`. `[1, 2]` and `[0, 1)` are answers themselves."""
    if isinstance(answers, list):
        return answers[0]
    if isinstance(answers, str) and answers.startswith("["):
        with suppress(ValueError, SyntaxError):
            listed = ast.literal_eval(answers)
            if isinstance(listed, list) and listed and all(isinstance(answer, str) for answer in listed):
                return listed[0]
    return answers


def math_reward(completions: list[Any], gold: list[str], **kwargs: Any) -> list[float | None]:
    """
    Verifiable reward: 1.0 where the completion's final answer equals the gold answer, 0.0 where it does not, `None`
    (not scored) where the gold answer cannot be read.

    The final answer is in `\\boxed{}`, follows `####` or "the answer is", or is the last number or formula. By
    math-verify where it is installed, else by exact comparison of numbers.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    if parse is None:
        warnings.warn("Without math-verify only plain numbers are compared: pip install math-verify", stacklevel=2)
    compare = _same_number if parse is None else _same_by_math_verify
    return [compare(_tidy(text), answer) if answer else None for text, answer in zip(texts, gold, strict=True)]


def _tidy(text: str) -> str:
    """Rewrites forms of a final answer that math-verify does not expect into forms that it does."""
    text = text.replace("**", "")
    if "####" in text and "\\boxed" not in text:
        text = "The answer is " + (text.rsplit("####", 1)[-1].strip().split("\n")[0] or "missing")
    text = re.sub(r"-\s*\\?\$\s*(?=\d)", "-", text)  # -$5
    # "the answer is 2 + 3 = 5": 5, not 2 + 3
    return re.sub(r"(answer(?: is)?:?\s+)[^\n=\\]*=\s*(?=[-+$\d])", r"\1", text, flags=re.IGNORECASE)


def _same_by_math_verify(text: str, gold: str) -> float | None:
    # Its timeouts use SIGALRM, which only the main thread may use
    in_main_thread = threading.current_thread() is threading.main_thread()
    timeout = 5 if in_main_thread else None
    if _as_number(gold) is None and not any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\[")):
        gold = f"${gold}$"  # bare LaTeX, which the parser would read only in part
    parsed_gold = parse(gold, parsing_timeout=timeout)
    if not parsed_gold:
        return None
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = parse(text, extraction_config=extraction, extraction_mode="first_match", parsing_timeout=timeout)
    return float(verify(parsed_gold, parsed, timeout_seconds=timeout))


_NUMBER = r"[-+]?\\?\$?(?:\d[\d,]*)?\.?\d+"
_BOXED = r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"


def _same_number(text: str, gold: str) -> float | None:
    gold_number = _as_number((re.findall(_BOXED, gold) or [gold])[-1])
    if gold_number is None:
        return None
    if "\\boxed" in text:
        text = (re.findall(_BOXED, text) or [""])[-1]
    numbers = re.findall(rf"answer(?: is)?:?\s+({_NUMBER})", text, re.IGNORECASE) or re.findall(_NUMBER, text)
    return float(bool(numbers) and _as_number(numbers[-1]) == gold_number)


def _as_number(text: str) -> Decimal | None:
    """`-$1,234.50` and the like, else `None`."""
    if not re.fullmatch(r"[-+]?\s*\\?\$?\s*[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?\s*(\\?%)?\.?", text.strip()):
        return None
    try:
        return Decimal(re.sub(r"[\s,$\\%]", "", text).rstrip("."))
    except InvalidOperation:
        return None
