"""Trust region on-policy distillation."""

import random
import textwrap
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model, repeat_iterable_dataset

from trl_ext.adapters import check_adapter_below_forward, check_vllm_adapters
from trl_ext.arguments import as_config, check_sharded_adapter
from trl_ext.constructor_checks import (
    check_data_collator,
    check_model,
    check_processing_class,
    check_training_arguments,
)
from trl_ext.diagnostics import report_after_diagnostics
from trl_ext.losses import least_of_top_share, longest_prefix
from trl_ext.metrics import TokenMetrics
from trl_ext.random_state import isolated_rng
from trl_ext.teacher import TeacherMixin, make_teacher, text_tokenizer
from trl_ext.tropd.checks import check_datasets, check_served_teacher, check_tropd_args, warning_of_unused_settings
from trl_ext.tropd.objective import completion_loss, objective_of, own_mask, teacher_top_k
from trl_ext.tropd.prompts import PromptCollator, unpad, unpad_teacher_prompts
from trl_ext.tropd.rollouts import collate, roll_out, rollout_metrics
from trl_ext.tropd.sampling import RolloutSampler
from trl_ext.tropd.student import student_scores
from trl_ext.tropd.tropd_config import TrOPDConfig
from trl_ext.whole_checkpoint import WholeCheckpoints


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = get_logger(__name__)


