"""examples/self_distillation.py, and the hints of the embedded sums and of problems of one's own."""

from dataclasses import replace
from itertools import islice

import pytest
import self_distillation
import tiny
from trl import ScriptArguments

from common.math_problems import HINT_TEMPLATE, load_problems
from embedded import arithmetic, tasks
from embedded.arithmetic import HintedProblem, Problem
from embedded.arithmetic_policy import HINTED_PUPIL, HintedRecipe
from trl_ext import TrOPDConfig


def test_all_methods_on_the_embedded_task(tmp_path, run, monkeypatch):
    small = replace(HINTED_PUPIL, num_steps=2, batch_size=4, hidden_size=16, num_layers=1)
    monkeypatch.setattr(tasks, "HINTED_PUPIL", small)
    flags = ["--max_steps", 1, "--num_held_out", 4, "--per_device_train_batch_size", 8, "--logging_steps", 1]
    out = run("examples/self_distillation.py", *flags)
    assert "| teacher: base model with hints |" in out
    for method in self_distillation.METHODS:
        assert f"| {method:<5} | accuracy, greedy  |" in out
        assert (tmp_path / "self_distillation_output" / method / "adapter_model.safetensors").exists()
    assert {name for name, method in self_distillation.METHODS.items() if method.teacher == "base"} == (
        {"tropd", "opd", "rlad", "kdrl"}  # GRPO has no teacher, and SDFT has its own name for it
    )


def test_a_model_and_problems_of_ones_own(tmp_path, run, own_problems):
    flags = ["--model_name_or_path", tiny.save_policy(tmp_path / "policy"), "--bf16", "False", "--lora_r", 2]
    flags += ["--dataset_name", own_problems, "--num_held_out", 2, "--max_steps", 1, "--max_new_tokens", 4]
    flags += ["--output_dir", "out", "--logging_steps", 1, "--report_to", "none"]
    flags += ["--method", "tropd", "rlad", "sdft", "--num_generations", 2]
    out = run("examples/self_distillation.py", *flags, "--use_peft")
    assert "| tropd | KL to the teacher, nats per token |" in out
    assert "| rlad  | held-out reward " in out
    assert (tmp_path / "out" / "sdft" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="add --use_peft"):
        run("examples/self_distillation.py", *flags)


@pytest.mark.parametrize("name", self_distillation.METHODS)
def test_every_method_takes_the_flags_that_mean_the_same(tmp_path, name):
    flags = {"learning_rate": 3e-3, "temperature": 0.7, "num_generations": 4, "vllm_server_port": 8123}
    args = TrOPDConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8, **flags)
    config = self_distillation.make_config(self_distillation.METHODS[name], args, HINT_TEMPLATE, 16)
    assert {flag: getattr(config, flag) for flag in flags} == flags


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, None], ids=["messages", "text"])
def test_worked_solutions_as_hints(own_problems, template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    script_args = ScriptArguments(dataset_name=own_problems)
    data, _ = load_problems(script_args, tokenizer, 2, 0, with_hints=True)
    row = data[0]
    hint = row["privileged_context"]
    assert "####" in hint
    student, teacher = (
        (text if template is None else text[-1]["content"]) for text in (row["prompt"], row["teacher_prompt"])
    )
    assert "####" not in student
    assert teacher == HINT_TEMPLATE.format(prompt=student, privileged_context=hint)  # what TRL's SDFT makes of them


def test_hints_need_solutions(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1"}\n')
    script_args = ScriptArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="hints need a 'solution' or an 'answer' with the worked solution"):
        load_problems(script_args, tiny.tokenizer(), 0, 0, with_answers=False, with_hints=True)


def test_the_hint_of_a_sum():
    problem = Problem(57, 68)
    assert HintedProblem(*problem).prompt == "7+8=15,5+6+1=12,57+68="
    (row,) = arithmetic.as_dataset([problem], hints=True)
    assert row["teacher_prompt"] == HintedProblem(57, 68).prompt == arithmetic.HINT_TEMPLATE.format(**row)
    assert (row["prompt"], row["answer"]) == ("57+68=", "125")


def test_a_pupil_makes_mistakes_only_without_the_hint():
    batches = islice(HintedRecipe(batch_size=200).batches(), 2)
    lessons = [lesson for batch in batches for lesson in zip(*batch, strict=True)]
    hinted, plain = ([pair for pair in lessons if ("," in pair[0]) == with_hint] for with_hint in (True, False))
    assert 150 < len(hinted) < 250
    for prompt, solution in hinted:
        hint, _, asked = prompt.rpartition(",")
        assert solution.startswith(hint + ",")
        first, second = asked.removesuffix("=").split("+")
        assert solution.endswith(f",{int(first) + int(second)}")
    wrong = [solution != problem_of(prompt).worked_solution() for prompt, solution in plain]
    assert 0.3 < sum(wrong) / len(wrong) < 0.8


def problem_of(prompt):
    return Problem(*map(int, prompt.removesuffix("=").split("+")))
