"""Two processes that share one engine: `vllm_tensor_parallel_size=2`."""

import pytest
from engine_runs import COLOCATED, compare_with_model, make_trainer


pytestmark = pytest.mark.processes(2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.supports(name, "vLLM colocated, tensor parallel 2"))
        for name in ("drpo", "rlad", "tropd", "erpd")
    ],
)
def test_the_ranks_of_an_engine_draw_the_same_tokens(path, tmp_path, name):
    """Otherwise each continues its own tokens, and their common forward pass is of no sequence that exists."""
    trainer = make_trainer(name, path, tmp_path, vllm_tensor_parallel_size=2, ddp_backend="gloo", **COLOCATED)
    differences = compare_with_model(trainer)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert len(differences) >= 2
    assert max(differences) < 1e-4
