"""benchmarks/gpu_report.py runs small on the CPU: each of its trainers, its table, its page and its command."""

import importlib.util
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_report.py"


@pytest.fixture(scope="module")
def gpu_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.syspath_prepend(str(ROOT / "examples"))
        spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "drpo", "rlad", "erpd", "gkd", "distillation", "tropd"])
def test_every_trainer_is_measured(gpu_report, trainer):
    result = gpu_report.measure(gpu_report.Setting(trainer, "tiny", 16, vllm=False))
    assert 0 < result["seconds"] < 60
    assert 0 < result["memory"] < 20


def test_every_trainer_is_in_the_test_above(gpu_report):
    marks = test_every_trainer_is_measured.pytestmark
    assert set(marks[0].args[1]) == set(gpu_report.KINDS) == set(gpu_report.NAMES)


def test_the_shapes_are_those_of_qwen3(gpu_report):
    """Parameters without the embeddings: 0.44 and 1.41 billion, as the model cards say."""
    for size, expected in (("0.6B", 0.44e9), ("1.7B", 1.41e9)):
        width, inner, layers, heads = gpu_report.SIZES[size].values()
        query, kv = heads * gpu_report.SHAPE["head_dim"], gpu_report.SHAPE["num_key_value_heads"] * 128
        assert layers * width * (2 * query + 2 * kv + 3 * inner) == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_measured_is_a_word_in_the_table(gpu_report):
    results = {
        gpu_report.Setting("gkd", "1.7B", 8192, vllm=False): "out of memory",
        gpu_report.Setting("gkd", "1.7B", 8192, vllm=True): "no vLLM support",
        gpu_report.Setting("tropd", "1.7B", 8192, vllm=False): {"seconds": 1.5, "memory": 40.25},
    }
    assert gpu_report.table(results).splitlines()[2:] == [
        "| 1.7B | 8,192 | TRL GKD | out of memory |  | no vLLM support |  |",
        "| 1.7B | 8,192 | TrOPD | 1.50 | 40.2 | not run |  |",
    ]


def test_docs_say_what_was_run(gpu_report):
    written = (ROOT / "docs" / "gpu.md").read_text()
    assert written == gpu_report.page({}, "") or "Measured on NVIDIA" in written


@pytest.mark.slow
def test_the_command_writes_its_page(tmp_path, run_script):
    """It measures each setting in a process of its own."""
    flags = ["--sizes", "tiny", "--lengths", 16, "--trainers", "drpo", "--skip_tests"]
    run_script("benchmarks/gpu_report.py", *flags, "--output", tmp_path / "gpu.md")
    line = next(line for line in (tmp_path / "gpu.md").read_text().splitlines() if "DRPO" in line)
    assert float(line.split("|")[4]) > 0


def test_without_a_gpu_the_real_sizes_are_refused_at_once(gpu_report, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "pass --sizes tiny" in capsys.readouterr().err
