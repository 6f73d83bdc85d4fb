"""What happens between the stages of ERPD: sampling, scoring, measuring, restoring the base policy."""

import json
from pathlib import Path
from typing import Any

import torch

from trl_ext.erpd.base_policy import WeightsCopy, clear_optimizer_state, save_whole_policy
from trl_ext.erpd.fixed_set import FixedSet
from trl_ext.erpd.growing_set import remove_rollouts
from trl_ext.erpd.host import Host
from trl_ext.erpd.measures import measure_samples, own_samples
from trl_ext.erpd.sampling import make_fixed_set, sample_rollouts
from trl_ext.erpd.schedule import Phase, Schedule, teachers_of
from trl_ext.erpd.scoring import (
    log_ratio_to_sampler,
    make_signal,
    score_set,
    warn_of_collapse,
    warn_of_strange_rollouts,
)
from trl_ext.rollout_checkpoint import read_metadata


class Stages:
    """
    The round that a run of [`ERPDTrainer`] is in: its fixed set, its base policy, and the work between its phases.

    That work is done when a phase begins with its first micro-batch, so that a checkpoint that is written after the
    last update of a phase holds the phase as it ended, and a run that resumes from it does the work again.

    Args:
        host ([`~trl_ext.erpd.host.Host`]):
            The trainer.
        schedule ([`~trl_ext.erpd.schedule.Schedule`]):
            The phases of the run.
    """

    def __init__(self, host: Host, schedule: Schedule) -> None:
        self.host = host
        self.schedule = schedule
        self.fixed_set: FixedSet | None = None
        self.base = WeightsCopy(host.trainer)
        self.base_measures: dict[str, float] = {}
        self.resume_from: str | None = None  # the output directory of the run that is resumed
        self._pass: tuple[int, list[int]] | None = None  # the current pass, and its order of the batches
        self._begun: int | None = None  # the pass whose beginning this process has seen

    # ---- the updates

    def begin(self, step: int, index: int) -> bool:
        """
        Must be called before micro-batch `index` of the pass that optimizer step `step` is in. Does what is to be done
        between phases, and returns whether there is something to train on: a round without information is skipped.
        """
        number = step // self.schedule.steps_per_pass
        if index == 0 and step % self.schedule.steps_per_pass == 0:
            self._begin_pass(number)
            self._begun = number
        elif self._begun not in (None, number):  # a run that resumes within a pass has begun none
            raise ValueError(
                "A callback has ended a pass over the set early (control.should_epoch_stop), but every stage needs "
                "whole passes: end the whole run instead (control.should_training_stop)."
            )
        return not self._skips

    @property
    def _skips(self) -> bool:
        assert self.fixed_set is not None  # sampled by the first pass, or loaded from the checkpoint
        return not self.fixed_set.is_informative

    def micro_batch(self, step: int, index: int) -> dict[str, Any]:
        """Inputs of the loss for micro-batch `index` of the pass that optimizer step `step` is in."""
        assert self.fixed_set is not None
        number = step // self.schedule.steps_per_pass
        if self._pass is None or self._pass[0] != number:
            self._pass = number, self.fixed_set.order(self.host.trainer.args.seed * 1_000_003 + number)
        batch = self.fixed_set.micro_batch(self._pass[1][index], self.host.trainer.accelerator.device)
        return self._loss_inputs(batch, self.schedule.passes[number][0])

    def _loss_inputs(self, batch: dict[str, Any], phase: Phase) -> dict[str, Any]:
        assert self.fixed_set is not None
        args, sampler_logps = self.host.trainer.args, batch.pop("sampling_per_token_logps", None)
        batch["old_per_token_logps"] = batch["anchor_logps"] if phase.stage == 2 else batch["base_logps"]
        if phase.stage == 1 and sampler_logps is not None and self.host.uses_sampler_logps:
            known = sampler_logps.isfinite()
            batch["old_per_token_logps"] = torch.where(known, sampler_logps, batch["base_logps"])
        if phase.stage == 2:
            batch["ref_per_token_logps"] = batch["base_logps"]
        # Every token of the set has the same weight: the mean number of tokens in an accumulation window of TRL's
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
        elif phase.stage == 2 and self.host.trainer.args.distillation_anchor == "pass" and not self._skips:
            self._score("anchor")
        self._describe(phase, f"pass {pass_of_phase + 1}/{phase.passes}")

    def _begin_phase(self, phase: Phase, new_round: bool) -> None:
        if new_round:
            self._begin_round(phase)
        if self._skips:
            return
        clear_optimizer_state(self.host.trainer.optimizer)
        self.host.restart_learning_rate()
        if phase.stage == 2:
            assert self.fixed_set is not None
            self._log(phase, make_signal(self.host, self.fixed_set))

    def _begin_round(self, phase: Phase) -> None:
        self.base.take()
        self._describe(phase, "sampling the set")
        stored = self.host.stored_rollouts()
        rollouts = stored or sample_rollouts(self.host, phase.round, self.schedule.rounds, self.resume_from)
        self.fixed_set, facts = make_fixed_set(self.host, rollouts, phase.round)
        self.base_measures = {}
        if not self._skips:
            scores = self._score("base")
            facts["base/set_entropy"] = scores["entropy"]  # its divergence from itself is 0
            facts |= log_ratio_to_sampler(self.host, self.fixed_set)
            if stored:
                facts["base/set_cross_entropy"] = scores["cross_entropy"]
                warn_of_strange_rollouts(scores)
            if self._has_held_out:
                self._describe(phase, "measuring the base policy")
                self.base_measures = measure_samples(self.host, own_samples(self.host), base_is_loaded=False)
        self._log(phase, facts | {f"base/{name}": value for name, value in self.base_measures.items()})

    def end_phase(self, phase: Phase) -> None:
        """Measures the policy that `phase` has trained; after stage 1, scores the set by it and restores the base."""
        if not self._skips:
            self._describe(phase, "measuring")
            measures = self._end_extraction(phase) if phase.stage == 1 else self._end_distillation()
            self._log(phase, {f"{phase.name}/{name}": value for name, value in measures.items()})
            teacher = teachers_of(self.host.trainer.args)[phase.teacher]
            # The signals with an unlearned policy are there for teachers that have collapsed
            if phase.policy == "teacher" and teacher.signal == "teacher":
                warn_of_collapse(phase.round, phase.loss, measures, self.base_measures)
        if phase.stage == 2:
            trainer = self.host.trainer
            remove_rollouts(str(trainer.args.output_dir), phase.round, trainer.accelerator)

    def _end_extraction(self, phase: Phase) -> dict[str, float]:
        # Before anything is sampled, because it stops at a policy that is NaN
        scores = self._score(phase.name)
        measures = {f"set_{name}": value for name, value in scores.items() if name != "cross_entropy"}
        samples = own_samples(self.host) if self._has_held_out else []
        trainer = self.host.trainer
        if trainer.args.keep_teachers:
            save_whole_policy(trainer, str(Path(trainer.args.output_dir, f"round-{phase.round}", phase.name)))
        self.base.restore()
        self.host.weights_have_changed()
        if self._has_held_out:
            measures |= measure_samples(self.host, samples, base_is_loaded=True)
        return measures

    def _end_distillation(self) -> dict[str, float]:
        if not self._has_held_out:
            scores = self._score("distilled")
            return {f"set_{name}": value for name, value in scores.items() if name != "cross_entropy"}
        samples = own_samples(self.host)
        distilled = WeightsCopy(self.host.trainer).take()
        self.base.restore()
        try:
            return measure_samples(self.host, samples, base_is_loaded=True)
        finally:
            distilled.restore()

    @property
    def _has_held_out(self) -> bool:
        return self.host.trainer.eval_dataset is not None

    def _score(self, name: str) -> dict[str, float]:
        assert self.fixed_set is not None
        return score_set(self.host, self.fixed_set, name)

    def _log(self, phase: Phase, values: dict[str, float]) -> None:
        self.host.trainer.log({**values, "round": phase.round, "stage": phase.stage})

    def _describe(self, phase: Phase, doing: str) -> None:
        what = "distillation" if phase.stage == 2 else f"extraction, {phase.policy} ({phase.loss})"
        self.host.describe(f"Round {phase.round}/{self.schedule.rounds}, stage {phase.stage}: {what}, {doing}")

    # ---- checkpoints

    def save(self, folder: str) -> None:
        """Writes the set, with everything measured on it, and the base policy."""
        if self.fixed_set is not None:
            metadata = {"run": json.dumps(self.host.identity()), "base": json.dumps(self.base_measures)}
            self.fixed_set.save(self._path(folder), metadata)
            self.base.save(folder)

    def load(self, folder: str) -> None:
        """Reads what `save` wrote. Raises a `ValueError` if it does not fit: a round needs its set and base."""
        path, trainer = self._path(folder), self.host.trainer
        theirs = json.loads(read_metadata(path)["run"]) if path.exists() else None
        ours = json.loads(json.dumps(self.host.identity()))  # as JSON has it
        fits = torch.tensor([theirs == ours], device=trainer.accelerator.device)
        # Either all processes raise or none does: otherwise some would wait for the others forever
        if not trainer.accelerator.gather(fits).all():
            changes = "the fixed set is missing"
            if theirs is not None:
                names = [name for name in ours if theirs.get(name) != ours[name]]
                changes = ", ".join(f"{n} {theirs.get(n)} -> {ours[n]}" for n in names) or "on another process"
            raise ValueError(
                f"The run cannot continue from the checkpoint {folder} ({changes}): resume with the settings and the "
                "number of processes that it was written with, or start a new run from its weights."
            )
        if trainer.state.global_step > self.schedule.steps:
            raise ValueError(
                f"The checkpoint {folder} is of update {trainer.state.global_step}, and a run of "
                f"{self.schedule.rounds} rounds has {self.schedule.steps}: set rounds to what it was, or more."
            )
        self.fixed_set = FixedSet.load(path)
        self.base_measures = json.loads(read_metadata(path)["base"])
        self.base.load(folder)
        self._begun = self._pass = None  # of a run that this object was trained in before

    def _path(self, folder: str) -> Path:
        return Path(folder) / f"fixed_set_{self.host.trainer.accelerator.process_index}.safetensors"
