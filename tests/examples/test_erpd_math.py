"""examples/erpd_math.py, shortened, with its real loading code."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.erpd_report import policies_table
from embedded.arithmetic import compare_with_base, split_problems


TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ERPD_QUICK = ["--prompts_per_round", 8, "--extraction_passes", 2, "--distillation_passes", 2, "--logging_steps", 1]
ERPD_QUICK += ["--num_generations", 16, "--per_device_train_batch_size", 64]


def test_erpd_math_embedded(tmp_path, launch):
    """Its closing table compares ERPD with GRPO on the same number of rollouts."""
    out = launch("examples/erpd_math.py", *ERPD_QUICK, "--num_held_out", 32, "--grpo_phases", 1, 2)
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
    assert (kl[0], rollouts, phases) == ("0.000", ["0"] + ["128"] * 4, ["0", "1", "1", "1", "2"])
    assert rows[3][6] == "12"  # updates: 128 rollouts, 64 per update, 2 passes for each of 3 policies
    boundaries = [line for line in out.splitlines() if line.startswith("Round 1, ")]
    assert len(boundaries) == 4
    assert (tmp_path / "erpd_math_output" / "stages.png").stat().st_size > 10_000
    assert (tmp_path / "erpd_math_output" / "model.safetensors").exists()


def test_erpd_math_trains_from_its_own_rollouts_to_the_same_policy(tmp_path, run):
    flags = [*ERPD_QUICK, "--num_held_out", 8, "--grpo_phases", 0]
    run("examples/erpd_math.py", *flags, "--write_rollouts", "rollouts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 16  # the held-out prompts are not among them
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    run("examples/erpd_math.py", *flags, "--rollouts", "rollouts.jsonl", "--output_dir", "stored")
    sampled, stored = (load_file(tmp_path / out / "model.safetensors") for out in ("erpd_math_output", "stored"))
    assert all(torch.equal(sampled[name], value) for name, value in stored.items())


def test_erpd_math_takes_flags_before_its_defaults(tmp_path, run):
    flags = [*ERPD_QUICK, "--extraction_loss", "mse", "ce", "--signal", "unlearned_reference", "--rounds", 2]
    flags += ["--output_dir", "elsewhere", "--num_held_out", 0, "--save_steps", 5]
    out = run("examples/erpd_math.py", *flags)
    assert "| 2     | unlearned policy (ce)" in out
    assert "40 updates" in out  # 2 rounds of 5 policies, 2 passes each, 2 updates per pass
    resumed = run("examples/erpd_math.py", *flags, "--resume_from_checkpoint", "elsewhere/checkpoint-15")
    assert [line for line in resumed.splitlines() if line.startswith("| ")] == [
        line for line in out.splitlines() if line.startswith("| ")
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_erpd_math_with_a_model_and_problems_of_ones_own(tmp_path, run, lora):
    problems = tmp_path / "problems.jsonl"  # that a random policy solves now and then
    problems.write_text("\n".join(json.dumps({"question": f"{i}+1", "answer": f"#### {i % 9}"}) for i in range(24)))
    path = tiny.save_policy(tmp_path / "policy")
    (tmp_path / "settings.yaml").write_text("extraction_passes: 1\ndistillation_passes: 1\nbf16: false\n")
    flags = ["--model_name_or_path", path, "--dataset_name", problems, "--config", "settings.yaml"]
    flags += ["--max_completion_length", 8, "--num_held_out", 4, "--output_dir", "out", "--report_to", "none"]
    out = run("examples/erpd_math.py", *flags, *(["--use_peft", "--lora_r", 2] if lora else []))
    assert "distilled policy" in out
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


def test_erpd_math_on_two_processes(launch):
    flags = [*ERPD_QUICK, "--per_device_train_batch_size", 32, "--extraction_passes", 1, "--distillation_passes", 1]
    flags += ["--num_held_out", 7, "--use_cpu", "--grpo_phases", 1]
    out = launch("examples/erpd_math.py", *flags, launcher=TWO_PROCESSES)
    assert out.count("| ERPD, distilled policy") == out.count("| GRPO, 1 sampling phase") == 1


def test_the_divergence_of_a_policy_from_itself_is_zero_and_of_another_is_not(tmp_path):
    base, other = (AutoModelForCausalLM.from_pretrained(tiny.save_policy(tmp_path / f"p{i}", seed=i)) for i in (0, 1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "p0", padding_side="left")
    problems = split_problems().held_out[:8]
    assert compare_with_base(base, base, tokenizer, problems, num_samples=1)[2] == 0
    assert compare_with_base(other, base, tokenizer, problems, num_samples=1)[2] > 0.1


def test_a_run_without_information_says_so_in_place_of_an_empty_table():
    assert "every round was skipped" in policies_table([{"fixed_set/skipped": 1.0, "round": 1, "stage": 1}])
    assert "every round was skipped" not in policies_table([])
