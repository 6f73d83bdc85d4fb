"""The forms of datasets that the examples read, and the reward for math problems."""

import json

import pytest
from trl import ScriptArguments

from common.math_problems import gold_answer, load_problems, math_reward


@pytest.mark.parametrize("text", ["", "\n"], ids=["empty", "blank"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows_is_one_clear_sentence(tmp_path, text, streaming):
    (tmp_path / "rows.jsonl").write_text(text)
    args = ScriptArguments(dataset_name=str(tmp_path / "rows.jsonl"), dataset_streaming=streaming)
    with pytest.raises(ValueError, match=r"rows\.jsonl (is empty|has no rows): give --dataset_name"):
        load_problems(args, None, num_held_out=4, seed=0)


@pytest.mark.parametrize(
    ("row", "prompt", "gold"),
    [
        ({"question": "1+1?", "answer": "two\n#### 1,002"}, "1+1?", "1002"),
        ({"prompt": "1+1=", "reward_model": {"ground_truth": '["2", "2.0"]'}}, "1+1=", "2"),
        ({"prompt": "1+1=", "reward_model": {"ground_truth": "\\frac{1}{2}"}}, "1+1=", "\\frac{1}{2}"),
        ({"prompt": "1+1=", "reward_model": {"ground_truth": "[0,1)"}}, "1+1=", "[0,1)"),
        ({"prompt": "1+1=", "reward_model": {"ground_truth": "[1,2]"}}, "1+1=", "[1,2]"),
        ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, "1+1?", None),
        ({"conversations": [{"role": "user", "content": "1+1?"}]}, "1+1?", None),
    ],
    ids=[
        "gsm8k",
        "verl, several answers",
        "verl",
        "verl, interval",
        "verl, vector",
        "sharegpt",
        "conversations, roles",
    ],
)
def test_forms_of_data_sets(tmp_path, row, prompt, gold):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    args = ScriptArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    problems, _ = load_problems(args, None, num_held_out=0, seed=0, with_answers=gold is not None)
    assert problems[0]["prompt"].startswith(prompt)
    assert problems[0].get("gold") == gold


def write(folder, *rows, split="rows"):
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / f"{split}.jsonl")


def test_a_conversation_that_nobody_began_is_one_clear_sentence(tmp_path):
    name = write(tmp_path, {"conversations": [{"speaker": "user", "text": "1+1?"}]})
    with pytest.raises(ValueError, match=r"no turn of the user .* keys 'speaker', 'text': write them as 'from' and"):
        load_problems(ScriptArguments(dataset_name=name), None, num_held_out=0, seed=0, with_answers=False)


def test_a_row_without_a_question_is_left_out_and_one_without_an_answer_is_not_scored(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in (("1+1?", "2"), (None, "3"), ("", "4"), ("2+2?", None))]
    with pytest.warns(UserWarning, match=r"2 rows of .* have an empty 'question' and are left out"):
        problems, _ = load_problems(ScriptArguments(dataset_name=write(tmp_path, *rows)), None, 0, seed=0)
    assert problems["gold"] == ["2", ""]
    assert math_reward(["2", "2"], problems["gold"]) == [1.0, None]


def test_fewer_problems_than_are_to_be_held_out(tmp_path):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(12)]
    write(tmp_path, *rows, split="train"), write(tmp_path, *rows[:3], split="test")
    train, held_out = load_problems(ScriptArguments(dataset_name=str(tmp_path)), None, num_held_out=400, seed=0)
    assert (len(train), len(held_out)) == (12, 3)
    args = ScriptArguments(dataset_name=str(tmp_path / "train.jsonl"), dataset_streaming=True)
    with pytest.raises(ValueError, match="at most 400 rows, all of which would be held out: lower --num_held_out"):
        load_problems(args, None, num_held_out=400, seed=0)
    train, held_out = load_problems(args, None, num_held_out=4, seed=0)
    assert (len(list(train)), len(list(held_out))) == (8, 4)


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("so \\boxed{1234}", "1,234", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("The answer is $1,234.", "1234", 1.0),
        ("The answer is 1234.00", "1234", 1.0),
        ("that makes -5", "-5", 1.0),
        ("The answer is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is 1235.", "1234", 0.0),
        ("\\boxed{12}34", "1234", 0.0),
        ("1234 at first, but \\boxed{99}", "1234", 0.0),
        ("that makes 5", "-5", 0.0),
        ("no idea", "1234", 0.0),
        ("", "1234", 0.0),
    ],
)
def test_reward_knows_right_from_wrong(completion, gold, reward):
    assert math_reward([completion], [gold_answer(f"steps\n#### {gold}")]) == [reward]
    assert math_reward([[{"role": "assistant", "content": completion}]], [gold_answer(gold)]) == [reward]
