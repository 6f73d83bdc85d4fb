"""A run of TrOPD that is resumed is the run that was never stopped, to the bit."""

import pytest
import torch
from tropd_runs import assert_same, make_trainer, sums


RUNS = {
    "tropd": {},
    "groups": {"num_generations": 2},
    "guided by the teacher": {"guidance": "teacher", "num_generations": 2},
    "partly off-policy": {"lmbda": 0.5, "trust_region": "expected"},
}


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_exactly(tmp_path, overrides, stop):
    """12 rows are 1.5 steps an epoch, 3 in groups of two: each stop is in another place of an epoch."""

    def run(resume=None, **more):
        trainer = make_trainer(
            tmp_path,
            dataset=sums(12),
            save_strategy="steps",
            save_steps=1,
            max_steps=5,
            lr_scheduler_type="linear",
            **overrides,
            **more,
        )
        trainer.train(resume_from_checkpoint=resume)
        names = ("loss", "teacher/kl", "guidance/share", "entropy")
        logs = [{name: log.get(name) for name in names} for log in trainer.state.log_history]
        return {name: value.clone() for name, value in trainer.model.named_parameters()}, logs

    whole, logs = run()
    torch.manual_seed(99)
    resumed, resumed_logs = run(str(tmp_path / f"checkpoint-{stop}"))
    assert_same(whole, resumed, rtol=0, atol=0)
    assert logs[:-1] == resumed_logs[:-1]
