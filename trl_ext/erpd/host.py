"""What the stages of ERPD need of the trainer that they run in."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from trl_ext.erpd.fixed_set import RoundRollouts


class Sampled(NamedTuple):
    """One generation batch as TRL makes it."""

    rollouts: dict[str, Any]  # this process's, padded
    rewards: torch.Tensor  # of all processes, of shape (rollouts,), NaN where no reward function gave one
    first: int  # the place of this process's first rollout among them

    @property
    def own_rewards(self) -> torch.Tensor:
        return self.rewards[self.first : self.first + len(self.rollouts["completion_ids"])]


class Host(Protocol):
    """
    The trainer as the stages see it: what transformers documents of a trainer is used through `trainer`, everything
    that is TRL's own through the methods below. [`~trl_ext.erpd.trainer_host.TrainerHost`] implements them.
    """

    trainer: Trainer
    prompts_per_round: int
    num_generations: int
    tokenizer: PreTrainedTokenizerBase
    end_tokens: list[int]  # a completion that ends with none of them was truncated
    uses_sampler_logps: bool  # whether the ratio of stage 1 is against the sampler's log-probabilities

    def prompts(self) -> Dataset:
        """The training data as the reward functions see it."""
        ...

    def prompt_order(self, seed: int) -> list[int]:
        """The order in which the prompts of the training data are sampled."""
        ...

    def tokenize(self, prompts: list[Any]) -> list[list[int]]:
        """Prompts, text or messages, as the tokens that the policy completes."""
        ...

    def sample(self, rows: list[dict[str, Any]]) -> Sampled:
        """Completions of this process's `rows`, with their rewards."""
        ...

    def stored_rollouts(self) -> RoundRollouts | None:
        """The rollouts in the training data, if there are any, instead of sampled ones."""
        ...

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rollouts of different lengths as one padded micro-batch."""
        ...

    def score(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (nats) of a micro-batch's completions, of shape `(batch, time)`."""
        ...

    def measuring(self) -> AbstractContextManager[None]:
        """Evaluation mode, without gradients, and without a trace in the metrics of the training."""
        ...

    def describe(self, text: str) -> None:
        """Writes `text` beside the progress bar."""
        ...

    def weights_have_changed(self) -> None:
        """Must be called when the weights were replaced, or the engine would sample from the old ones."""
        ...

    def restart_learning_rate(self) -> None:
        """Moves the learning rate schedule to the current step."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the fixed set of a checkpoint, and the place in its round, depend on."""
        ...

    def progress(self) -> dict[str, Any]:
        """What TRL has collected for its next log, as plain data."""
        ...

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Puts back what `progress` returned."""
        ...

    def save_random_state(self, folder: str) -> None:
        """Writes the state of all random number generators of this process."""
        ...

    def load_random_state(self, folder: str) -> None:
        """Reads what `save_random_state` wrote."""
        ...
