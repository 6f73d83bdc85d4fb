"""Two processes that share one engine (`vllm_tensor_parallel_size=2`), or have one each."""

import engine
import pytest
from engine_runs import COLOCATED, compare_with_model, make_trainer


# docs/support.md names those that were seen to pass
SEEN = ("drpo", "tropd", "erpd")
TRAINERS = (*SEEN, "rlad")


@pytest.mark.processes(2)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.supports(n, "vLLM colocated, tensor parallel 2")) for n in SEEN] + ["rlad"],
)
def test_the_ranks_of_an_engine_draw_alike(tmp_path, name):
    """Else each goes on from its own tokens, and what they compute together is of no sequence at all."""
    path = engine.save_policy(tmp_path / "policy")
    trainer = make_trainer(name, path, tmp_path, vllm_tensor_parallel_size=2, ddp_backend="gloo", **COLOCATED)
    differences = compare_with_model(trainer)
    trainer.train()
    assert len(differences) >= 2
    assert max(differences) < 1e-4


@pytest.mark.processes(2)
@pytest.mark.parametrize("name", TRAINERS)
def test_each_process_has_an_engine_of_its_own(tmp_path, name):
    path = engine.save_policy(tmp_path / "policy")
    trainer = make_trainer(name, path, tmp_path, ddp_backend="gloo", **COLOCATED)
    differences = compare_with_model(trainer)
    trainer.train()
    assert len(differences) >= 2
    assert max(differences) < 1e-4
