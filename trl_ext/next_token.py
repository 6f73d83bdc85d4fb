"""Next-token distributions through a model's LM head, without the (batch, time, vocabulary) tensor of logits."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx


CHUNK_ELEMENTS = 2**24  # logits at a time: 64 MiB in float32


class NextTokens(NamedTuple):
    """A model's predictions of the next tokens, all detached; log-probabilities and entropies in nats."""

    logps: torch.Tensor  # (batch, time): of the actual tokens
    top_k_logps: torch.Tensor  # (batch, time, k): of the likeliest tokens, under the softmax over all, descending
    top_k_ids: torch.Tensor  # (batch, time, k): those tokens
    entropy: torch.Tensor | None  # (batch, time); None where it is not known


class HeadScaling(NamedTuple):
    """How the LM head's output is scaled: `softcap * tanh(scale * z / softcap) / temperature`."""

    scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, config: PretrainedConfig, temperature: float) -> "HeadScaling":
        """The scaling of the model's own forward, by the names that `trl.trainer.utils.add_fused_lm_head` reads."""
        scale = next(
            (
                value
                for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if (value := getattr(config, name, None)) is not None
            ),
            None,
        )
        if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
        caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        softcap = next((value for name in caps if (value := getattr(config, name, None)) is not None), None)
        return cls(1.0 if scale is None else scale, softcap, temperature)

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Scales `logits`, in place."""
        if self.softcap is None:
            return logits if self.scale == self.temperature else logits.mul_(self.scale / self.temperature)
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def backward_(self, grad: torch.Tensor, scaled_logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the product from that of the scaled logits, in place. `scaled_logits` is used up."""
        grad.mul_(self.scale / self.temperature)
        if self.softcap is None:
            return grad
        return grad.mul_(scaled_logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1))


@torch.no_grad()
def next_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> NextTokens:
    """
    The predictions of `model` for each of the last `logits_to_keep` tokens, in one forward pass.

    Call it inside the forward of whatever wraps `model` (`_ForwardRedirection`), so that sharded weights are gathered.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, unwrapped.
        input_ids (`torch.Tensor` of shape `(batch, sequence)`):
            Tokens.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`):
            0 for padding. What is returned for padding is 0.
        logits_to_keep (`int`):
            Number of tokens at the end of the sequences.
        k (`int`):
            Number of the likeliest tokens to return, at most the size of the vocabulary.
        temperature (`float`, defaults to `1.0`):
            What the logits are divided by.
        vocab_size (`int`, *optional*):
            The likeliest tokens are those below this id, where another model's vocabulary ends there.
    """
    hidden = backbone(model, input_ids, attention_mask).last_hidden_state[:, -logits_to_keep - 1 : -1]
    scaling = HeadScaling.of(model.config.get_text_config(), temperature)
    targets = input_ids[:, -logits_to_keep:]
    valid = attention_mask[:, -logits_to_keep:].flatten().nonzero().squeeze(1)
    shape = targets.shape
    with gathered_head(model) as (weight, bias):
        hidden, targets = hidden.flatten(0, 1)[valid], targets.flatten()[valid]
        scores = likeliest_tokens(hidden, weight, bias, targets, k, scaling, vocab_size)

    def in_place(values: torch.Tensor) -> torch.Tensor:
        filled = values.new_zeros(shape.numel(), *values.shape[1:])
        filled[valid] = values
        return filled.view(*shape, *values.shape[1:])

    placed: Any = (in_place(values) for values in scores if values is not None)
    return NextTokens(*placed)


@torch.no_grad()
def likeliest_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    k: int,
    scaling: HeadScaling,
    vocab_size: int | None = None,
) -> NextTokens:
    """`next_tokens` from hidden states of shape `(positions, width)` on, for `targets` of shape `(positions,)`."""
    compute_dtype = _compute_dtype(hidden)  # before autocast is switched off
    k = min(k, len(weight) if vocab_size is None else vocab_size, len(weight))
    dtype = _stats_dtype(hidden)
    logps, entropy = hidden.new_empty(2, len(hidden), dtype=dtype)
    top_k_logps = hidden.new_empty(len(hidden), k, dtype=dtype)
    top_k_ids = targets.new_empty(len(hidden), k)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, logits in _logits(hidden, weight, bias, scaling, compute_dtype):
            log_z = logits.logsumexp(-1, keepdim=True)
            logps[rows] = (logits.gather(1, targets[rows, None]) - log_z).squeeze(1)
            values, top_k_ids[rows] = logits[:, :vocab_size].topk(k, dim=-1)
            top_k_logps[rows] = values - log_z
            entropy[rows] = _entropy(logits.sub_(log_z))
    return NextTokens(logps, top_k_logps, top_k_ids, entropy)


