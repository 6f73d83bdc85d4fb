"""Samples completions of the student and of the teacher."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig
from trl.distributed import DistributedBackend
from trl.import_utils import is_vllm_available
from trl.models.utils import unwrap_model_for_generation

from trl_ext.random_state import engine_index, isolated_rng
from trl_ext.tropd.rollouts import left_padded


@contextmanager
def _bare_generation_config(model: Any) -> Iterator[None]:
    """
    While this is active, the checkpoint's own generation settings (a repetition penalty, say) have no effect:
    `generate` falls back to them for each setting that it is not given, and would sample from a distribution that is
    not the one that is scored.
    """
    models = [model.get_base_model() if is_peft_model(model) else model]
    if model is not models[0] and "generation_config" in vars(model):  # PEFT's generate() takes that of the wrapper
        models.append(model)
    own = [each.generation_config for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, config in zip(models, own, strict=True):
            each.generation_config = config


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """While this is active, the model is in evaluation mode: samples have neither dropout nor embedding noise."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class RolloutSampler:
    """
    Samples from the whole distribution at the trainer's temperature, with `generate` or (the student only) with vLLM.

    Args:
        trainer ([`TrOPDTrainer`]):
            Initialised, its teacher prepared.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, args = trainer, trainer.args
        own = trainer.model.generation_config.eos_token_id
        own = trainer._tokenizer.eos_token_id if own is None else own
        self.eos_token_ids: list[int] = [own] if isinstance(own, int) else list(own or [])
        # The teacher may have other end tokens than the student
        self.teacher_eos_token_ids = sorted({*self.eos_token_ids, *(trainer.teacher.eos_token_ids or ())})
        self.generation_kwargs = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": True,
            "temperature": args.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "pad_token_id": trainer._tokenizer.pad_token_id,
            "eos_token_id": self.eos_token_ids or None,
            "disable_compile": True,
        }
        self.generation_config = GenerationConfig(**self.generation_kwargs)
        self._backend = DistributedBackend(trainer.accelerator)
        self._vllm = self._start_vllm() if args.use_vllm else None
        self._loaded_step = -1  # the step whose weights vLLM has

    def from_student(
        self, prompts: list[list[int]], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        One completion per prompt, as token ids, up to and including its end token, and vLLM's log-probabilities of
        these tokens (nats, NaN for a missing one), `None` without vLLM. vLLM ignores `max_new_tokens` and samples up
        to `args.max_new_tokens`.
        """
        if self._vllm is None:
            return self._generate(self.trainer.model_wrapped, prompts, max_new_tokens, self.eos_token_ids), None
        step = self.trainer.state.global_step
        # An evaluation may follow the loading of other weights
        if step != self._loaded_step or not self.trainer.model.training:
            self._vllm.sync_weights()
            self._loaded_step = step
        accelerator = self.trainer.accelerator
        seed = self.trainer.rollout_seed(engine_index(self.trainer.args, accelerator.process_index))
        with isolated_rng(accelerator, seed):
            _, completions, logps, _ = self._vllm.generate(prompts=prompts, images=None, num_generations=1)
        if logps is not None:
            logps = [[math.nan if token[0] is None else token[0] for token in row] for row in logps]
        return [list(completion) for completion in completions], logps

    def from_teacher(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The same from the teacher, up to its own end token or a token outside the student's vocabulary."""
        size = self.trainer.model.config.get_text_config().vocab_size
        with self.trainer.teacher.scoring() as model:
            completions = self._generate(model, prompts, max_new_tokens, self.teacher_eos_token_ids)
        return [list(takewhile(lambda token: token < size, completion)) for completion in completions]

    def without_end(self, completion: list[int]) -> list[int]:
        """`completion` before its first end token, the student's or the teacher's."""
        return list(takewhile(lambda token: token not in self.teacher_eos_token_ids, completion))

    def _generate(
        self, model: Any, prompts: list[list[int]], max_new_tokens: int, eos_token_ids: list[int]
    ) -> list[list[int]]:
        trainer, args = self.trainer, self.trainer.args
        device = trainer.accelerator.device
        ids, mask = left_padded(prompts, trainer._tokenizer.pad_token_id)
        settings = {**self.generation_kwargs, "max_new_tokens": max_new_tokens, "eos_token_id": eos_token_ids or None}
        with (
            unwrap_model_for_generation(
                model,
                trainer.accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                generation_kwargs=settings,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as unwrapped,
            torch.no_grad(),
            self._backend.summon_full_params(model, recurse=False),
            _bare_generation_config(unwrapped),
            _evaluating(unwrapped),
        ):
            sequences = unwrapped.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(**settings),
            )
        completions = []
        for row in sequences[:, ids.shape[1] :].tolist():
            length = next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row))
            completions.append(row[:length])
        return completions

    def _start_vllm(self) -> Any:
        if not is_vllm_available():
            raise ImportError("use_vllm=True needs vLLM: run `pip install trl[vllm]`, or set use_vllm=False.")
        from trl.generation.vllm_generation import VLLMGeneration  # imports vLLM

        trainer, args = self.trainer, self.trainer.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            group_port=args.vllm_group_port,
            server_timeout=args.vllm_server_timeout,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=rows * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            temperature=args.temperature,
            max_completion_length=args.max_new_tokens,
            logprobs=0,  # of the sampled token
        )
