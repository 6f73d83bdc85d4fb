"""`GRPOTrainer` with its per-token policy loss as one method. The only file that knows GRPO's private methods."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext.arguments import (
    as_config,
    check_policy_loss_args,
    check_processing_class,
    check_sharded_adapter,
    sampling_that_biases_the_ratio,
)
from trl_ext.dataset_columns import check_prompt_column
from trl_ext.losses import TokenLoss
from trl_ext.losses.token_loss import bounded_behaviour_logps
from trl_ext.metrics import TokenMetrics
from trl_ext.policy_loss_checks import check_sampler_logps, checked_token_loss, without_advice
from trl_ext.rollout_checkpoint import load_rollouts, remove_rollouts, save_rollouts
from trl_ext.whole_checkpoint import WholeCheckpoints


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


class PolicyLossTrainer(WholeCheckpoints, GRPOTrainer):
    r"""
    [`~trl.GRPOTrainer`] with another per-token policy loss: a subclass writes `policy_loss`, and all the rest
    (generation, rewards, masks, KL, aggregation, entropy bonus, auxiliary loss, metrics) remains TRL's own code.

    How: TRL's surrogate is \\( -\min(\mathrm{clip}_1(r) A, \mathrm{clip}_2(r) A) \\), and it reads the advantages and
    both clips' bounds only after the log-probabilities. Upper bounds of -1 make both clips the constant -1, without a
    gradient, as a ratio is positive; then the surrogate of "advantages" \\( \ell \\) is exactly \\( \ell \\), in value
    and in gradient. So where the log-probabilities pass by, our loss takes the place of the advantages. The ratio
    itself stays what it was, for its other reader: the bias correction of the KL term.

    Takes the arguments of [`~trl.GRPOTrainer`], in the same order.
    """

    config_class: type[GRPOConfig] = GRPOConfig
    # Whether the ratio is against the policy that really sampled the tokens (the sampler's log-probabilities, where
    # the rollout has them) and not against the training model's old log-probabilities. If so there is neither a pass
    # to compute the latter, nor vLLM's importance sampling correction, which would correct the same thing again.
    anchored_to_sampler = False

    epsilon_low: float
    epsilon_high: float
    vllm_importance_sampling_correction: bool
    _buffered_inputs: list[dict[str, Any]] | None

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
        args = as_config(args, self.config_class, model, self._name)
        self.check_args(args)
        check_processing_class(processing_class)
        if environment_factory is None:
            check_prompt_column(type(self).__name__, train_dataset, eval_dataset)
        self.before_loading(model, args, processing_class)
        self._loss_inputs: dict[str, Any] | None = None  # the batch, while `_compute_loss` works on it
        self._skips_old_pass = False
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
        check_sharded_adapter(self, fused_head=True)
        # With vLLM's correction switched off, its log-probabilities are not used
        self._uses_sampler_logps = self.anchored_to_sampler and (
            not self.use_vllm or self.vllm_importance_sampling_correction
        )
        if self.anchored_to_sampler:
            self.vllm_importance_sampling_correction = False
        self.warn_about_args()

    @classmethod
    def check_args(cls, args: GRPOConfig) -> None:
        """Refuses, with a `ValueError`, the settings that cannot be honoured. Called before a model is loaded."""
        check_policy_loss_args(args, cls.__name__)

    def before_loading(self, model: Any, args: GRPOConfig, processing_class: Any) -> None:
        """For what a subclass can find out before the policy is loaded. Called once `args` have been checked."""

    def warn_about_args(self) -> None:
        """Warns, once, of the settings that were set but have no effect. Called at the end of `__init__`."""

    @property
    def sampled_elsewhere(self) -> bool:
        """Whether the ratio is against the log-probabilities of another engine than the training model."""
        return self._uses_sampler_logps and (self.use_vllm or self.rollout_func is not None)

    def warn_of_biased_ratio(self) -> None:
        """Warns where that engine's log-probabilities are not those of its policy at the temperature in use."""
        if self.sampled_elsewhere and (names := sampling_that_biases_the_ratio(self.args)):
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
                The whole batch, with what a subclass's `_generate_and_score_completions` added to it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define policy_loss().")

    def score_completions(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """
        Log-probabilities (nats) of a rollout batch's completions under any model with TRL's fused LM head, at the
        trainer's temperature and in micro-batches: of shape `(batch, time)`.
        """
        mode = "train" if self.model.training else "eval"
        return self._score(model, batch, batch_size=getattr(self.args, f"per_device_{mode}_batch_size"))[0]

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
        bounds = self.epsilon_low, self.epsilon_high, self.args.delta
        self._loss_inputs = inputs = dict(inputs)  # a copy, because the rollout batch is used again
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None
            self.__dict__.pop("get_off_policy_mask", None)
            self.epsilon_low, self.epsilon_high, self.args.delta = bounds
        for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"):
            self._metrics[mode].pop(f"clip_ratio/{name}", None)  # of clips that are constant now
        if mode == "eval" or self.accelerator.sync_gradients:
            self._token_metrics[mode].reduce(self.accelerator)
        return loss

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
            behaviour_logps = None  # evaluated by the very policy that sampled

        token_loss = checked_token_loss(
            self.policy_loss(logps, behaviour_logps, advantages, mask, inputs), logps, type(self).__name__
        )
        metrics = dict(token_loss.metrics)
        if sampler_logps is not None:
            metrics["sampling/missing_logps"] = (~sampler_logps.isfinite()).float()
        self._token_metrics["train" if self.model.training else "eval"].update(metrics, mask)

        # For TRL's own ratio, which weighs the KL term and would make inf or NaN of impossible tokens
        behaviour_logps = logps if behaviour_logps is None else behaviour_logps
        inputs["old_per_token_logps"] = bounded_behaviour_logps(logps, behaviour_logps)
        # The off-policy mask goes by the sign of the advantages; TRL would hand it what now stands in their place
        mask_function = self.get_off_policy_mask
        self.__dict__["get_off_policy_mask"] = lambda **kwargs: mask_function(**{**kwargs, "advantages": advantages})
        inputs["advantages"] = token_loss.loss
        self.epsilon_low, self.epsilon_high, self.args.delta = float("inf"), -2.0, -1.0

    def _generate(self, prompts: list):
        outputs = super()._generate(prompts)
        completion_ids, sampler_logps = outputs[1], outputs[4]
        self._skips_old_pass = False
        if self._uses_sampler_logps:
            check_sampler_logps(self.accelerator, completion_ids, sampler_logps)
            # The pass that TRL makes next, where the update is not aligned with the generation, is the old policy's
            self._skips_old_pass = (
                sampler_logps is not None and self.args.gradient_accumulation_steps % self._generate_every != 0
            )
        return outputs

    @property
    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._token_metrics[mode].pop().items():
            self._metrics[mode][name].append(value)
        super().log(logs, start_time)

    # TRL samples anew when it resumes, its schedule of generations starts again from there, and so does its sampler's
    # shuffling. So the rollouts that are still in use are part of our checkpoints, and the sampler is wound on.

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

    def _load_rollouts(self, checkpoint: str) -> None:
        device = self.accelerator.device
        rollouts = load_rollouts(checkpoint, self._run_identity(), self.accelerator.process_index, device)
        loaded = self.accelerator.gather(torch.tensor([rollouts is not None], device=device))
        # All processes or none: one that generates waits for the others
        fresh: tuple[Any, int] = (None, 0)
        self._buffered_inputs, self._step = rollouts if rollouts is not None and loaded.all() else fresh
        sampler = getattr(self, "_train_sampler", None)
        if sampler is not None and sampler.shuffle:
            for _ in range(int(self.state.epoch or 0)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def _run_identity(self) -> dict[str, Any]:
        """What rollouts of a checkpoint depend on."""
        names = ["per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"]
        names += ["num_iterations", "num_generations", "max_completion_length"]
        return {
            "num_processes": self.accelerator.num_processes,
            "reference": self.beta != 0.0,
            "global_step": self.state.global_step,
            **{name: getattr(self.args, name) for name in names},
        }
