"""What happens between the stages of ERPD: sampling, scoring, measuring, restoring the base policy."""

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from trl_ext.erpd.base_policy import WeightsCopy, clear_optimizer_state, save_whole_policy
from trl_ext.erpd.fixed_set import FixedSet
from trl_ext.erpd.measures import evaluating, measure_samples, own_samples, reduced
from trl_ext.erpd.sampling import sample_fixed_set
from trl_ext.erpd.schedule import Phase, Schedule, teachers_of
from trl_ext.losses import normalize_signal, token_signal
from trl_ext.losses.signal import MIN_SIGNAL_STD, SIGNALS, mean_and_std, signal_moments
from trl_ext.rollout_checkpoint import read_metadata


if TYPE_CHECKING:
    from trl_ext.erpd.erpd_trainer import ERPDTrainer

logger = get_logger(__name__)


class Stages:
    """
    The round that a run of [`ERPDTrainer`] is in: its fixed set, its base policy, and the work between its phases.

    That work is done when the first micro-batch of a phase is asked for, so that a checkpoint that is written after a
    phase's last update holds the phase as it ended, and a run that resumes from it does the work again.
    """

    def __init__(self, trainer: "ERPDTrainer", schedule: Schedule) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.fixed_set: FixedSet | None = None
        self.base = WeightsCopy(trainer)
        self.base_measures: dict[str, float] = {}
        self._pass: tuple[int, list[int]] | None = None  # the pass at hand, and its order of the batches
        self._begun: int | None = None  # the pass whose beginning this process has seen

    # ---- the updates

    def micro_batch(self, step: int, index: int) -> dict[str, Any]:
        """Inputs of the loss for micro-batch `index` of the pass that optimizer step `step` is in."""
        number = step // self.schedule.steps_per_pass
        if index == 0 and step % self.schedule.steps_per_pass == 0:
            self._begin_pass(number)
            self._begun = number
        elif self._begun not in (None, number):  # a run that resumes within a pass has begun none
            raise ValueError(
                "A callback has ended a pass over the set early (control.should_epoch_stop), without which the stages "
                "do not fit together: end the whole run instead (control.should_training_stop)."
            )
        assert self.fixed_set is not None  # sampled by the first pass, or loaded from the checkpoint
        if self._pass is None or self._pass[0] != number:
            self._pass = number, self.fixed_set.order(self.trainer.args.seed * 1_000_003 + number)
        batch = self.fixed_set.micro_batch(self._pass[1][index], self.trainer.accelerator.device)
        return self._loss_inputs(batch, self.schedule.passes[number][0])

    def _loss_inputs(self, batch: dict[str, Any], phase: Phase) -> dict[str, Any]:
        assert self.fixed_set is not None
        args, sampler_logps = self.trainer.args, batch.pop("sampling_per_token_logps", None)
        batch["old_per_token_logps"] = batch["anchor_logps"] if phase.stage == 2 else batch["base_logps"]
        if phase.stage == 1 and sampler_logps is not None and self.trainer._uses_sampler_logps:
            known = sampler_logps.isfinite()
            batch["old_per_token_logps"] = torch.where(known, sampler_logps, batch["base_logps"])
        if phase.stage == 2:
            batch["ref_per_token_logps"] = batch["base_logps"]
        # Every token of the set weighs alike: TRL makes of this the tokens of one accumulation window, on average
        windows = self.schedule.steps_per_pass * args.gradient_accumulation_steps / args.steps_per_generation
        batch["num_items_in_batch"] = torch.full(
            (), self.fixed_set.num_tokens / windows, device=batch["rewards"].device
        )
        return batch

    # ---- between the phases

    def _begin_pass(self, number: int) -> None:
        phase, pass_of_phase = self.schedule.passes[number]
        self._pass = None
        if pass_of_phase == 0:
            previous = self.schedule.before(phase)
            if previous is not None:
                self.end_phase(previous)
            self._begin_phase(phase, new_round=previous is None or previous.round != phase.round)
        elif phase.stage == 2 and self.trainer.args.distillation_anchor == "pass":
            self._score("anchor")
        self._describe(phase, f"pass {pass_of_phase + 1}/{phase.passes}")

    def _begin_phase(self, phase: Phase, new_round: bool) -> None:
        if new_round:
            self.base.take()
            self._describe(phase, "sampling the set")
            self.fixed_set, facts = sample_fixed_set(self.trainer, phase.round)
            facts["base/set_entropy"] = self._score("base")["entropy"]  # its divergence from itself is 0
            self.base_measures = {}
            if self.trainer.eval_dataset is not None:
                self._describe(phase, "measuring the base policy")
                self.base_measures = measure_samples(self.trainer, own_samples(self.trainer), base_is_loaded=False)
            self._log(phase, facts | {f"base/{name}": value for name, value in self.base_measures.items()})
        clear_optimizer_state(self.trainer.optimizer)
        self.trainer.restart_learning_rate()
        if phase.stage == 2:
            self._make_signal(phase)

    def end_phase(self, phase: Phase) -> None:
        """Measures the policy that `phase` has trained; after stage 1, scores the set by it and restores the base."""
        self._describe(phase, "measuring")
        held_out = self.trainer.eval_dataset is not None
        measures: dict[str, float] = {}
        if phase.stage == 1:
            # Before anything is sampled: it stops at a policy that is NaN
            measures = {f"set_{name}": value for name, value in self._score(phase.name).items()}
        samples = own_samples(self.trainer) if held_out else []
        if phase.stage == 1:
            if self.trainer.args.keep_teachers:
                folder = Path(self.trainer.args.output_dir, f"round-{phase.round}", phase.name)
                save_whole_policy(self.trainer, str(folder))
            self.base.restore()
            self.trainer.weights_have_changed()
            if held_out:
                measures |= measure_samples(self.trainer, samples, base_is_loaded=True)
        elif held_out:
            distilled = WeightsCopy(self.trainer).take()
            self.base.restore()
            try:
                measures = measure_samples(self.trainer, samples, base_is_loaded=True)
            finally:
                distilled.restore()
        else:
            measures = {f"set_{name}": value for name, value in self._score("distilled").items()}
        self._log(phase, {f"{phase.name}/{name}": value for name, value in measures.items()})
        if phase.policy == "teacher":
            self._warn_of_collapse(phase, measures)

    def _score(self, name: str) -> dict[str, float]:
        """
        The set under the policy as it is: `{name}_logps` joins its batches.

        Returns the entropy (nats a token), the divergence KL(base || policy), estimated on the set, which the base
        policy has sampled, and the mean log-ratio to the base of rollouts with a positive advantage, in nats.
        """
        assert self.fixed_set is not None
        trainer, sums = self.trainer, torch.zeros(7, dtype=torch.float64)
        with evaluating(trainer):
            for batch, mask in self.fixed_set.masks():
                on_device = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
                logps, entropies = (values.float().cpu() for values in trainer.score_micro_batch(on_device))
                batch[f"{name}_logps"] = logps
                mask = mask.bool()
                log_ratio = (logps - batch["base_logps"]).masked_fill(~mask, 0).double().sum(1)
                good = (batch["advantages"] > 0) & mask.any(1)
                sums += torch.stack(
                    [
                        entropies[mask].double().sum(),
                        mask.sum(),
                        -log_ratio.sum(),
                        mask.any(1).sum(),
                        log_ratio[good].sum(),
                        good.sum(),
                        logps[mask].isnan().sum(),
                    ]
                )
        entropy, tokens, kl, sequences, good_log_ratio, good_count, broken = reduced(trainer.accelerator, sums)
        if broken:
            raise ValueError(
                f"The log-probabilities of {name} are NaN on {broken:.0f} tokens of the set, so that its training has "
                "failed: lower the learning rate, or max_grad_norm."
            )
        return {
            "entropy": entropy / max(tokens, 1),
            "kl_per_sequence": kl / max(sequences, 1),
            "kl_per_token": kl / max(tokens, 1),
            "log_ratio_of_right": good_log_ratio / good_count if good_count else math.nan,
        }

    def _make_signal(self, phase: Phase) -> None:
        """What stage 2 distils joins the set, and what it was made of leaves it."""
        assert self.fixed_set is not None
        args = self.trainer.args
        logs: dict[str, float] = {}
        for batch in self.fixed_set.batches:
            batch["signal"] = torch.zeros_like(batch["base_logps"])
            batch["anchor_logps"] = batch["base_logps"]
        for teacher in teachers_of(args):
            signals, moments = [], torch.zeros(3, dtype=torch.float64)
            policies = SIGNALS[teacher.signal]
            names = {policy: "base" if policy == "base" else f"{policy}_{teacher.loss}" for policy in policies}
            for batch, mask in self.fixed_set.masks():
                logps = {policy: batch[f"{name}_logps"] for policy, name in names.items()}
                signals.append(token_signal(teacher.signal, logps, mask))
                moments += signal_moments(signals[-1], mask)
            mean, std = mean_and_std(reduced(self.trainer.accelerator, moments))
            normalized = partial(
                normalize_signal, mean=mean, std=std, normalization=args.signal_normalization, clip=args.signal_clip
            )
            for (batch, mask), signal in zip(self.fixed_set.masks(), signals, strict=True):
                batch["signal"] += teacher.weight * normalized(signal, mask)
            logs |= {f"signal_{teacher.loss}/mean": mean, f"signal_{teacher.loss}/std": std}
            if std < MIN_SIGNAL_STD:
                logger.warning(
                    f"The signal of {teacher.loss} has a standard deviation of {std:.1e} nats, which is no more than "
                    "rounding, so that nothing of it is distilled: raise extraction_learning_rate or "
                    "extraction_passes, or choose prompts whose rollouts differ in reward."
                )
        keep = {"base_logps", "anchor_logps", "sampling_per_token_logps"}
        for batch in self.fixed_set.batches:
            for name in [n for n in batch if n.endswith("_logps") and n not in keep]:
                del batch[name]
        self._log(phase, logs)

    def _warn_of_collapse(self, phase: Phase, measures: dict[str, float]) -> None:
        teacher = teachers_of(self.trainer.args)[phase.teacher]
        if teacher.signal != "teacher":
            return  # the unlearned policy is there for such teachers
        if "reward" in measures and "reward" in self.base_measures:
            base = self.base_measures
            collapsed = not measures["reward"] > base["reward"]
            finding = (
                f"is no better than the base policy (reward {measures['reward']:.3f} against {base['reward']:.3f}, "
                f"entropy {measures['entropy']:.3f} against {base['entropy']:.3f} nats a token, "
                f"{measures['kl_per_sequence']:.1f} nats a sequence away from it)"
            )
        else:
            collapsed = measures["set_log_ratio_of_right"] <= 0  # NaN where no rollout is better than another
            finding = (
                f"makes even the right rollouts less likely than the base policy does (by "
                f"{-measures['set_log_ratio_of_right']:.2f} nats a sequence)"
            )
        if collapsed:
            logger.warning(
                f"Round {phase.round}: the extreme region policy trained with {phase.loss} {finding}, so "
                "that what is distilled of it may be noise: set signal='unlearned_reference', or lower "
                "extraction_passes or extraction_learning_rate."
            )

    def _log(self, phase: Phase, values: dict[str, float]) -> None:
        self.trainer.log({**values, "round": phase.round, "stage": phase.stage})

    def _describe(self, phase: Phase, doing: str) -> None:
        what = "distillation" if phase.stage == 2 else f"extraction, {phase.policy} ({phase.loss})"
        self.trainer.describe(f"Round {phase.round}/{self.schedule.rounds}, stage {phase.stage}: {what}, {doing}")

    # ---- checkpoints

    def save(self, folder: str) -> None:
        """Writes the set, with everything measured on it, and the base policy."""
        if self.fixed_set is not None:
            metadata = {"run": json.dumps(self.trainer.run_identity()), "base": json.dumps(self.base_measures)}
            self.fixed_set.save(self._path(folder), metadata)
            self.base.save(folder)

    def load(self, folder: str) -> None:
        """Reads what `save` wrote, or stops: without its set and its base, a round cannot go on."""
        path, accelerator = self._path(folder), self.trainer.accelerator
        theirs = json.loads(read_metadata(path)["run"]) if path.exists() else None
        ours = self.trainer.run_identity()
        fits = torch.tensor([theirs == ours], device=accelerator.device)
        # All processes or none, or the others wait for ever
        if not accelerator.gather(fits).all():
            changes = "the fixed set is missing"
            if theirs is not None:
                names = [name for name in ours if theirs.get(name) != ours[name]]
                changes = ", ".join(f"{n} {theirs.get(n)} -> {ours[n]}" for n in names) or "on another process"
            raise ValueError(
                f"The run cannot go on with the checkpoint {folder} ({changes}): resume with the settings and the "
                "number of processes that it was written with, or start anew from its weights."
            )
        if self.trainer.state.global_step > self.schedule.steps:
            raise ValueError(
                f"The checkpoint {folder} is of update {self.trainer.state.global_step}, and a run of "
                f"{self.schedule.rounds} rounds has {self.schedule.steps}: set rounds to what it was, or more."
            )
        self.fixed_set = FixedSet.load(path)
        self.base_measures = json.loads(read_metadata(path)["base"])
        self.base.load(folder)

    def _path(self, folder: str) -> Path:
        return Path(folder) / f"fixed_set_{self.trainer.accelerator.process_index}.safetensors"


def newest_whole_checkpoint(output_dir: str, num_processes: int) -> str:
    """The newest checkpoint whose writing was finished; a run may be killed while it writes one."""
    folders = [(int(f.name.split("-")[1]), f) for f in Path(output_dir).glob("checkpoint-*") if f.name[11:].isdigit()]
    for _, folder in sorted(folders, reverse=True):
        files = ["trainer_state.json", *(f"fixed_set_{process}.safetensors" for process in range(num_processes))]
        if missing := [name for name in files if not (folder / name).exists()]:
            logger.warning(f"{folder} lacks {missing[0]} and is passed over: an earlier checkpoint is resumed from.")
            continue
        return str(folder)
    raise ValueError(f"There is no whole checkpoint in {output_dir} to resume from: train from the start.")
