"""Checks of a dataset's columns, made before any model is loaded."""

from typing import Any

from datasets import Dataset, IterableDataset


# Columns that are likely to hold the prompts, the likeliest first
PROMPTS = ("prompts", "question", "problem", "instruction", "query", "input", "inputs", "text", "content", "user")
CONVERSATIONS = ("messages", "conversations", "conversation")


def check_prompt_column(trainer: str, train_dataset: Any, eval_dataset: Any = None) -> None:
    """Raises a `ValueError` for a dataset that is empty, or whose columns are known and lack `prompt`."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets.update({f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()})
    else:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
        if "prompt" in known_columns(trainer, dataset, name, ("prompt",)):
            check_first_prompt(dataset, name)


def check_first_prompt(dataset: Any, name: str) -> None:
    """Raises a `ValueError` where the first prompt of a dataset is neither text nor messages, or is empty."""
    if not isinstance(dataset, Dataset):
        return
    prompt = dataset["prompt"][0]
    is_messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not prompt or not (isinstance(prompt, str) or is_messages):
        raise ValueError(
            f"The first prompt of `{name}` is {prompt!r}, but a prompt must be a text or a list of messages (with "
            "'role' and 'content'), and not empty: check what dataset.map() or the file has put there."
        )


def known_columns(trainer: str, dataset: Any, name: str, wanted: tuple[str, ...]) -> list[str]:
    """
    A dataset's columns, or an empty list where they are not known.

    Raises a `ValueError` for a dataset without rows, a dictionary of splits, and a dataset that has none of the wanted
    columns.

    Args:
        name (`str`):
            Name of the argument, for messages.
        wanted (`tuple[str, ...]`):
            Columns, at least one of which is needed.
    """
    if dataset is None:
        return []
    if isinstance(dataset, str):
        raise ValueError(
            f"{trainer} takes a loaded dataset as `{name}`, got the text {dataset!r}: pass "
            f"datasets.load_dataset({dataset!r}, split='train')."
        )
    if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        raise ValueError(
            f"{trainer} takes a datasets.Dataset as `{name}`, got a {type(dataset).__name__}: pass e.g. "
            "Dataset.from_list(rows)."
        )
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, dict):
        raise ValueError(
            f"{trainer} needs one split as `{name}`, got all of them: pass e.g. dataset[{next(iter(columns))!r}]."
        )
    if (hasattr(dataset, "__len__") and not len(dataset)) or (
        isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None
    ):
        raise ValueError(
            f"`{name}` has no rows: check whether its file is empty, or a filter has removed all of them."
        )
    if isinstance(dataset, list | tuple):
        if not isinstance(dataset[0], dict):
            raise ValueError(
                f"The rows of `{name}` must be dictionaries with a {' or '.join(map(repr, wanted))}, got a "
                f"{type(dataset[0]).__name__}: pass e.g. Dataset.from_dict({{{wanted[-1]!r}: texts}})."
            )
        columns = list(dataset[0])
    row_format = getattr(dataset, "format", None)
    if not columns or (isinstance(row_format, dict) and row_format.get("type") == "custom"):
        return []  # a transform makes the columns when a row is read
    if not set(wanted) & set(columns):
        raise ValueError(
            f"{trainer} needs a {' or '.join(map(repr, wanted))} column, but `{name}` has only "
            f"{', '.join(map(repr, columns))}: {_advice(columns, wanted)}."
        )
    return columns


def _advice(columns: list[str], wanted: tuple[str, ...]) -> str:
    """How to get the wanted column, as far as the names of the columns tell."""
    by_name = {column.lower(): column for column in columns}
    conversation = next((by_name[name] for name in CONVERSATIONS if name in by_name), None)
    if conversation and "messages" in wanted:
        return f"rename yours, e.g. dataset.rename_column({conversation!r}, 'messages')"
    if conversation:  # whose last message is the answer, which must not become part of the prompt
        return (
            "make prompts of the messages before the answer, e.g. "
            f"dataset.map(lambda row: {{'prompt': row[{conversation!r}][:-1]}}, remove_columns={conversation!r})"
        )
    likely = [by_name[name] for name in PROMPTS if name in by_name] or (columns if len(columns) == 1 else [])
    if not likely:
        return f"rename the one that holds the prompts to {wanted[-1]!r} with dataset.rename_column()"
    return f"rename yours, e.g. dataset.rename_column({likely[0]!r}, {wanted[-1]!r})"
