"""How ERPD's stages reach into TRL: the one file of ERPD, beside its trainer, that knows TRL's private methods."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import ProgressCallback

from trl_ext.erpd.fixed_set import RoundRollouts, collate
from trl_ext.erpd.host import Sampled
from trl_ext.erpd.schedule import teachers_of
from trl_ext.erpd.stored_rollouts import has_stored_rollouts, read_stored_rollouts


def completion_logs(size: int) -> dict[str, Any]:
    """TRL's buffers of `log_completions`, for this many completions."""
    kept: Callable[[], deque] = partial(deque, maxlen=size)
    columns = {name: kept() for name in ("images", "prompt", "completion", "advantages")}
    return {**columns, "rewards": defaultdict(kept), "extra": defaultdict(kept)}


class TrainerHost:
    """
    [`~trl_ext.erpd.host.Host`] for a [`~trl.GRPOTrainer`].

    Args:
        trainer ([`~trl_ext.PolicyLossTrainer`]):
            Once it is constructed.
        prompts_per_round (`int`):
            Number of prompts of a fixed set.
    """

    def __init__(self, trainer: Any, prompts_per_round: int) -> None:
        self.trainer = trainer
        self.prompts_per_round = prompts_per_round
        self.num_generations: int = trainer.num_generations
        self.uses_sampler_logps: bool = trainer._uses_sampler_logps
        self.collate = partial(
            collate, pad_token_id=trainer._tokenizer.pad_token_id, pad_to_multiple_of=trainer.pad_to_multiple_of
        )
        self.tokenizer = trainer._tokenizer
        self.end_tokens: list[int] = [*trainer.eos_token_ids, trainer._tokenizer.pad_token_id]

    # ---- data

    def prompts(self) -> Dataset:
        return self.trainer._remove_unused_columns(self.trainer.train_dataset, description="training")

    def prompt_order(self, seed: int) -> list[int]:
        length = len(self.trainer.train_dataset)
        if not self.trainer.shuffle_dataset:
            return list(range(length))
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()

    def tokenize(self, prompts: list[Any]) -> list[list[int]]:
        return self.trainer._tokenize_prompts(prompts)[0]

    def stored_rollouts(self) -> RoundRollouts | None:
        if not has_stored_rollouts(self.trainer.train_dataset):
            return None
        return read_stored_rollouts(self)

    # ---- rollouts and scores

    def sample(self, rows: list[dict[str, Any]]) -> Sampled:
        rollouts = self.trainer.roll_out(rows)
        return Sampled(rollouts, self.trainer.rewards, self.trainer.accelerator.process_index * len(rows))

    def score(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.trainer.score_micro_batch(batch)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        was_training = self.trainer.model.training
        of_the_set = self.trainer._logs, self.trainer._samples_to_log
        self.trainer.model.eval()
        if self.prompts_per_round:
            self.trainer._logs = completion_logs(self.trainer.args.generation_batch_size)
        try:
            with torch.no_grad():
                yield
        finally:
            self.trainer.model.train(was_training)
            self.trainer._metrics["eval"].clear()
            if self.prompts_per_round:  # with stored rollouts the held-out completions are all there is to log
                self.trainer._logs, self.trainer._samples_to_log = of_the_set

    # ---- the run

    def log_whole_rounds(self, rollouts: int) -> None:
        """Makes `log_completions` keep this many, and print no more of them than it does in GRPO."""
        self.trainer._logs = completion_logs(rollouts)
        self.trainer.num_completions_to_print = (
            self.trainer.num_completions_to_print or self.trainer.args.generation_batch_size
        )

    def describe(self, text: str) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(text)

    def weights_have_changed(self) -> None:
        self.trainer.weights_have_changed()

    def restart_learning_rate(self) -> None:
        # Updates that mixed precision has skipped make the schedule lag behind
        schedule, step = self.trainer.lr_scheduler, self.trainer.state.global_step
        if schedule.last_epoch != step:
            schedule.last_epoch = step - 1
            schedule.step()

    def identity(self) -> dict[str, Any]:
        names = ["seed", "extraction_passes", "distillation_passes", "extraction_skips_agreeing_prompts"]
        return {
            **self.trainer._run_identity(),
            "prompts_per_round": self.prompts_per_round,
            "teachers": [list(teacher) for teacher in teachers_of(self.trainer.args)],
            **{name: getattr(self.trainer.args, name) for name in names},
        }

    def progress(self) -> dict[str, Any]:
        metrics = {name: list(values) for name, values in self.trainer._metrics["train"].items()}
        return {"metrics": metrics, "tokens": self.trainer.state.num_input_tokens_seen}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        self.trainer._metrics["train"].clear()
        self.trainer._metrics["train"].update(progress["metrics"])
        self.trainer.state.num_input_tokens_seen = progress["tokens"]

    def save_random_state(self, folder: str) -> None:
        self.trainer._save_rng_state(folder)

    def load_random_state(self, folder: str) -> None:
        self.trainer._load_rng_state(folder)
