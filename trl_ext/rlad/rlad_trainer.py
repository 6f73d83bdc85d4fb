"""RL-aware distillation."""

import inspect
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from trl import GRPOConfig

from trl_ext.adapters import check_fused_head
from trl_ext.arguments import changed_settings, in_code, with_keyword
from trl_ext.losses import DISTILLATIONS, TokenLoss, kdrl_coefficient, kdrl_mask, kdrl_penalty, trrd_loss
from trl_ext.policy_loss_trainer import PolicyLossTrainer
from trl_ext.rlad.rlad_config import RLADConfig, check_rlad_args, settings_without_effect
from trl_ext.teacher import TeacherMixin, make_teacher
from trl_ext.trust_regions import trust_region_loss, trust_region_warnings


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = get_logger(__name__)


class RLADTrainer(TeacherMixin, PolicyLossTrainer):
    r"""
    Trainer for [Reinforcement-aware Knowledge Distillation for LLM Reasoning](https://huggingface.co/papers/2602.22495):
    GRPO whose ratio is against the old policy and the teacher together (Trust Region Ratio Distillation, Eq. 3-5),

    $$ \log r_t = \alpha (\log \pi_t - \log \pi^\mathrm{old}_t) + (1 - \alpha)\, \mathrm{clamp}(\log \pi_t -
    \log \pi^\mathrm{teacher}_t, -c, c) $$

    so that the teacher acts on the update itself: with a zero advantage it has no influence, and updates that lead
    further from it are clipped. By default \\( \alpha \\) grows from 0.5 to 1 over the run (1 is
    GRPO); the paper's is constant (`teacher_mixture_alpha_end=None`). With `distillation="kdrl"`, the baseline KDRL
    ([2506.02208](https://huggingface.co/papers/2506.02208)): GRPO plus a penalty on the distance to the teacher.

    The teacher scores the student's completions once per rollout batch; only the sampled tokens' log-probabilities are
    needed. Where the dataset has a `teacher_prompt` column, it scores them after that prompt instead of the student's.
    Takes the arguments of [`~trl.GRPOTrainer`], in the same order, and `teacher_model`; `args` may be a plain
    [`~trl.GRPOConfig`].

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            A hub name or path, a loaded model, the name of an adapter that the student (a [`~peft.PeftModel`]) holds
            beside its own, `"base"` for the student without its adapter, or the URL of a vLLM server. Without it,
            `args.teacher_model_name_or_path` or `args.teacher_model_server_url`.

    Example:

    ```python
    >>> trainer = RLADTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     reward_funcs=accuracy_reward,
    ...     args=RLADConfig(num_iterations=2),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ...     teacher_model="Qwen/Qwen3-8B",
    ... )
    ```
    """

    config_class = RLADConfig

    _tag_names = ["trl", "trl_ext", "rlad"]  # noqa: RUF012 - TRL's own form
    _name = "RLAD"
    _paper = {  # noqa: RUF012
        "title": "Reinforcement-aware Knowledge Distillation for LLM Reasoning",
        "id": "2602.22495",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{rlad2026,
                title  = {{Reinforcement-aware Knowledge Distillation for LLM Reasoning}},
                year   = 2026,
                eprint = {arXiv:2602.22495},
            }"""),
    }

    def __init__(self, *args: Any, teacher_model: "str | PreTrainedModel | PeftModel | None" = None, **kwargs: Any):
        self._teacher_model = teacher_model
        given = inspect.signature(PolicyLossTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        self._peft_config = given.get("peft_config")
        super().__init__(*args, **kwargs)
        self.prepare_teacher(self.eos_token_ids)
        if (model := getattr(self.teacher, "model", None)) is not None:  # not on a server
            check_fused_head(model, f"The teacher {self.teacher.name}")

    @classmethod
    def check_args(cls, args: GRPOConfig) -> None:
        check_rlad_args(args, cls.__name__)

    def warn_about_args(self) -> None:
        for warning in trust_region_warnings(self.args):
            logger.warning(warning)
        self.warn_of_unused_correction()
        if changed := changed_settings(self.args, settings_without_effect(self.args)):
            logger.warning(
                f"{in_code(changed)} has no effect with distillation={self.args.distillation!r} and "
                f"kdrl_mask={self.args.kdrl_mask!r}: remove it, or choose the distillation that it belongs to "
                "('trrd_and_kdrl' has the settings of both)."
            )

    def before_loading(self, model: Any, args: GRPOConfig, processing_class: Any) -> None:
        self.teacher = make_teacher(self._teacher_model, model, args, type(self).__name__, self._peft_config)
        self.check_teacher_tokenizer(model, args, processing_class)

    def policy_loss(
        self,
        per_token_logps: torch.Tensor,
        behaviour_logps: torch.Tensor | None,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        inputs: dict[str, Any],
    ) -> TokenLoss:
        args, teacher_logps = self.args, inputs["teacher_per_token_logps"]
        terms, region = DISTILLATIONS[args.distillation], partial(trust_region_loss, args)
        on_policy = behaviour_logps is None
        behaviour_logps = per_token_logps if behaviour_logps is None else behaviour_logps
        if terms.mixture:
            alpha = self.teacher_mixture_alpha
            token_loss = trrd_loss(
                per_token_logps,
                behaviour_logps,
                teacher_logps,
                advantages,
                mask,
                alpha=alpha,
                log_ratio_clip=args.teacher_log_ratio_clip,
                region=region,
            )
            if args.teacher_mixture_alpha_end not in (None, args.teacher_mixture_alpha):
                token_loss.metrics["teacher/mixture_alpha"] = torch.full((len(mask),), alpha, device=mask.device)
            constant: tuple[str, ...] = ("policy_drift", "clip_ratio/") if on_policy else ()
        else:
            token_loss = region(per_token_logps, behaviour_logps, advantages, mask)
            constant = tuple(token_loss.metrics) if on_policy else ()
        if terms.penalty:
            penalty = kdrl_penalty(per_token_logps, teacher_logps, mask, estimator=args.kdrl_estimator)
            coefficient = kdrl_coefficient(
                self.state.global_step, args.kdrl_coef, args.kdrl_coef_decay, args.kdrl_coef_min
            )
            token_loss.loss = token_loss.loss + coefficient * inputs["distilled"] * penalty.loss
            token_loss.metrics = penalty.metrics | token_loss.metrics
            token_loss.metrics["kdrl/coef"] = torch.full((len(mask),), coefficient, device=mask.device)
            if args.kdrl_mask != "none":
                token_loss.metrics["kdrl/distilled"] = inputs["distilled"].expand(mask.shape)
        # Constants are not logged: the drift on policy, the share of unscored tokens of a teacher that scores all
        if self.teacher_scores_all:
            constant += ("teacher/neutral",)
        token_loss.metrics = {n: values for n, values in token_loss.metrics.items() if not n.startswith(constant)}
        return token_loss

    @property
    def teacher_mixture_alpha(self) -> float:
        """The old student's exponent in the mixture at this step."""
        start, end = self.args.teacher_mixture_alpha, self.args.teacher_mixture_alpha_end
        if end is None:
            return start
        progress = self.state.global_step / max(self.state.max_steps - 1, 1)
        return start + (end - start) * min(progress, 1.0)

    def finish_rollouts(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen = self.teacher_batch(batch, self._teacher_prompts(batch, rows))
        # Decided here, because an adapter is the teacher in evaluation mode
        score = partial(self.score_completions, batch_size=self.scoring_batch_size)
        logps = self.teacher.sampled_logps(seen, score)
        self.stop_at_nan([(logps, batch["completion_mask"])])
        batch["teacher_per_token_logps"] = self.without_foreign_ends(logps, batch["completion_ids"])
        if DISTILLATIONS[self.args.distillation].penalty:
            batch["distilled"] = self._distilled(len(logps)).to(logps)
        return batch

    def _teacher_prompts(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[int]] | None:
        """Token ids of the rows' teacher prompts, and what the student saw where a row has none."""
        prompts = [row.get("teacher_prompt") for row in rows]
        if not any(prompts):
            return None
        seen = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        return [  # one by one: each may be text or messages, and may have an environment of its own
            self.tokenize_prompts([prompt], first=row)[0] if prompt else ids[mask].tolist()
            for row, (prompt, (ids, mask)) in enumerate(zip(prompts, seen, strict=True))
        ]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*dict.fromkeys([*self._signature_columns, "teacher_prompt"])]

    def _run_identity(self) -> dict[str, Any]:
        args = self.args
        kdrl = [args.distillation, args.kdrl_mask, args.kdrl_correct_reward]
        return {**super()._run_identity(), "teacher": self.teacher.name, "kdrl": kdrl}

    def _distilled(self, local_size: int) -> torch.Tensor:
        """1 where KDRL's penalty applies, of shape `(local_size, 1)`."""
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        distilled = kdrl_mask(self.rewards, self.args.kdrl_mask, self.args.kdrl_correct_reward, group_size)
        start = self.accelerator.process_index * local_size
        return distilled[start : start + local_size].unsqueeze(1)


# The constructor takes what its parent takes, and a teacher: say so to help() and to editors
RLADTrainer.__init__.__signature__ = with_keyword(PolicyLossTrainer.__init__, "teacher_model")  # type: ignore[attr-defined]
