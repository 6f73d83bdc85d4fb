"""examples/drpo_math.py, shortened, with its real loading code."""

import re

import pytest
import tiny


TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_drpo_math_embedded(tmp_path, launch):
    out = launch("examples/drpo_math.py", "--max_steps", 16, "--num_held_out", 64)
    assert "| accuracy, sampled |" in out
    assert re.search(r"step 8/16: reward 0\.\d+, loss .*, entropy/start 1\.000, outside 0\.\d+", out)
    assert (tmp_path / "drpo_math_output" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "drpo_math_output" / "model.safetensors").exists()


def test_drpo_math_takes_flags_before_its_defaults(tmp_path, run):
    flags = ["--max_steps", 4, "--logging_steps", 2, "--num_iterations", 1, "--learning_rate", 1e-3]
    flags += ["--trust_region", "dppo_kl", "--output_dir", "elsewhere", "--num_held_out", 0]
    out = run("examples/drpo_math.py", *flags, "--save_steps", 2)
    assert "learning_rate=0.001, seed=42, trust_region=dppo_kl, trust_region_radius=0.05" in out
    assert (tmp_path / "elsewhere" / "checkpoint-2").is_dir()
    resumed = run("examples/drpo_math.py", *flags, "--resume_from_checkpoint", "True", "--max_steps", 6)
    assert "step 6/6:" in resumed
    assert "step 2/" not in resumed


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_drpo_math_with_a_model_and_problems_of_ones_own(tmp_path, run, own_problems, lora):
    path = tiny.save_policy(tmp_path / "policy")
    (tmp_path / "settings.yaml").write_text("max_steps: 2\nnum_iterations: 2\nbf16: false\nlogging_steps: 1\n")
    flags = ["--model_name_or_path", path, "--dataset_name", own_problems, "--config", "settings.yaml"]
    flags += ["--max_completion_length", 8, "--num_held_out", 4, "--output_dir", "out", "--report_to", "none"]
    out = run("examples/drpo_math.py", *flags, *(["--use_peft", "--lora_r", 2] if lora else []))
    assert "| held-out reward |" in out
    assert "step 1/2: reward" in out  # the second update reuses the rollouts of the first
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


def test_drpo_math_on_two_processes(launch):
    out = launch("examples/drpo_math.py", "--max_steps", 4, "--num_held_out", 7, "--use_cpu", launcher=TWO_PROCESSES)
    assert out.count("| accuracy, sampled |") == 1


def test_a_file_with_other_columns_is_one_clear_sentence(tmp_path, run):
    (tmp_path / "rows.jsonl").write_text('{"text": "1+1", "label": "2"}\n')
    path = tiny.save_policy(tmp_path / "policy")
    flags = ["--model_name_or_path", path, "--dataset_name", tmp_path / "rows.jsonl", "--bf16", "False"]
    with pytest.raises(ValueError, match="has the columns 'text', 'label', but it must have a 'prompt'"):
        run("examples/drpo_math.py", *flags)
