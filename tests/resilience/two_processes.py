"""
Run by two processes: the second is slow to write its part of a checkpoint, and the run then resumes past two
checkpoints that are not whole. Each process exits with an error where something is not as it should be.
"""

import os
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch
from resumable import drpo, weights


path, out = sys.argv[1], Path(sys.argv[2])
trainer = drpo(path, out)
process, wait = trainer.accelerator.process_index, trainer.accelerator.wait_for_everyone


class Slow(type(trainer)):
    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if process == 1:
            time.sleep(0.3)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if process == 0:  # trainer_state.json is there by now, and so must everything else be
            folder = out / f"checkpoint-{self.state.global_step}"
            assert (folder / "trainer_state.json").exists()
            assert (folder / "rng_state_1.pth").exists()


trainer.__class__ = Slow
trainer.train()
expected = weights(trainer)
wait()
if process == 0:
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    cut_short = out / "checkpoint-5" / "rollouts_1.safetensors"
    cut_short.write_bytes(cut_short.read_bytes()[:-10])
wait()
resumed = drpo(path, out)
resumed.train(resume_from_checkpoint=True)
for name, value in weights(resumed).items():
    assert torch.equal(value, expected[name]), name
with pytest.raises(ValueError, match="there is no such folder"):  # on both, so that neither waits for the other
    resumed.train(resume_from_checkpoint=str(out / "no-such-folder"))
print(f"process {process} ended well")
