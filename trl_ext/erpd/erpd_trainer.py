"""Extreme Region Policy Distillation."""

import copy
import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from trl import GRPOConfig

from trl_ext.arguments import changed_settings, in_code
from trl_ext.erpd.checks import (
    check_data,
    check_erpd_args,
    resolve_prompts_per_round,
    stored_rollouts_per_round,
    unused_settings,
)
from trl_ext.erpd.erpd_config import ERPDConfig
from trl_ext.erpd.extraction import EXTRACTION_LOSSES, Rollouts
from trl_ext.erpd.growing_set import has_rollouts
from trl_ext.erpd.scaler import StepsWithoutGradients
from trl_ext.erpd.schedule import LogWherePhasesEnd, Phase, Schedule, as_list, phases_of
from trl_ext.erpd.stages import Stages
from trl_ext.erpd.stored_rollouts import has_stored_rollouts
from trl_ext.erpd.trainer_host import TrainerHost
from trl_ext.losses import TokenLoss
from trl_ext.policy_loss_trainer import PolicyLossTrainer
from trl_ext.trust_regions import trust_region_loss, trust_region_warnings


logger = get_logger(__name__)

CORRECT, INCORRECT = "extraction/implicit_reward_correct", "extraction/implicit_reward_incorrect"
REVERSED = {CORRECT: INCORRECT, INCORRECT: CORRECT}


