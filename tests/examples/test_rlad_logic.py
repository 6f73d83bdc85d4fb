"""examples/rlad_logic.py, shortened, with its real loading code."""

import re

import tiny


def test_rlad_logic_embedded(tmp_path, run, brief_lessons):
    flags = ["--max_steps", 4, "--num_held_out", 32, "--logging_steps", 1]
    out = run("examples/rlad_logic.py", *flags)
    for method in ("GRPO", "KDRL", "RLAD"):
        assert re.search(
            rf"{method} \| held-out reward \| [01]\.\d+ *\| [01]\.\d+ *\| 4 ", out
        )  # before, after, updates
        assert (tmp_path / "rlad_logic_output" / method.lower() / "model.safetensors").exists()
    assert (tmp_path / "rlad_logic_output" / "curves.png").stat().st_size > 10_000


def test_rlad_logic_with_models_of_ones_own(tmp_path, run):
    student, teacher = tiny.save_policy(tmp_path / "student"), tiny.save_policy(tmp_path / "teacher", seed=1)
    flags = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--max_completion_length", 8]
    flags += ["--num_people", 2, 3, "--num_train", 32, "--num_held_out", 8, "--max_steps", 2, "--bf16", "False"]
    flags += ["--output_dir", "out", "--report_to", "none", "--logging_steps", 1, "--use_peft"]
    out = run("examples/rlad_logic.py", *flags)
    assert "| held-out reward |" in out
    assert "vetoed" in out
    assert (tmp_path / "out" / "rlad" / "adapter_model.safetensors").exists()