def backbone(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
    """The outputs of `model` below its LM head. Padding on the left does not shift the positions of what follows."""
    if model.base_model is model:
        raise ValueError(
            f"{type(model).__name__} has no part below its LM head that can be called alone, so that its "
            "log-probabilities could not be computed without a tensor of logits: use another architecture."
        )
    if model.config.get_text_config() is model.config:  # others number the positions of text and images themselves
        parameters = inspect.signature(model.base_model.forward).parameters
        if "position_ids" in parameters:
            kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)


def selected_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    scaling: HeadScaling,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Differentiable log-probabilities of a few tokens per position:
    \\( \log \mathrm{softmax}(f(W h + b))_v \\) for the \\( m \\) given tokens \\( v \\).

    The logits exist for one chunk of positions at a time, and are computed again in the backward pass. They cover the
    vocabulary in any case, so that many tokens per position cost no more than one.

    Args:
        hidden (`torch.Tensor` of shape `(positions, width)`):
            \\( h \\).
        weight (`torch.Tensor` of shape `(vocabulary, width)`):
            \\( W \\).
        bias (`torch.Tensor` of shape `(vocabulary,)`, *optional*):
            \\( b \\).
        token_ids (`torch.Tensor` of shape `(positions, m)`):
            The tokens \\( v \\).
        scaling ([`HeadScaling`]):
            \\( f \\).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: log-probabilities (nats) of shape `(positions, m)`, and the entropies
        (nats) of the whole distributions, of shape `(positions,)` and without a gradient; both in float32 or wider.
    """
    compute_dtype = _compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _SelectedLogps.apply(hidden, weight, bias, token_ids, scaling, compute_dtype)


class _SelectedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, token_ids, scaling, compute_dtype):
        dtype = _stats_dtype(hidden)
        logps = hidden.new_empty(token_ids.shape, dtype=dtype)
        log_z, entropy = hidden.new_empty(2, len(hidden), dtype=dtype)
        for rows, logits in _logits(hidden, weight, bias, scaling, compute_dtype):
            log_z[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, token_ids[rows]) - log_z[rows, None]
            entropy[rows] = _entropy(logits.sub_(log_z[rows, None]))
        ctx.save_for_backward(hidden, weight, bias, token_ids, log_z)
        ctx.scaling, ctx.compute_dtype = scaling, compute_dtype
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, *grads):
        hidden, weight, bias, token_ids, log_z = ctx.saved_tensors
        grad_logps = grads[0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with maybe_gather_lm_head_ctx(weight, bias):  # ZeRO-3 has sharded it again since the forward pass
            # Summed over the chunks in float32 at least, whatever the weights are
            grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=log_z.dtype) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=log_z.dtype) if needs_bias else None
            for rows, logits in _logits(hidden, weight, bias, ctx.scaling, ctx.compute_dtype):
                # d logp_v / d logits = onehot(v) - softmax, summed over the tokens
                grad = (logits - log_z[rows, None]).exp_().mul_(-grad_logps[rows].sum(1, keepdim=True))
                grad.scatter_add_(1, token_ids[rows], grad_logps[rows])
                grad = ctx.scaling.backward_(grad, logits)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(ctx.compute_dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ weight.to(ctx.compute_dtype)).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product_(grad_weight, grad, hidden[rows].to(ctx.compute_dtype))
            return (
                grad_hidden,
                None if grad_weight is None else grad_weight.to(weight.dtype),
                None if grad_bias is None else grad_bias.to(bias.dtype),
                None,
                None,
                None,
            )


@contextmanager
def gathered_head(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of the LM head, whole, whatever shards them."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    weight, bias = _full_tensor(weight), None if bias is None else _full_tensor(bias)
    with maybe_gather_lm_head_ctx(weight, bias):
        yield weight, bias


def _full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter whole, where FSDP2 shards it; its gradient is then averaged over the processes, as FSDP2 does."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: HeadScaling,
    compute_dtype: torch.dtype,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The positions chunk by chunk, with their scaled logits in float32 or wider, free to be overwritten."""
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    head = weight.to(compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        logits = nn.functional.linear(hidden[rows].to(compute_dtype), head, bias)
        yield rows, scaling.apply_(logits.to(_stats_dtype(hidden)))


def _entropy(logps: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary) -> (n,); an impossible token adds 0."""
    return -logps.exp().mul_(logps).nansum(-1)


def _add_product_(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """total += grad^T hidden, in the precision of `total`, with no second tensor of its size."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden)
        return
    size = max(1, CHUNK_ELEMENTS // hidden.shape[1])
    for start in range(0, len(total), size):
        total[start : start + size] += grad[:, start : start + size].t() @ hidden


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _stats_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