class ERPDTrainer(PolicyLossTrainer):
    r"""
    Trainer for Extreme Region Policy Distillation ([2605.25582](https://huggingface.co/papers/2605.25582)): rollouts
    are sampled once and used for many off-policy updates, and what the updated policy has learned is distilled into
    the policy that sampled them.

    A round has two stages. **Stage 1** trains \\( \pi_0 \\) for many passes over a fixed set of its own rollouts,
    almost unconstrained: the over-optimized result \\( \pi_E \\) is only a teacher. It scores the set once, and
    \\( \pi_0 \\) is restored. **Stage 2** distils the token-level signal, in the simplest case

    $$ s_t = \log \pi_E(y_t) - \log \pi_0(y_t), $$

    normalized over the set, plus half of GRPO's outcome advantage, as a per-token advantage within a trust region:

    $$ L = -\min\left( r_t s_t,\;
    \mathrm{clip}(r_t, 1 - \epsilon_\mathrm{low}, 1 + \epsilon_\mathrm{high})\, s_t \right)
    + \beta\, \mathrm{KL}(\pi \| \pi_0), \qquad r_t = \pi_t / \pi^\mathrm{anchor}_t $$

    `train()` runs all rounds as one continuous run; at the end the model is the distilled policy. There is one model
    in memory, and a stage needs neither generation nor a teacher's forward pass. The two stages and the signals are
    the paper's; all formulas except SAPO's are our choice, see docs/erpd.md.

    Takes the arguments of [`~trl.GRPOTrainer`], in the same order; `args` may be a plain [`~trl.GRPOConfig`].
    The policies are measured on `eval_dataset` between the stages.

    A `train_dataset` with the columns `completion` and `reward` (or `completions` and `rewards`) beside `prompt`, and
    optionally the sampler's `logprobs`, holds the rollouts: nothing is sampled, and `reward_funcs` may be left out.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_ext import ERPDConfig, ERPDTrainer

    >>> trainer = ERPDTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=ERPDConfig(num_generations=16, per_device_train_batch_size=16, rounds=3),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = ERPDConfig
    anchored_to_sampler = True
    needs_old_logps = False  # the set is scored in its own batches

    _tag_names = ["trl", "trl_ext", "erpd"]  # noqa: RUF012 - TRL's own form
    _name = "ERPD"
    _paper = {  # noqa: RUF012
        "title": "Extreme Region Policy Distillation",
        "id": "2605.25582",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{erpd2026,
                title  = {{Extreme Region Policy Distillation}},
                year   = 2026,
                eprint = {arXiv:2605.25582},
            }"""),
    }

    log_completions: bool
    lr_scheduler: Any
    _created_lr_scheduler: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(PolicyLossTrainer.__init__).bind(self, *args, **kwargs).arguments
        del given["self"]
        self._given = dict(given)
        if has_stored_rollouts(given.get("train_dataset")) and given.get("reward_funcs") is None:
            given["reward_funcs"] = stored_reward
        self._user_args: GRPOConfig | None = None
        self._samples_to_log = False  # whether completions were sampled since they were logged
        try:
            super().__init__(**given)
        finally:
            if self._user_args is not None:
                self._user_args.beta = self._distillation_beta
        del self._given
        self._distillation_args = copy.copy(self.args)
        if self.args.distillation_epsilon is not None:
            self._distillation_args.epsilon = self.args.distillation_epsilon
        if self.args.epsilon_high is None:
            self._distillation_args.epsilon_high = self.args.distillation_epsilon_high
        update = self.args.per_device_train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        # A rate of the user's own optimizer takes the place of the setting, as in every trainer of transformers
        optimizer = given.get("optimizers", (None, None))[0]
        self._peak = self.args.learning_rate if optimizer is None else optimizer.param_groups[0]["lr"]
        self._schedule = Schedule(phases_of(self.args, self._peak), self._rollouts_per_round // update)
        self._host = TrainerHost(self, self._prompts_per_round)
        if self.args.log_completions and self._prompts_per_round:
            self._host.log_whole_rounds(self._rollouts_per_round)
        self._stages = Stages(self._host, self._schedule)
        self._without_gradients = StepsWithoutGradients(self.accelerator)
        self.add_callback(LogWherePhasesEnd(self._schedule))
        self.add_callback(self._without_gradients)

    # ---- settings

    @classmethod
    def check_args(cls, args: GRPOConfig) -> None:
        check_erpd_args(args, cls.__name__)

    @staticmethod
    def rewarded_dataset(train_dataset: Any, eval_dataset: Any) -> tuple[Any, str]:
        if has_stored_rollouts(train_dataset):  # with their rewards
            return eval_dataset, "eval_dataset"
        return PolicyLossTrainer.rewarded_dataset(train_dataset, eval_dataset)

    def before_loading(self, model: Any, args: GRPOConfig, processing_class: Any) -> None:
        check_data(self._given, args, type(self).__name__)
        dataset = self._given["train_dataset"]
        if has_stored_rollouts(dataset):
            self._prompts_per_round = 0
            self._rollouts_per_round = stored_rollouts_per_round(args, dataset)
        else:
            self._prompts_per_round = resolve_prompts_per_round(args, len(dataset))
            self._rollouts_per_round = self._prompts_per_round * args.num_generations
        # The reference of the KL term is the base policy, which has scored the set: TRL must not load another
        self._user_args, self._distillation_beta, args.beta = args, args.beta, 0.0

    def warn_about_args(self) -> None:
        if self.eval_dataset is None:
            logger.warning(
                "Without eval_dataset the policies are measured on the set that they are trained on, where a ruined "
                "teacher may go unnoticed: pass held-out prompts as eval_dataset."
            )
            if has_stored_rollouts(self.train_dataset) and self._given.get("reward_funcs") is not None:
                logger.warning(
                    "reward_funcs are not called, because train_dataset holds rollouts with their rewards: remove "
                    "these columns from it to sample new rollouts."
                )
        for warning in trust_region_warnings(self.args):
            logger.warning(warning)
        if any(EXTRACTION_LOSSES[loss].against_sampler for loss in as_list(self.args.extraction_loss)):
            self.warn_of_biased_ratio()
        self.warn_of_unused_correction()
        for names, reason in unused_settings(self.args):
            changed = {name: x for name, x in changed_settings(self.args, names).items() if x is not None}
            if changed:
                logger.warning(f"{in_code(changed)} has no effect{reason}.")
        update = self.args.generation_batch_size // self.args.steps_per_generation
        update *= self.args.gradient_accumulation_steps
        if self.args.distillation_anchor == "pass" and self._rollouts_per_round == update:
            logger.warning(
                "The whole set is one update, so that stage 2 never leaves its anchor and the trust region has no "
                "effect: set distillation_anchor='base', or raise prompts_per_round."
            )

    # ---- one continuous run: an epoch is a pass over the set

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            self._stages.resume_from = str(self.args.output_dir)
        elif resume_from_checkpoint:
            self._stages.resume_from = str(Path(resume_from_checkpoint).parent)
        else:
            self._stages.resume_from = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, wanted: Any) -> Any:
        try:
            return super()._whole_checkpoint(wanted)
        except ValueError:
            if wanted is not True or not has_rollouts(str(self.args.output_dir), self.accelerator):
                raise
            return None  # from the start, with the rollouts that the run had sampled

    def _required_files(self) -> list[str]:
        return ["fixed_set_0.safetensors", self._stages.base.file_name(0)]

    def get_train_dataloader(self) -> Any:
        # Indices into the set alone, because its content is not known before the first step
        places: Any = range(self._rollouts_per_round)
        return self._get_dataloader(
            places, "Training", self._train_batch_size, sampler_fn=SequentialSampler, is_training=True
        )

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        args = copy.copy(args)
        args.num_train_epochs = len(self._schedule.passes)
        return super().set_initial_training_values(args, dataloader)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        if self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise ValueError(
                "The learning rate restarts with each stage, which DeepSpeed's own does not do: remove `optimizer` "
                "and `scheduler` from DeepSpeed's config, and set optim, lr_scheduler_type and "
                "extraction_lr_scheduler_type."
            )
        if self.lr_scheduler is None:
            factor = self._schedule.learning_rate(self._peak, self.args.lr_scheduler_kwargs)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        model.train()
        if not self._stages.begin(self.state.global_step, self._index_of(inputs)):
            # Without gradients no optimizer moves anything, not even by weight decay
            self._without_gradients.begin(self.optimizer)
            return torch.zeros((), device=self.accelerator.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def training_inputs(self, inputs: Any) -> dict[str, Any]:
        return self._stages.micro_batch(self.state.global_step, self._index_of(inputs))

    def _index_of(self, places: Any) -> int:
        """The number of a micro-batch within its pass over the set."""
        return places[0] // (self._train_batch_size * self.accelerator.num_processes)

    def _finalize_training(self, *args: Any) -> Any:
        if self.state.global_step >= self._schedule.steps:
            self._stages.end_phase(self._schedule.phases[-1])
        else:
            phase = self._schedule.at_step(self.state.global_step)
            logger.warning(
                f"The run has ended in round {phase.round}, stage {phase.stage}, after {self.state.global_step} of "
                f"{self._schedule.steps} updates, and the model is the {phase.policy} policy at that point: resume "
                "from a checkpoint to complete it."
            )
        return super()._finalize_training(*args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        phase = self._schedule.at_step(max(self.state.global_step - 1, 0))
        for name, value in (("round", phase.round), ("stage", phase.stage)):
            logs.setdefault(name, value)
        asked = self.log_completions
        self.log_completions = asked and self._samples_to_log  # or TRL would log the last ones again and again
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions, self._samples_to_log = asked, False

    # ---- rollouts

    def finish_rollouts(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        self._samples_to_log = True
        return batch

    # ---- the loss

    def policy_loss(
        self,
        per_token_logps: torch.Tensor,
        behaviour_logps: torch.Tensor | None,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        inputs: dict[str, Any],
    ) -> TokenLoss:
        if not self.model.training:  # on rollouts of its own, which have no signal: GRPO's loss
            behaviour_logps = per_token_logps.detach() if behaviour_logps is None else behaviour_logps
            tensors = (per_token_logps, behaviour_logps, advantages, mask)
            return TokenLoss(trust_region_loss(self.args, *tensors, region="ppo_clip").loss)
        assert behaviour_logps is not None  # the set has them
        phase, base_logps = self._phase, inputs["base_logps"]
        if phase.stage == 2:
            advantages = inputs["signal"] + self.args.outcome_advantage_weight * advantages
            token_loss = trust_region_loss(self._distillation_args, per_token_logps, behaviour_logps, advantages, mask)
        else:
            rollouts = Rollouts(
                per_token_logps, base_logps, behaviour_logps, advantages.squeeze(1), inputs["outcomes"], mask
            )
            unlearned = phase.policy == "unlearned"
            token_loss = EXTRACTION_LOSSES[phase.loss].loss(rollouts.reversed() if unlearned else rollouts, self.args)
            if unlearned:  # what it takes for correct are the incorrect ones
                token_loss.metrics = {REVERSED.get(name, name): m for name, m in token_loss.metrics.items()}
        token_loss.metrics["kl_from_base"] = base_logps - per_token_logps.detach()
        return token_loss

    def kl_behaviour_logps(self, behaviour_logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        # In stage 2 the tokens are the base policy's, whatever the anchor is
        in_stage_2 = self.model.training and self._phase.stage == 2
        return inputs["base_logps"] if in_stage_2 else behaviour_logps

    @property
    def _phase(self) -> Phase:
        return self._schedule.at_step(self.state.global_step)

    def loss_settings(self) -> dict[str, Any]:
        """GRPO's settings of the update: their own values in stage 2, off in stage 1."""
        if not self.model.training:
            return {}
        if self._phase.stage == 2:
            return {"beta": self._distillation_beta}
        settings: dict[str, Any] = {"top_entropy_quantile": 1.0, "_entropy_bonus_enabled": False}
        if EXTRACTION_LOSSES[self._phase.loss].of_sequences:
            settings["loss_type"] = "luspo"  # the mean over sequences of the sum over their tokens
        return settings

    # ---- checkpoints

    def _save_rollouts(self, output_dir: str) -> None:
        self._stages.save(output_dir)

    def _load_rollouts(self, checkpoint: str) -> None:
        self._stages.load(checkpoint)


def stored_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Stands in for the reward functions that stored rollouts do not need, because TRL requires one."""
    raise RuntimeError("The rewards are stored in train_dataset: pass reward_funcs to sample completions.")


# For help() and editors: the constructor takes the arguments of its parent
ERPDTrainer.__init__.__signature__ = inspect.signature(PolicyLossTrainer.__init__)  # type: ignore[attr-defined]
