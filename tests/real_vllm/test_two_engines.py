"""Two processes with one engine each."""

import pytest
from accelerate.utils import gather_object
from engine_runs import COLOCATED, compare_with_model, generation_of, make_trainer


pytestmark = pytest.mark.processes(2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.supports(name, "vLLM colocated, two processes"))
        for name in ("drpo", "rlad", "tropd", "erpd")
    ],
)
def test_each_engine_samples_from_the_model_that_both_train(path, tmp_path, name):
    trainer = make_trainer(name, path, tmp_path, ddp_backend="gloo", **COLOCATED)
    differences = compare_with_model(trainer)
    completions = record_completions(trainer)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert len(differences) >= 2
    assert max(differences) < 1e-4
    first, second = gather_object([completions])
    assert first != second


def record_completions(trainer):
    """What this process's engine samples, filled while the trainer runs."""
    completions = []
    generation = generation_of(trainer)
    generate = generation.generate

    def recorded(*args, **kwargs):
        sampled = generate(*args, **kwargs)
        completions.extend([*map(int, ids)] for ids in sampled[1])
        return sampled

    generation.generate = recorded
    return completions
