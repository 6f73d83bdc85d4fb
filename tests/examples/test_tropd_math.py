"""examples/tropd_math.py, shortened, with its real loading code."""

import pytest
import tiny


def test_tropd_math_embedded(tmp_path, run, brief_lessons):
    flags = ["--method", "tropd", "gkd", "--max_steps", 4, "--num_held_out", 16, "--logging_steps", 2]
    out = run("examples/tropd_math.py", *flags, "--per_device_train_batch_size", 8)
    for method in ("tropd", "gkd"):
        assert f"| {method:<5} | KL to the teacher, nats per token |" in out
        assert (tmp_path / "tropd_math_output" / method / "model.safetensors").exists()
    assert (tmp_path / "tropd_math_output" / "curves.png").stat().st_size > 10_000


def test_tropd_math_with_models_and_problems_of_ones_own(tmp_path, run, own_problems):
    student, teacher = tiny.save_policy(tmp_path / "student"), tiny.save_policy(tmp_path / "teacher", seed=1)
    flags = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--dataset_name", own_problems]
    flags += ["--max_steps", 2, "--max_new_tokens", 8, "--num_held_out", 4, "--output_dir", "out", "--bf16", "False"]
    flags += ["--logging_steps", 1, "--report_to", "none", "--use_peft", "--lora_r", 2, "--objective", "opd"]
    out = run("examples/tropd_math.py", *flags)
    assert "| opd | KL to the teacher, nats per token |" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_tropd_math_wants_both_a_model_and_a_dataset(run):
    with pytest.raises(ValueError, match="go together"):
        run("examples/tropd_math.py", "--dataset_name", "some")