class TrOPDTrainer(TeacherMixin, WholeCheckpoints, GKDTrainer):
    r"""
    Trainer for [Trust Region On-Policy Distillation](https://huggingface.co/papers/2606.01249): distils on the
    student's own rollouts, and trusts the teacher's reward only where the teacher is reliable. For each token
    \\( x \\) that the student sampled, with \\( \rho = \pi_T(x) / \pi_S(x) \\), its loss is (Eq. 6, 8, 9)

    $$ M (-\log \rho) + (1 - M) \sum_{v \in V_k} \pi_T(v) \log \frac{\pi_T(v)}{\pi_S(v)}, \qquad
    M \sim \mathrm{Bernoulli}(\min(\rho, 1)) $$

    with the first term as a policy gradient and the second differentiated. By default the second term is on every
    token, with all tokens outside of \\( V_k \\) as one more, and outliers also have
    \\( -\max(\log \rho, \tau) \\), as a policy gradient; `args.outlier_loss="forward_kl"` is the paper's. On a
    prefix that the teacher wrote the loss is \\( -\beta_g \log \pi_S(x) \\). The baselines OPD, forward KL, EOPD and
    REOPOLD are choices of `args.objective`.
    The loss is averaged over all completion tokens of the optimizer step, of all processes.

    Rollouts are sampled once per optimizer step, with `generate` or vLLM, and scored by the teacher in one forward
    pass. No tensor of shape (batch, time, vocabulary) is ever built, for neither model.

    Takes the arguments of [`~trl.experimental.gkd.GKDTrainer`], in the same order; `args` may be a plain
    [`~trl.experimental.gkd.GKDConfig`]. Rows have `messages`, or a `prompt` and optionally a `completion`: see
    [`PromptCollator`].

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            A hub name or path, a loaded model, the name of an adapter that the student (a [`~peft.PeftModel`]) holds
            beside its own, `"base"` for the student without its adapter, or the URL of a vLLM server. Without it,
            `args.teacher_model_name_or_path` or `args.teacher_model_server_url`.

    Example:

    ```python
    >>> trainer = TrOPDTrainer(
    ...     model="Qwen/Qwen3-1.7B",
    ...     teacher_model="Qwen/Qwen3-4B",
    ...     args=TrOPDConfig(learning_rate=5e-6, max_new_tokens=4096, num_generations=4),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    ```
    """

    loss_is_scaled_for_ga = True  # by the number of tokens of the whole optimizer step

    _tag_names = ["trl", "trl_ext", "tropd"]  # noqa: RUF012 - TRL's own form
    _name = "TrOPD"
    _paper = {  # noqa: RUF012
        "title": "Trust Region On-Policy Distillation",
        "id": "2606.01249",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{tropd2026,
                title  = {{Trust Region On-Policy Distillation}},
                year   = 2026,
                eprint = {arXiv:2606.01249},
            }"""),
    }

    args: TrOPDConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel | None" = None,
        teacher_model: "str | PreTrainedModel | PeftModel | None" = None,
        args: GKDConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable | None = None,
    ) -> None:
        name = type(self).__name__
        if model is None:
            raise ValueError(f"{name} needs a student: pass model=..., a hub name, a path or a loaded model.")
        if compute_metrics is not None or preprocess_logits_for_metrics is not None:
            raise ValueError(
                f"{name} never builds the logits that compute_metrics and preprocess_logits_for_metrics read: leave "
                "them out, and read eval_loss and eval_teacher/kl."
            )
        if formatting_func is not None:
            raise ValueError(
                f"{name} must know where a prompt ends, which formatting_func does not tell: make a 'prompt' column "
                "with dataset.map() instead."
            )
        check_model(model, name)
        args = as_config(args, TrOPDConfig, model, self._name)
        check_processing_class(processing_class)
        check_data_collator(data_collator)
        check_training_arguments(args, eval_dataset, callbacks, optimizers, peft_config)
        check_tropd_args(args)
        adapter = peft_config if isinstance(model, str) else getattr(model, "active_peft_config", peft_config)
        check_adapter_below_forward(adapter, f"The model of {name}")
        check_vllm_adapters(model, args)
        needs = None
        if data_collator is None:
            needs = check_datasets(args, name, train_dataset, eval_dataset)
        evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if any(isinstance(dataset, IterableDataset) for dataset in evals):  # batches differ in length, as in training
            args.accelerator_config.dispatch_batches = False
        self.teacher = make_teacher(teacher_model, model, args, name, peft_config)
        check_served_teacher(args, self.teacher)
        processing_class = self.check_teacher_tokenizer(model, args, processing_class)
        tokenizer = text_tokenizer(processing_class)
        if args.pad_token is not None and args.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token={args.pad_token!r} is not in the tokenizer's vocabulary: set it to a token that is, or "
                "leave it out."
            )
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"{name} needs padding, but the tokenizer has neither a padding nor an end token: set "
                "TrOPDConfig(pad_token=...)."
            )
        if data_collator is None:
            data_collator = PromptCollator(tokenizer, args.max_length, completions=needs is not None)
        if isinstance(train_dataset, IterableDataset) and args.num_generations > 1:
            train_dataset = repeat_iterable_dataset(train_dataset, args.num_generations)

        # What GKDTrainer's constructor sets. It is skipped because it loads and prepares a teacher in its own way
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super(GKDTrainer, self).__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if self.aux_loss_enabled:  # generate() fails with what SFTTrainer has set, and the loss asks for them itself
            self.model.config.get_text_config().output_router_logits = False
        check_sharded_adapter(self, fused_head=False)
        report_after_diagnostics(self.callback_handler)
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                f"{name} makes its own batches, which context and sequence parallelism would not split: set cp_size "
                "and sp_size to 1."
            )
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self.sampler = RolloutSampler(self)
        self.prepare_teacher(self.sampler.eos_token_ids)
        self.teacher_model = getattr(self.teacher, "model", None)  # GKD's name for it; None for a server
        if self.teacher_model is not None and is_peft_model(self.teacher_model):
            check_adapter_below_forward(self.teacher_model.active_peft_config, f"The teacher {self.teacher.name}")
        self.generation_config, self.generation_kwargs = self.sampler.generation_config, self.sampler.generation_kwargs
        student_size = self.model.config.get_text_config().vocab_size
        self._vocab_size = student_size
        self._top_k = min(teacher_top_k(args), student_size)
        self._forward_redirection = _ForwardRedirection()
        self._token_metrics = {"train": TokenMetrics(), "eval": TokenMetrics()}
        self._prompt_batches: list | None = None  # of the optimizer step, until its rollouts are made
        self._micro_batches: list[dict[str, torch.Tensor]] = []
        self._eval_batches = 0
        self._num_items = torch.ones((), device=self.accelerator.device)
        self._new_tokens = torch.zeros((), dtype=torch.long, device=self.accelerator.device)
        if warning := warning_of_unused_settings(args, name):
            logger.warning(warning)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Called again where a batch did not fit (auto_find_batch_size): what was counted of its step is void
        self._token_metrics["train"] = TokenMetrics()
        self._new_tokens.zero_()
        return super()._inner_training_loop(*args, **kwargs)

    # Rollouts are made when the first micro-batch of an optimizer step is needed. Not earlier, because a resumed run
    # restores the random state only after it has fetched the batches of the step.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._prompt_batches = batches
        return batches, None

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # nothing has been sampled yet

    def _prepare_inputs(self, inputs):
        if not self.model.training:
            return self._make_rollouts([inputs])[0]
        if self._prompt_batches is not None:
            batches, self._prompt_batches = self._prompt_batches, None
            self._micro_batches = self._make_rollouts(batches)
        return self._micro_batches.pop(0)

    def _make_rollouts(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """One batch of tokens, with the teacher's scores, for each batch of prompts."""
        device = self.accelerator.device
        self._eval_batches = 0 if self.model.training else self._eval_batches + 1
        generator = torch.Generator().manual_seed(self.rollout_seed(self.accelerator.process_index))
        rows = [unpad(batch) for batch in batches]
        teacher_prompts = [unpad_teacher_prompts(batch) for batch in batches]
        pairs = zip(rows, teacher_prompts, strict=True)
        seen_by_teacher = [prompts or [prompt for prompt, _ in batch] for batch, prompts in pairs]
        with isolated_rng(self.accelerator, int(torch.randint(2**62, (), generator=generator))):
            rollouts = iter(roll_out(self, [*chain(*rows)], [*chain(*seen_by_teacher)], generator))
        made, scored = [], []
        for batch, prompts in zip(rows, teacher_prompts, strict=True):
            micro_batch = collate(
                [next(rollouts) for _ in batch], self._tokenizer.pad_token_id, generator, self.args.use_vllm
            )
            micro_batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
            seen = self.teacher_batch(micro_batch, prompts)
            scores = self.teacher.next_tokens(seen, max(self._top_k, 1), len(batch), self._vocab_size)
            micro_batch["teacher_logps"] = self.without_foreign_ends(scores.logps, micro_batch["completion_ids"])
            if scores.entropy is not None:
                micro_batch["teacher_entropy"] = scores.entropy
            if self._top_k:
                top_k_logps = self.without_ends(scores.top_k_logps, scores.top_k_ids)
                micro_batch |= {"top_k_logps": top_k_logps, "top_k_ids": scores.top_k_ids}
            made.append(micro_batch)
            scored.append((scores.logps, micro_batch["completion_mask"]))
        self.stop_at_nan(scored)
        switch = self.state.max_steps // 2 if self.args.reopold_switch_step is None else self.args.reopold_switch_step
        selects = self.model.training and self.state.global_step >= switch  # evaluation has one objective throughout
        if selects and "uncertain" in objective_of(self.args).tensors:
            self._find_uncertain(made)
        self._count(made)
        return made

    def rollout_seed(self, index: int) -> int:
        """
        The seed of the rollouts being made, for the process or the engine with this index. TRL gives all processes the
        same seed, with which they would draw the same samples.
        """
        key = (self.args.seed, self.state.global_step, index, self._eval_batches)
        return random.Random(str(key)).getrandbits(62)

    def _find_uncertain(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """
        Marks the tokens of the step about which the student is least certain, over all micro-batches and processes. It
        takes a forward pass of its own, because they must be known before the first micro-batch is trained on.
        """
        with torch.no_grad():
            entropies = [self._run_score(self.model_wrapped, batch)[1] for batch in batches]
        values = [entropy[own_mask(batch)] for entropy, batch in zip(entropies, batches, strict=True)]
        padded = self.accelerator.pad_across_processes(torch.cat(values), pad_index=float("nan"))
        least = least_of_top_share(self.accelerator.gather(padded), self.args.reopold_top_entropy_share)
        for batch, entropy in zip(batches, entropies, strict=True):
            batch["uncertain"] = entropy >= least

    def _count(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Counts the tokens of the step, by which its loss is divided, and logs the lengths of its completions."""
        mode = "train" if self.model.training else "eval"
        for batch in batches:
            metrics = rollout_metrics(batch, self.sampler.eos_token_ids)
            if mode == "train" and self.args.guidance != "none":
                metrics["guidance/share"] = batch["guided_mask"].float()
                metrics["guidance/max_length"] = batch["completion_mask"].new_full(
                    (len(batch["completion_mask"]),), self.longest_prefix(), dtype=torch.float
                )
            if mode == "train" and self.args.lmbda < 1:
                metrics["off_policy/share"] = batch["off_policy_mask"].float()
            self._token_metrics[mode].update(metrics, batch["completion_mask"])
        if mode == "train":
            counts = torch.stack(
                [
                    sum((batch["completion_mask"].sum() for batch in batches), torch.zeros_like(self._new_tokens)),
                    sum((batch["prompt_mask"].sum() for batch in batches), torch.zeros_like(self._new_tokens)),
                ]
            )
            counts = self.accelerator.gather(counts[None]).sum(0)
            self._num_items = counts[0].clamp(min=1).float()
            self._new_tokens += counts.sum()

    def _tokens_so_far(self) -> int:
        """Counted on the device until somebody asks, and then in the state, which checkpoints hold."""
        self.state.num_input_tokens_seen += int(self._new_tokens)
        self._new_tokens.zero_()
        return self.state.num_input_tokens_seen

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Does nothing: `_count` counts the completions too, which transformers' batches do not have yet."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._tokens_so_far()
        super()._save_checkpoint(model, trial)

    def longest_prefix(self) -> int:
        """The longest prefix by the teacher at this step, in tokens."""
        args = self.args
        if args.guidance == "none":
            return 0
        length = args.max_new_tokens if args.guidance_max_length is None else args.guidance_max_length
        return longest_prefix(self.state.global_step, self.state.max_steps, length, args.guidance_schedule)

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        logps, entropy, aux_loss = self._run_score(model, inputs)
        per_token_loss, metrics = completion_loss(self.args, mode == "train", logps, entropy, inputs)
        for values, mask in metrics:
            self._token_metrics[mode].update(values, mask)
        if mode == "train":
            # The mean over the tokens of all micro-batches and processes, whose gradients are averaged
            loss = per_token_loss.sum() * self.accelerator.num_processes / self._num_items
        else:
            loss = per_token_loss.sum() / inputs["completion_mask"].sum().clamp(min=1)
        if aux_loss is not None:
            steps = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device) / steps
        if mode == "eval" or self.accelerator.sync_gradients:
            self._token_metrics[mode].reduce(self.accelerator)
        return (loss, {}) if return_outputs else loss

    def _run_score(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """`_score` through the forward of the wrapper, which reduces gradients and gathers sharded weights."""
        unwrapped = self.accelerator.unwrap_model(model)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():  # accelerate wraps the forward in it, which the redirection replaces
            return self._forward_redirection(model, unwrapped, self._score, student, inputs)

    def _score(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        return student_scores(model, inputs, self.args.temperature, self.aux_loss_enabled)

    # The rest of the run

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)  # GKD's own would sample

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._token_metrics[mode].pop()
        if metrics and mode == "train":
            metrics["num_tokens"] = self._tokens_so_far()
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if sampler is not None and self.args.num_generations > 1:
            shuffle = self.args.train_sampling_strategy != "sequential"
            dataset = self.train_dataset if train_dataset is None else train_dataset
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = RepeatSampler(dataset, self.args.num_generations, shuffle=shuffle, seed=seed)
        self._train_sampler = sampler
        return sampler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        sampler = getattr(self, "_train_sampler", None)
        if checkpoint is not None and isinstance(sampler, RepeatSampler) and sampler.shuffle:
            for _ in range(int(self.state.epoch or 0)):  # the shuffles of the epochs that are over
                torch.randperm(sampler.num_samples, generator=sampler.generator)
