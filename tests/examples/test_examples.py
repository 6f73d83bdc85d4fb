"""Every example script runs, shortened, with its real loading code."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ScriptArguments

from common.erpd_report import policies_table
from common.math_problems import gold_answer, load_problems, math_reward
from embedded.arithmetic import compare_with_base, split_problems


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the embedded policies are kept, so that they are taught once for all tests here."""
    return tmp_path_factory.mktemp("cache")


def run(script, folder, cache, *flags, launch=()):
    environment = {**os.environ, "TRL_EXT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, *launch, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, "\n".join(result.stderr.splitlines()[-40:])
    for noise in ("is deprecated", "pin_memory", "Experimental", "{'loss'"):
        assert noise not in result.stderr + result.stdout
    return result.stdout


def write_problems(path, n=24):
    """GSM8K's format: a question, and a worked answer that ends with `#### number`."""
    generator = random.Random(0)
    rows = []
    for _ in range(n):
        a, b = generator.randrange(2, 50), generator.randrange(1000, 2000)
        question = f"Ann has {a} boxes of {b} pens each. How many pens are there?"
        rows.append({"question": question, "answer": f"{a} * {b} = <<{a}*{b}={a * b}>>{a * b}\n#### {a * b:,}"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


# ---- drpo_math.py


def test_drpo_math_embedded(tmp_path, cache):
    out = run("examples/drpo_math.py", tmp_path, cache, "--max_steps", 16, "--num_held_out", 64)
    assert "| accuracy, sampled |" in out
    assert re.search(r"step 8/16: reward 0\.\d+, loss .*, entropy/start 1\.000, outside 0\.\d+", out)
    assert (tmp_path / "drpo_math_output" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "drpo_math_output" / "model.safetensors").exists()


def test_drpo_math_takes_flags_before_its_defaults(tmp_path, cache):
    flags = ["--max_steps", 4, "--logging_steps", 2, "--num_iterations", 1, "--learning_rate", 1e-3]
    flags += ["--trust_region", "dppo_kl", "--output_dir", "elsewhere", "--num_held_out", 0]
    out = run("examples/drpo_math.py", tmp_path, cache, *flags, "--save_steps", 2)
    assert "learning_rate=0.001, seed=42, trust_region=dppo_kl, trust_region_radius=0.05" in out
    assert (tmp_path / "elsewhere" / "checkpoint-2").is_dir()
    resumed = run(
        "examples/drpo_math.py", tmp_path, cache, *flags, "--resume_from_checkpoint", "True", "--max_steps", 6
    )
    assert "step 6/6:" in resumed
    assert "step 2/" not in resumed


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_drpo_math_with_a_model_and_problems_of_ones_own(tmp_path, cache, lora):
    problems = write_problems(tmp_path / "problems.jsonl")
    path = tiny.save_policy(tmp_path / "policy")
    (tmp_path / "settings.yaml").write_text("max_steps: 2\nnum_iterations: 2\nbf16: false\nlogging_steps: 1\n")
    flags = ["--model_name_or_path", path, "--dataset_name", problems, "--config", "settings.yaml"]
    flags += ["--max_completion_length", 8, "--num_held_out", 4, "--output_dir", "out", "--report_to", "none"]
    out = run("examples/drpo_math.py", tmp_path, cache, *flags, *(["--use_peft", "--lora_r", 2] if lora else []))
    assert "| held-out reward |" in out
    assert "step 1/2: reward" in out  # the second update reuses the rollouts of the first
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


def test_drpo_math_on_two_processes(tmp_path, cache):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = run(
        "examples/drpo_math.py", tmp_path, cache, "--max_steps", 4, "--num_held_out", 31, "--use_cpu", launch=launch
    )
    assert out.count("| accuracy, sampled |") == 1


def test_a_file_with_other_columns_is_one_clear_sentence(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text('{"text": "1+1", "label": "2"}\n')
    path = tiny.save_policy(tmp_path / "policy")
    flags = ["--model_name_or_path", path, "--dataset_name", tmp_path / "rows.jsonl", "--bf16", "False"]
    with pytest.raises(AssertionError, match="has the columns 'text', 'label', but it must have a 'prompt'"):
        run("examples/drpo_math.py", tmp_path, cache, *flags)


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


# ---- the others


SHORTER_LESSONS = """
import dataclasses, runpy, sys
sys.argv.pop(0)
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from embedded import puzzle_policy
puzzle_policy.TEACHER = dataclasses.replace(puzzle_policy.TEACHER, num_steps=20)
puzzle_policy.STUDENT = dataclasses.replace(puzzle_policy.STUDENT, num_steps=10, start=puzzle_policy.TEACHER)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_rlad_logic_embedded(tmp_path, cache):
    flags = ["--max_steps", 4, "--num_held_out", 32, "--logging_steps", 1]
    out = run("examples/rlad_logic.py", tmp_path, cache, *flags, launch=["-c", SHORTER_LESSONS])
    for method in ("GRPO", "KDRL", "RLAD"):
        assert re.search(
            rf"{method} \| held-out reward \| [01]\.\d+ *\| [01]\.\d+ *\| 4 ", out
        )  # before, after, updates
        assert (tmp_path / "rlad_logic_output" / method.lower() / "model.safetensors").exists()
    assert (tmp_path / "rlad_logic_output" / "curves.png").stat().st_size > 10_000


def test_rlad_logic_with_models_of_ones_own(tmp_path, cache):
    student, teacher = tiny.save_policy(tmp_path / "student"), tiny.save_policy(tmp_path / "teacher", seed=1)
    flags = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--max_completion_length", 8]
    flags += ["--num_people", 2, 3, "--num_train", 32, "--num_held_out", 8, "--max_steps", 2, "--bf16", "False"]
    flags += ["--output_dir", "out", "--report_to", "none", "--logging_steps", 1, "--use_peft"]
    out = run("examples/rlad_logic.py", tmp_path, cache, *flags)
    assert "| held-out reward |" in out
    assert "vetoed" in out
    assert (tmp_path / "out" / "rlad" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("trainer", ["drpo", "rlad"])
def test_benchmark_step(tmp_path, cache, trainer):
    flags = ["--turns", 1, "--rollout_batches", 1, "--layers", 1, "--hidden_size", 128, "--vocabulary", 256]
    out = run("benchmarks/step.py", tmp_path, cache, "--trainer", trainer, *flags, "--length", 16)
    assert f"{trainer}, s" in out
    assert "| old |" in out
    assert "| sampler |" in out


# ---- tropd_math.py


def test_tropd_math_embedded(tmp_path, cache):
    flags = ["--method", "tropd", "gkd", "--max_steps", 4, "--num_held_out", 16, "--logging_steps", 2]
    out = run("examples/tropd_math.py", tmp_path, cache, *flags, "--per_device_train_batch_size", 8)
    for method in ("tropd", "gkd"):
        assert f"| {method:<5} | KL to the teacher, nats per token |" in out
        assert (tmp_path / "tropd_math_output" / method / "model.safetensors").exists()
    assert (tmp_path / "tropd_math_output" / "curves.png").stat().st_size > 10_000


def test_tropd_math_with_models_and_problems_of_ones_own(tmp_path, cache):
    problems = write_problems(tmp_path / "problems.jsonl")
    student, teacher = tiny.save_policy(tmp_path / "student"), tiny.save_policy(tmp_path / "teacher", seed=1)
    flags = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--dataset_name", problems]
    flags += ["--max_steps", 2, "--max_new_tokens", 8, "--num_held_out", 4, "--output_dir", "out", "--bf16", "False"]
    flags += ["--logging_steps", 1, "--report_to", "none", "--use_peft", "--lora_r", 2, "--objective", "opd"]
    out = run("examples/tropd_math.py", tmp_path, cache, *flags)
    assert "| opd | KL to the teacher, nats per token |" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_tropd_math_wants_both_a_model_and_a_dataset(tmp_path, cache):
    with pytest.raises(AssertionError, match="go together"):
        run("examples/tropd_math.py", tmp_path, cache, "--dataset_name", "some")


def test_benchmark_distillation(tmp_path, cache):
    flags = ["--turns", 1, "--steps", 1, "--loss_tokens", 64, "--loss_vocabulary", 500, "--loss_width", 16]
    flags += ["--hidden_size", 128, "--layers", 1, "--vocabulary", 500, "--batch_size", 2, "--length", 8]
    out = run("benchmarks/distillation.py", tmp_path, cache, *flags)
    assert out.count("| loss |") == out.count("| step |") == 1


# ---- erpd_math.py


ERPD_QUICK = ["--prompts_per_round", 16, "--extraction_passes", 2, "--distillation_passes", 2, "--logging_steps", 1]
ERPD_QUICK += ["--per_device_train_batch_size", 64]


def test_erpd_math_embedded(tmp_path, cache):
    """Its closing table compares ERPD with GRPO on the same number of rollouts."""
    out = run("examples/erpd_math.py", tmp_path, cache, *ERPD_QUICK, "--num_held_out", 32, "--grpo_phases", 1, 2)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [
        "base policy",
        "ERPD, extreme region policy (mse)",
        "ERPD, distilled policy",
        "GRPO, 1 sampling phase",
        "GRPO, 2 sampling phases",
    ]
    accuracy, kl, rollouts, phases = ([row[i] for row in rows[1:]] for i in (1, 3, 4, 5))
    assert all(0 <= float(value) <= 1 for value in accuracy)
    assert (kl[0], rollouts, phases) == ("0.000", ["0"] + ["256"] * 4, ["0", "1", "1", "1", "2"])
    assert rows[3][6] == "24"  # updates: 256 rollouts, 64 per update, 2 passes for each of 3 policies
    boundaries = [line for line in out.splitlines() if line.startswith("Round 1, ")]
    assert len(boundaries) == 4
    assert (tmp_path / "erpd_math_output" / "stages.png").stat().st_size > 10_000
    assert (tmp_path / "erpd_math_output" / "model.safetensors").exists()


def test_erpd_math_trains_from_its_own_rollouts_to_the_same_policy(tmp_path, cache):
    flags = [*ERPD_QUICK, "--num_held_out", 8, "--grpo_phases", 0]
    run("examples/erpd_math.py", tmp_path, cache, *flags, "--write_rollouts", "rollouts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 16 * 16  # the held-out prompts are not among them
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    run("examples/erpd_math.py", tmp_path, cache, *flags, "--rollouts", "rollouts.jsonl", "--output_dir", "stored")
    sampled, stored = (load_file(tmp_path / out / "model.safetensors") for out in ("erpd_math_output", "stored"))
    assert all(torch.equal(sampled[name], value) for name, value in stored.items())


def test_erpd_math_takes_flags_before_its_defaults(tmp_path, cache):
    flags = [*ERPD_QUICK, "--extraction_loss", "mse", "ce", "--signal", "unlearned_reference", "--rounds", 2]
    flags += ["--output_dir", "elsewhere", "--num_held_out", 0, "--save_steps", 10]
    out = run("examples/erpd_math.py", tmp_path, cache, *flags)
    assert "| 2     | unlearned policy (ce)" in out
    assert "80 updates" in out  # 2 rounds, 4 policies of 2 passes in stage 1, 4 updates a pass
    resumed = run(
        "examples/erpd_math.py", tmp_path, cache, *flags, "--resume_from_checkpoint", "elsewhere/checkpoint-30"
    )
    assert [line for line in resumed.splitlines() if line.startswith("| ")] == [
        line for line in out.splitlines() if line.startswith("| ")
    ]


def test_the_divergence_of_a_policy_from_itself_is_zero_and_of_another_is_not(cache):
    base, other = (AutoModelForCausalLM.from_pretrained(tiny.save_policy(cache / f"p{i}", seed=i)) for i in (0, 1))
    tokenizer = AutoTokenizer.from_pretrained(cache / "p0", padding_side="left")
    problems = split_problems().held_out[:8]
    assert compare_with_base(base, base, tokenizer, problems, num_samples=1)[2] == 0
    assert compare_with_base(other, base, tokenizer, problems, num_samples=1)[2] > 0.1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_erpd_math_with_a_model_and_problems_of_ones_own(tmp_path, cache, lora):
    problems = tmp_path / "problems.jsonl"  # that a random policy solves now and then
    problems.write_text("\n".join(json.dumps({"question": f"{i}+1", "answer": f"#### {i % 9}"}) for i in range(24)))
    path = tiny.save_policy(tmp_path / "policy")
    (tmp_path / "settings.yaml").write_text("extraction_passes: 1\ndistillation_passes: 1\nbf16: false\n")
    flags = ["--model_name_or_path", path, "--dataset_name", problems, "--config", "settings.yaml"]
    flags += ["--max_completion_length", 8, "--num_held_out", 4, "--output_dir", "out", "--report_to", "none"]
    out = run("examples/erpd_math.py", tmp_path, cache, *flags, *(["--use_peft", "--lora_r", 2] if lora else []))
    assert "distilled policy" in out
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


def test_a_run_without_information_says_so_in_place_of_an_empty_table():
    assert "every round was skipped" in policies_table([{"fixed_set/skipped": 1.0, "round": 1, "stage": 1}])
    assert "every round was skipped" not in policies_table([])


def test_erpd_math_on_two_processes(tmp_path, cache):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*ERPD_QUICK, "--num_held_out", 31, "--use_cpu", "--grpo_phases", 1]
    out = run("examples/erpd_math.py", tmp_path, cache, *flags, launch=launch)
    assert out.count("| ERPD, distilled policy") == out.count("| GRPO, 1 sampling phase") == 1
