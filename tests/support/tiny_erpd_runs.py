"""Whole runs of ERPDTrainer for the tests: of a few seconds, and watched."""

import pytest
import tiny
import torch
from tiny_erpd import parameters, right_or_wrong, settings

from trl_ext import ERPDConfig, ERPDTrainer
from trl_ext.erpd.stages import Stages


def make_run(path, tmp_path, reward=right_or_wrong, trainer_class=ERPDTrainer, eval_dataset=None, **overrides):
    names = ("peft_config", "rollout_func", "callbacks", "optimizers")
    arguments = {name: overrides.pop(name) for name in names if name in overrides}
    args = ERPDConfig(**settings(tmp_path, **overrides))
    torch.manual_seed(0)
    return trainer_class(path, reward, args, tiny.prompts(), eval_dataset, **arguments)


def with_key(trainer, key):
    return [log for log in trainer.state.log_history if key in log]


class Recorder(ERPDTrainer):
    """Remembers the weights and the optimizer at both sides of each boundary."""

    def train(self, *args, **kwargs):
        self.record = []
        begin, end = Stages._begin_phase, Stages.end_phase

        def begin_phase(stages, phase, new_round):
            begin(stages, phase, new_round)
            state = dict(self.optimizer.state)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            batches = [dict(batch) for batch in stages.fixed_set.batches]
            self.record.append(("begin", phase, parameters(self), state, batches, rates))

        def end_phase(stages, phase):
            batches = [dict(batch) for batch in stages.fixed_set.batches]
            self.record.append(("end", phase, parameters(self), dict(self.optimizer.state), batches, None))
            end(stages, phase)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stages, "_begin_phase", begin_phase)
            patch.setattr(Stages, "end_phase", end_phase)
            return super().train(*args, **kwargs)
