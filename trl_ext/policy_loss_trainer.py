"""
`GRPOTrainer` with its per-token policy loss as one method: the seam to TRL. Subclasses use the public methods here
instead of GRPO's private ones; `rollout_checkpoint.py` has what makes a run resume exactly.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext.adapters import check_fused_head, check_reference_adapter, check_vllm_adapters
from trl_ext.arguments import (
    VLLM_CORRECTION_SETTINGS,
    as_config,
    changed_settings,
    check_policy_loss_args,
    check_sharded_adapter,
    in_code,
    sampling_that_biases_the_ratio,
)
from trl_ext.constructor_checks import (
    check_model,
    check_processing_class,
    check_reward_signatures,
    check_rewards_and_tools,
    check_training_arguments,
    explain_reward_error,
)
from trl_ext.dataset_columns import check_prompt_column
from trl_ext.diagnostics import report_after_diagnostics
from trl_ext.losses import TokenLoss
from trl_ext.losses.token_loss import absolute_log_ratio, bounded_behaviour_logps
from trl_ext.metrics import TokenMetrics
from trl_ext.policy_loss_checks import check_sampler_logps, checked_token_loss, without_advice
from trl_ext.rollout_checkpoint import RolloutCheckpoints


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset

# What a rollout batch may hold for the forward pass besides tokens and masks
VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class PolicyLossTrainer(RolloutCheckpoints, GRPOTrainer):
    r"""
    [`~trl.GRPOTrainer`] with another per-token policy loss: a subclass writes `policy_loss`, and all the rest
    (generation, rewards, masks, KL, aggregation, entropy bonus, auxiliary loss, metrics) remains TRL's own code.

    How it works: TRL's surrogate is \\( -\min(\mathrm{clip}_1(r) A, \mathrm{clip}_2(r) A) \\), and TRL reads the
    advantages and the bounds of both clips only after it has computed the log-probabilities. With an upper bound of
    -1, both clips return the constant -1 without a gradient, because a ratio is always positive. The surrogate of
    "advantages" \\( \ell \\) is then exactly \\( \ell \\), in value and in gradient. So as soon as there are
    log-probabilities, the policy loss takes the place of the advantages. The ratio itself is left as it is, for its
    other use in TRL: the bias correction of the KL term.

    Takes the arguments of [`~trl.GRPOTrainer`], in the same order.
    """

    config_class: type[GRPOConfig] = GRPOConfig
    # Whether the ratio is against the sampler's log-probabilities, where the rollout has them, instead of the training
    # model's old ones. If so, these are not computed, and vLLM's importance sampling correction is off, because it
    # would correct the same mismatch a second time.
    anchored_to_sampler = False
    # Whether `old_per_token_logps` are needed where the rollout has no log-probabilities of the sampler
    needs_old_logps = True

    epsilon_low: float
    epsilon_high: float
    reward_weights: torch.Tensor
    _last_loaded_step: int

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ) -> None:
        name = type(self).__name__
        check_model(model, name)
        args = as_config(args, self.config_class, model, self._name)
        self.check_args(args)
        check_processing_class(processing_class)
        check_training_arguments(args, eval_dataset, callbacks, optimizers, peft_config)
        check_vllm_adapters(model, args)
        check_rewards_and_tools(args, reward_funcs, tools, rollout_func, environment_factory, name)
        if environment_factory is None:
            check_prompt_column(name, train_dataset, eval_dataset)
            if rollout_func is None:  # which may add what a reward function needs
                check_reward_signatures(reward_funcs, *self.rewarded_dataset(train_dataset, eval_dataset), args)
        self.before_loading(model, args, processing_class)
        check_reference_adapter(model, peft_config, args)
        self._loss_inputs: dict[str, Any] | None = None  # the batch, until its policy loss is computed
        self._loss_scope = ExitStack()
        self._skips_old_pass = False  # until the pass that scores the old policy
        self.rewards_per_function = torch.empty(0, 0)  # of the last rollout batch: (rollouts, functions)
        self._token_metrics = {"train": TokenMetrics(), "eval": TokenMetrics()}
        # TRL's advice for this aggregation is a sequence-level ratio, which a per-token loss cannot have
        with without_advice("trl.trainer.grpo_trainer", "When using `'luspo'` loss"):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        check_fused_head(self.model, "The policy")
        check_sharded_adapter(self, fused_head=True)
        # With vLLM's correction switched off, its log-probabilities are not used
        self._uses_sampler_logps = self.anchored_to_sampler and (
            not self.use_vllm or self.vllm_importance_sampling_correction
        )
        if self.anchored_to_sampler:
            self.vllm_importance_sampling_correction = False
        report_after_diagnostics(self.callback_handler)
        self.warn_about_args()

    @classmethod
    def check_args(cls, args: GRPOConfig) -> None:
        """Refuses, with a `ValueError`, the settings that cannot be honoured. Called before a model is loaded."""
        check_policy_loss_args(args, cls.__name__)

    @staticmethod
    def rewarded_dataset(train_dataset: Any, eval_dataset: Any) -> tuple[Any, str]:
        """The dataset for whose rows reward functions are called, and its name."""
        return train_dataset, "train_dataset"

    def before_loading(self, model: Any, args: GRPOConfig, processing_class: Any) -> None:
        """A hook for checks that need no loaded policy. Called after `args` have been checked."""

    def warn_about_args(self) -> None:
        """Warns once about settings that were changed but have no effect. Called at the end of `__init__`."""

    @property
    def sampled_elsewhere(self) -> bool:
        """Whether the ratio is against the log-probabilities of an engine other than the training model."""
        return self._uses_sampler_logps and (self.use_vllm or self.rollout_func is not None)

    def warn_of_unused_correction(self) -> None:
        """Warns about settings of TRL's correction of vLLM's log-probabilities where there is none."""
        unused = VLLM_CORRECTION_SETTINGS if self.use_vllm and not self.corrects_sampler else ()
        if changed := changed_settings(self.args, unused):
            reason = "with vllm_importance_sampling_correction=False: leave it out, or remove that."
            if self._uses_sampler_logps:
                reason = (
                    f"in {type(self).__name__}, whose ratio is against vLLM's own log-probabilities and needs no "
                    "correction: leave it out."
                )
            logger.warning(f"{in_code(changed)} has no effect {reason}")

    def warn_of_biased_ratio(self) -> None:
        """Warns about sampling settings that change that engine's log-probabilities but not the training model's."""
        elsewhere = self.sampled_elsewhere or self.corrects_sampler
        if elsewhere and (names := sampling_that_biases_the_ratio(self.args)):
            logger.warning(
                f"The sampler's log-probabilities depend on {', '.join(names)} and the training model's do not, which "
                "biases the ratio between them: sample with top_p=1.0, top_k=0, min_p=None and "
                "repetition_penalty=1.0, without further constraints, and set temperature outside of "
                "generation_kwargs."
            )

    def policy_loss(
        self,
        per_token_logps: torch.Tensor,
        behaviour_logps: torch.Tensor | None,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        inputs: dict[str, Any],
    ) -> TokenLoss | torch.Tensor:
        """
        The loss of each completion token, before TRL masks and averages it and adds the KL term.

        Returns a [`~trl_ext.losses.TokenLoss`], or its `loss` alone: a tensor of shape `(batch, time)`.

        Args:
            per_token_logps (`torch.Tensor` of shape `(batch, time)`):
                Log-probabilities (nats) under the current policy, differentiable.
            behaviour_logps (`torch.Tensor` of shape `(batch, time)` or `None`):
                Log-probabilities (nats) under the policy that the ratio is against, NaN where the sampler could not
                score. `None` where that is the current policy itself, so that the ratio is 1.
            advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
                Advantages.
            mask (`torch.Tensor` of shape `(batch, time)`):
                Non-zero for the tokens that the policy wrote.
            inputs (`dict[str, Any]`):
                The whole batch, with what `finish_rollouts` added to it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define policy_loss().")

    # ---- what else a subclass may change or use, each with GRPO's behaviour as its default

    def loss_settings(self) -> dict[str, Any]:
        """Attributes of the trainer, with the values that they have only while the loss is computed."""
        return {}

    def kl_behaviour_logps(self, behaviour_logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Log-probabilities (nats), of shape `(batch, time)`, under the policy that sampled the tokens, with which TRL
        weights its estimate of the KL divergence. By default those that the policy loss was given.
        """
        return behaviour_logps

    def training_inputs(self, inputs: Any) -> dict[str, Any]:
        """The micro-batch to train on. By default a part of the rollout batch that TRL has sampled."""
        return super()._prepare_inputs(inputs)

    def finish_rollouts(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Adds to a rollout batch what `policy_loss` needs: batch-first tensors, which TRL shuffles and splits with it.
        `rows` are the dataset's, one per completion.
        """
        return batch

    def tokenize_prompts(self, prompts: list[Any], first: int = 0) -> list[list[int]]:
        """
        Token ids of prompts, text or messages, as those of the dataset's `prompt` column are made: with the tools of
        the current rows' environments from row `first` on, where there are any.
        """
        environments = getattr(self, "_batch_environments", [])[first : first + len(prompts)]
        with self._replaced(_batch_environments=environments):
            return self._tokenize_prompts(prompts)[0]

    def roll_out(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """This process's completions of `rows`, scored and rewarded as TRL does it."""
        return self._generate_and_score_completions(rows)

    @property
    def rewards(self) -> torch.Tensor:
        """
        Of the last rollout batch, on all processes and of shape `(rollouts,)`: the weighted sum over the reward
        functions, NaN where none gave a reward.
        """
        per_function = self.rewards_per_function
        total = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        return total.masked_fill(per_function.isnan().all(1), torch.nan)

    def weights_have_changed(self) -> None:
        """Makes vLLM fetch the weights before it generates again, even within the same step."""
        self._last_loaded_step = -1

    @property
    def scoring_batch_size(self) -> int:
        """Number of sequences per process that are scored at a time while the model is in this mode."""
        mode = "train" if self.model.training else "eval"
        return getattr(self.args, f"per_device_{mode}_batch_size")

    def score_completions(self, model: Any, batch: dict[str, Any], batch_size: int | None = None) -> torch.Tensor:
        """
        Log-probabilities (nats) of a rollout batch's completions under any model with TRL's fused LM head, at the
        trainer's temperature and in micro-batches of `batch_size`, or `scoring_batch_size`: of shape `(batch, time)`.
        """
        return self._score(model, batch, batch_size=batch_size or self.scoring_batch_size)[0]

    def score_micro_batch(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a micro-batch's completions under the policy, and its entropies, both in nats."""
        logps, entropies, _ = self._score(self.model, batch, compute_entropy=True)
        return logps, entropies

    def _score(self, model: Any, batch: dict[str, Any], **settings: Any) -> tuple[Any, ...]:
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **{name: batch[name] for name in VISION_INPUTS if name in batch},
            **settings,
        )

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        with ExitStack() as self._loss_scope:  # restores what the loss changes, also when it is interrupted
            self._loss_scope.enter_context(self._replaced(**self.loss_settings()))
            self._loss_inputs = inputs = dict(inputs)  # a copy, because the rollout batch is used again
            self._loss_scope.callback(setattr, self, "_loss_inputs", None)
            loss = super()._compute_loss(model, inputs)
            if self._loss_inputs is not None:  # else GRPO's own loss would be trained on
                raise RuntimeError(
                    f"{type(self).__name__} replaces _get_per_token_logps_and_entropies, where the policy loss takes "
                    "effect: call super()._get_per_token_logps_and_entropies() in it, and change what that returns."
                )
        for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"):
            self._metrics[mode].pop(f"clip_ratio/{name}", None)  # of clips that are constant now
        if mode == "eval" or self.accelerator.sync_gradients:
            self._token_metrics[mode].reduce(self.accelerator)
        return loss

    @contextmanager
    def _replaced(self, **values: Any) -> Iterator[None]:
        """Sets attributes of the trainer, and restores them afterwards."""
        before = {name: self.__dict__[name] for name in values if name in self.__dict__}
        self.__dict__.update(values)
        try:
            yield
        finally:
            for name in values:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)

    @contextmanager
    def _saturated_clips(self, advantages: torch.Tensor) -> Iterator[None]:
        """Makes TRL's surrogate equal to what has replaced the `advantages`, and restores the clips afterwards."""
        delta, off_policy_mask = self.args.delta, self.get_off_policy_mask
        values = {
            "epsilon_low": float("inf"),
            "epsilon_high": -2.0,
            # It depends on the sign of the advantages, but TRL would pass it what has replaced them
            "get_off_policy_mask": lambda **kwargs: off_policy_mask(**{**kwargs, "advantages": advantages}),
        }
        self.args.delta = -1.0
        try:
            with self._replaced(**values):
                yield
        finally:
            self.args.delta = delta

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._skips_old_pass and model is self.model:
            self._skips_old_pass = False
            return None, None, None
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._loss_inputs is not None:
            inputs, self._loss_inputs = self._loss_inputs, None  # further passes are the policy loss's own
            self._insert_policy_loss(inputs, logps)
        return logps, entropies, aux_loss

    def _insert_policy_loss(self, inputs: dict[str, Any], logps: torch.Tensor) -> None:
        """Changes the batch, and TRL's clips, so that its surrogate becomes our loss: see the class."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        behaviour_logps = inputs.get("old_per_token_logps")
        sampler_logps = inputs.get("sampling_per_token_logps") if self._uses_sampler_logps else None
        if sampler_logps is not None:
            behaviour_logps = sampler_logps
        elif not self.model.training:
            behaviour_logps = None  # the policy that is evaluated is the one that sampled

        token_loss = checked_token_loss(
            self.policy_loss(logps, behaviour_logps, advantages, mask, inputs), logps, type(self).__name__
        )
        metrics = dict(token_loss.metrics)
        if sampler_logps is not None:
            metrics["sampling/missing_logps"] = (~sampler_logps.isfinite()).float()
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and sampled.shape == logps.shape and self.model.training and self._is_fresh:
            # Whether or not the ratio is against them: it shows that sampler and trainer disagree. Placeholders of a
            # rollout_func that nothing is computed from may have another shape.
            metrics["sampling/fresh_log_ratio_abs"] = absolute_log_ratio(logps, sampled)
        self._token_metrics["train" if self.model.training else "eval"].update(metrics, mask)

        # TRL's own ratio weights the KL term, and would be inf or NaN for impossible tokens
        behaviour_logps = self.kl_behaviour_logps(logps if behaviour_logps is None else behaviour_logps, inputs)
        inputs["old_per_token_logps"] = bounded_behaviour_logps(logps, behaviour_logps)
        inputs["advantages"] = token_loss.loss
        self._loss_scope.enter_context(self._saturated_clips(advantages))

    # ---- rollouts

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        return self.training_inputs(inputs) if self.model.training else super()._prepare_inputs(inputs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        calculate = self._calculate_rewards  # or that of a subclass

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.rewards_per_function = calculate(*args, **kwargs)
            return self.rewards_per_function

        with self._replaced(_calculate_rewards=recorded):
            batch = super()._generate_and_score_completions(inputs)
        return self.finish_rollouts(batch, inputs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super()._calculate_rewards(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            explain_reward_error(error)
            raise

    def _generate(self, prompts: list):
        outputs = super()._generate(prompts)
        completion_ids, sampler_logps = outputs[1], outputs[4]
        if self._uses_sampler_logps or self.corrects_sampler:
            check_sampler_logps(self.accelerator, completion_ids, sampler_logps, required=self.corrects_sampler)
        # The next pass of the model is the old policy's, where TRL makes one
        makes_old_pass = self.args.gradient_accumulation_steps % self._generate_every != 0
        has_old_logps = self._uses_sampler_logps and sampler_logps is not None
        self._skips_old_pass = makes_old_pass and (has_old_logps or not self.needs_old_logps)
        return outputs

    @property
    def _is_fresh(self) -> bool:
        """Whether no update has been made since the current rollouts were sampled."""
        accumulation = self.args.gradient_accumulation_steps
        sampled_at = self._step - self._step % self._generate_every
        return self._step // accumulation == sampled_at // accumulation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._token_metrics[mode].pop().items():
            self._metrics[mode][name].append(value)
        super().log(logs, start_time)
