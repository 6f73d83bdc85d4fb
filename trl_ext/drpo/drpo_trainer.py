"""Divergence Regularized Policy Optimization."""

import textwrap
from typing import Any

import torch
from accelerate.logging import get_logger
from trl import GRPOConfig

from trl_ext.drpo.drpo_config import DRPOConfig, check_drpo_args
from trl_ext.losses import TokenLoss
from trl_ext.policy_loss_trainer import PolicyLossTrainer
from trl_ext.trust_regions import trust_region_loss, trust_region_radius, trust_region_warnings


logger = get_logger(__name__)


class DRPOTrainer(PolicyLossTrainer):
    r"""
    Trainer for Divergence Regularized Policy Optimization, [Rethinking the Divergence Regularization in LLM
    RL](https://huggingface.co/papers/2606.09821): GRPO with its clipping replaced by a smooth, advantage-weighted
    quadratic regularizer on the shift of the token's probability (Eq. 8, maximized):

    $$ J = \mathbb{E}_{y \sim \mu} \sum_t \left[ r_t A_t - \frac{|A_t|}{2 \delta} \mu_t (r_t - 1)^2 \right], \qquad
    r_t = \pi_t / \mu_t $$

    \\( \mu \\) is the policy that sampled the tokens: the sampler's own log-probabilities where the rollout has them
    (vLLM, `rollout_func`), else the old log-probabilities of the training model, else the current ones. There is no
    further importance sampling correction, unless `args.trust_region_anchor="old_policy"` asks for the old
    log-probabilities in place of the sampler's.

    Takes the arguments of [`~trl.GRPOTrainer`], in the same order; `args` may be a plain [`~trl.GRPOConfig`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_ext import DRPOConfig, DRPOTrainer

    >>> trainer = DRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=DRPOConfig(num_iterations=4, trust_region_radius=0.5),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    config_class = DRPOConfig

    _tag_names = ["trl", "trl_ext", "drpo"]  # noqa: RUF012 - TRL's own form
    _name = "DRPO"
    _paper = {  # noqa: RUF012
        "title": "Rethinking the Divergence Regularization in LLM RL",
        "id": "2606.09821",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{drpo2026,
                title  = {{Rethinking the Divergence Regularization in LLM RL}},
                year   = 2026,
                eprint = {arXiv:2606.09821},
            }"""),
    }

    @property
    def trust_region_radius(self) -> float | None:
        """The radius in use: the configured one, or the default of the chosen trust region."""
        return trust_region_radius(self.args)

    @classmethod
    def check_args(cls, args: GRPOConfig) -> None:
        check_drpo_args(args, cls.__name__)

    def before_loading(self, model: Any, args: GRPOConfig, processing_class: Any) -> None:
        self.anchored_to_sampler = args.trust_region_anchor == "sampler"

    def policy_loss(
        self,
        per_token_logps: torch.Tensor,
        behaviour_logps: torch.Tensor | None,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        inputs: dict[str, Any],
    ) -> TokenLoss:
        on_policy = behaviour_logps is None
        behaviour_logps = per_token_logps if behaviour_logps is None else behaviour_logps
        token_loss = trust_region_loss(self.args, per_token_logps, behaviour_logps, advantages, mask)
        if on_policy:
            token_loss.metrics = {}  # constants, because the ratio is 1
        return token_loss

    def warn_about_args(self) -> None:
        for warning in trust_region_warnings(self.args):
            logger.warning(warning)
        self.warn_of_unused_correction()
        if self.rollout_func is not None and not self.use_vllm and not self.anchored_to_sampler:
            logger.warning(
                "trust_region_anchor='old_policy' leaves out the log-probabilities that rollout_func may return, and "
                "TRL corrects for those of vLLM alone: leave trust_region_anchor at 'sampler' unless rollout_func "
                "samples from the training model."
            )
        self.warn_of_biased_ratio()
        if not self.sampled_elsewhere and self.args.gradient_accumulation_steps % self._generate_every == 0:
            logger.warning(
                "Every rollout batch is used for a single update of the policy that the trust region is around, so "
                "that the ratio is 1 and the region has no effect: to reuse rollouts, raise num_iterations or "
                "steps_per_generation until their product is more than gradient_accumulation_steps."
            )
