"""The forms of data sets that the examples read, and the reward for math problems."""

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
        ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, "1+1?", None),
    ],
    ids=["gsm8k", "verl, several answers", "verl", "sharegpt"],
)
def test_forms_of_data_sets(tmp_path, row, prompt, gold):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    args = ScriptArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    problems, _ = load_problems(args, None, num_held_out=0, seed=0, with_answers=gold is not None)
    assert problems[0]["prompt"].startswith(prompt)
    assert problems[0].get("gold") == gold


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
