"""The student's log-probabilities and entropies of a batch, differentiable and without a tensor of logits."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trl_ext.next_token import HeadScaling, backbone, gathered_head, selected_logps


def student_scores(
    model: Any, inputs: dict[str, torch.Tensor], temperature: float, with_aux_loss: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, unwrapped.
        inputs (`dict[str, torch.Tensor]`):
            A batch of [`collate`], with the teacher's most likely tokens as `top_k_ids` where the loss needs them.
        temperature (`float`):
            Of the log-probabilities.
        with_aux_loss (`bool`):
            Whether the router's auxiliary loss of a mixture of experts is wanted.

    Returns:
        `tuple`: log-probabilities (nats) of shape `(batch, time, 1 + k)`, of the completion's tokens and of the
        teacher's most likely ones; entropies (nats) of shape `(batch, time)`; the auxiliary loss, or `None`.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    options = {"output_router_logits": True} if with_aux_loss else {}
    outputs = backbone(model, input_ids, attention_mask, **options)
    shape, positions = inputs["completion_ids"].shape, inputs["positions"]
    hidden = outputs.last_hidden_state[:, -shape[1] - 1 : -1].flatten(0, 1)[positions]
    token_ids = inputs["completion_ids"][..., None]
    if "top_k_ids" in inputs:
        token_ids = torch.cat([token_ids, inputs["top_k_ids"]], dim=-1)
    config = model.config.get_text_config()
    with gathered_head(model) as (weight, bias):
        logps, entropy = selected_logps(
            hidden, weight, bias, token_ids.flatten(0, 1)[positions], HeadScaling.of(config, temperature)
        )
    logps = logps.new_zeros(shape.numel(), logps.shape[1]).index_copy(0, positions, logps)
    entropy = entropy.new_zeros(shape.numel()).index_copy(0, positions, entropy)
    aux_loss = None
    if with_aux_loss:
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        aux_loss = load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, attention_mask)
    return logps.view(*shape, -1), entropy.view(shape), aux_loss
