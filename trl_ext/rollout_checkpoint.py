"""Keeps the rollouts that are still to be trained on, so that a run resumes exactly between two generations."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import has_length

from trl_ext.arguments import VLLM_CORRECTION_SETTINGS
from trl_ext.whole_checkpoint import WholeCheckpoints


logger = get_logger(__name__)

Batches = list[dict[str, Any]]  # one dictionary per micro-batch: tensors, lists of numbers, None


class RolloutCheckpoints(WholeCheckpoints):
    """
    A [`~trl.GRPOTrainer`] that resumes exactly at any step.

    When TRL itself resumes, it samples new rollouts, and its schedule of generations and the shuffling of its sampler
    start over. So our checkpoints contain the rollouts that are still in use, and the sampler is fast-forwarded.
    """

    _buffered_inputs: list[dict[str, Any]] | None
    _step: int
    num_iterations: int
    beta: float
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    _uses_sampler_logps: bool

    @property
    def corrects_sampler(self) -> bool:
        """Whether TRL weights the loss by the old policy's ratio to vLLM's."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._save_rollouts(output_dir)

    def _save_rollouts(self, output_dir: str) -> None:
        process = self.accelerator.process_index
        if self._buffered_inputs is not None and self._step % self._generate_every != 0:
            save_rollouts(output_dir, self._buffered_inputs, self._step, self._run_identity(), process)
        else:
            remove_rollouts(output_dir, process)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(checkpoint)
            if not has_length(self.train_dataset) and (self.state.epoch or 0) >= 1:
                logger.warning(
                    "The run does not resume exactly, because transformers begins another pass over an iterable "
                    "train_dataset whose length it does not know: pass a Dataset to resume exactly after the first "
                    "pass."
                )

    def _load_rollouts(self, checkpoint: str) -> None:
        device = self.accelerator.device
        rollouts = load_rollouts(checkpoint, self._run_identity(), self.accelerator.process_index, device)
        loaded = self.accelerator.gather(torch.tensor([rollouts is not None], device=device))
        # All processes must agree, because generation takes part on all of them
        fresh: tuple[Any, int] = (None, 0)
        self._buffered_inputs, self._step = rollouts if rollouts is not None and loaded.all() else fresh
        sampler = getattr(self, "_train_sampler", None)
        if sampler is not None and sampler.shuffle:
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def _run_identity(self) -> dict[str, Any]:
        """What the rollouts in a checkpoint depend on."""
        names = ["per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"]
        names += ["num_iterations", "num_generations", "max_completion_length", "mask_truncated_completions"]
        names += ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]
        names += ["reward_weights", "scale_rewards", "multi_objective_aggregation"]
        return {
            "num_processes": self.accelerator.num_processes,
            "reference": self.beta != 0.0,
            # Whether the batches have TRL's correction of the sampler, and the old log-probabilities that it needs
            "corrected": self.corrects_sampler,
            "correction": [getattr(self.args, name) for name in VLLM_CORRECTION_SETTINGS],
            "generation_kwargs": str(self.args.generation_kwargs),
            "sampler_logps": self._uses_sampler_logps,
            "global_step": self.state.global_step,
            **{name: getattr(self.args, name) for name in names},
        }


def save_rollouts(folder: str, batches: Batches, step: int, run: dict[str, Any], process_index: int) -> None:
    """
    Writes one process's rollouts to `folder/rollouts_{process_index}.safetensors`.

    Args:
        step (`int`):
            Number of micro-batches that the run has consumed: its position in `batches`.
        run (`dict[str, Any]`):
            What a run must have in common with this one to continue with these rollouts.
    """
    try:
        write_batches(_path(folder, process_index), batches, {"step": str(step), "run": json.dumps(run)})
    except TypeError as error:
        logger.warning(
            "This checkpoint does not contain the rollouts in use, and a run does not resume from it exactly, because "
            f"a batch holds something that is neither a tensor nor plain data ({error}): make it a tensor."
        )


def load_rollouts(
    folder: str, run: dict[str, Any], process_index: int, device: torch.device
) -> tuple[Batches, int] | None:
    """What `save_rollouts` wrote: the batches and the step. `None` where there is nothing that fits this `run`."""
    path = _path(folder, process_index)
    if not path.exists():
        return None
    theirs, run = json.loads(read_metadata(path)["run"]), json.loads(json.dumps(run))  # both as JSON has them
    if theirs != run:
        changes = ", ".join(f"{k} {theirs.get(k)} -> {run.get(k)}" for k in run if theirs.get(k) != run.get(k))
        logger.warning(
            f"The checkpoint's rollouts do not fit this run ({changes}), so that new ones are sampled: it resumes, "
            "but not exactly. To resume exactly, restore these settings."
        )
        return None
    return read_batches(path, device), int(read_metadata(path)["step"])


def remove_rollouts(folder: str, process_index: int) -> None:
    """Removes what an earlier run left in a folder that is used again."""
    _path(folder, process_index).unlink(missing_ok=True)


def _path(folder: str, process_index: int) -> Path:
    return Path(folder) / f"rollouts_{process_index}.safetensors"


def write_batches(path: Path, batches: Batches, metadata: dict[str, str]) -> None:
    """Writes batches of tensors and plain data, and `metadata`, as safetensors."""
    tensors, others = {}, []
    for i, batch in enumerate(batches):
        others.append({name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)})
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{i}/{name}"] = value.contiguous().clone()  # slices of one rollout batch share its memory
    metadata = {**metadata, "others": json.dumps(others)}
    path.parent.mkdir(parents=True, exist_ok=True)  # the main process may not have made it yet
    save_file(tensors, path, metadata=metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that `write_batches` was given."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def read_batches(path: Path, device: torch.device) -> Batches:
    """The batches that `write_batches` was given."""
    with safe_open(path, framework="pt") as file:
        batches: Batches = json.loads(file.metadata()["others"])
        for key in file.keys():  # noqa: SIM118 - not a mapping
            index, name = key.split("/", 1)
            batches[int(index)][name] = file.get_tensor(key).to(device)
    return batches
