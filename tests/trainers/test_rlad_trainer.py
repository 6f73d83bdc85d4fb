"""RLADTrainer on tiny models: the loss, its configurations and metrics, what is refused."""

import pytest
import tiny
import torch
from tiny_rlad import make_trainer, rollout_batch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import RLADConfig, RLADTrainer


def train_and_compare(ours, theirs):
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    for (name, mine), (_, grpo) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, grpo, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for mine, grpo in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert mine["loss"] == pytest.approx(grpo["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(grpo["grad_norm"], rel=1e-4)


# ---- the loss


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "delta": 1.3, "loss_type": "grpo", "epsilon_high": 0.28}])
def test_alpha_one_is_grpo(path, teacher_path, tmp_path, settings):
    ours = make_trainer(path, tmp_path, teacher_path, teacher_mixture_alpha=1.0, **settings)
    train_and_compare(ours, make_trainer(path, tmp_path, None, GRPOConfig, GRPOTrainer, **settings))


def test_kdrl_without_a_coefficient_is_grpo(path, teacher_path, tmp_path):
    ours = make_trainer(path, tmp_path, teacher_path, distillation="kdrl", kdrl_coef=0.0)
    train_and_compare(ours, make_trainer(path, tmp_path, None, GRPOConfig, GRPOTrainer))


@pytest.mark.parametrize("region", ["ppo_clip", "spo"])
@pytest.mark.parametrize("distillation", ["trrd", "kdrl", "trrd_and_kdrl"])
def test_loss_of_the_objective(path, teacher_path, tmp_path, distillation, region):
    settings = {"distillation": distillation, "trust_region": region, "temperature": 0.7, "kdrl_coef": 0.3}
    settings |= {"trust_region_radius": 0.3} if region == "spo" else {"epsilon_high": 0.28}
    trainer = make_trainer(path, tmp_path, teacher_path, **settings)
    batch = rollout_batch(trainer)
    noise = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.3 * noise
    loss = trainer.compute_loss(trainer.model, batch)

    student = tiny.naive_logps(trainer.model, batch, 0.7)
    teacher = tiny.naive_logps(AutoModelForCausalLM.from_pretrained(teacher_path), batch, 0.7)
    old, advantages, mask = batch["old_per_token_logps"], batch["advantages"][:, None], batch["completion_mask"]
    log_ratio = student - old
    if "trrd" in distillation:
        log_ratio = 0.5 * log_ratio + 0.5 * (student - teacher).clamp(-1, 1)
    ratio = log_ratio.exp()
    if region == "spo":
        expected = advantages.abs() * (ratio - 1) ** 2 / 0.6 - ratio * advantages
    else:
        expected = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    if "kdrl" in distillation:
        expected = expected + 0.3 * 0.5 * (teacher - student) ** 2
    torch.testing.assert_close(loss.detach(), (expected * mask).sum() / mask.sum(), rtol=1e-4, atol=1e-5)


def test_kdrl_coefficient_is_annealed(path, teacher_path, tmp_path):
    settings = {"distillation": "kdrl", "kdrl_coef": 5e-3, "kdrl_coef_decay": 2e-3, "kdrl_coef_min": 1.5e-3}
    trainer = make_trainer(path, tmp_path, teacher_path, **settings)
    trainer.train()
    coefficients = [log["kdrl/coef"] for log in trainer.state.log_history[:-1]]
    assert coefficients == pytest.approx([5e-3, 3e-3, 1.5e-3, 1.5e-3])


def test_mixture_alpha_goes_linearly_to_its_end(path, teacher_path, tmp_path):
    settings = {"teacher_mixture_alpha": 0.4, "teacher_mixture_alpha_end": 1.0}
    trainer = make_trainer(path, tmp_path, teacher_path, **settings)
    trainer.train()
    alphas = [log["teacher/mixture_alpha"] for log in trainer.state.log_history[:-1]]
    assert alphas == pytest.approx([0.4, 0.6, 0.8, 1.0])
    # which is what the loss takes: GRPO's at the end
    batch = rollout_batch(trainer)
    trainer.state.global_step = 3
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.args.teacher_mixture_alpha, trainer.args.teacher_mixture_alpha_end = 1.0, None
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), loss)


@pytest.mark.parametrize("mask", ["none", "response", "group"])
def test_reward_guided_masking(path, teacher_path, tmp_path, mask):
    def reward(completions, **kwargs):  # in the first of the two groups, the second response is correct
        return [0.0, 1.0, 0.0, 0.5, 0.0, 0.25, 0.5, 0.75]

    # steps_per_generation 1 and one process: the batch is the two groups, shuffled
    trainer = make_trainer(
        path, tmp_path, teacher_path, distillation="kdrl", kdrl_mask=mask, kdrl_coef=10.0, reward_funcs=reward
    )
    batch = rollout_batch(trainer)
    distilled = batch["distilled"].squeeze(1)
    assert distilled.sum() == {"none": 8, "response": 7, "group": 4}[mask]
    advantages = batch["advantages"]
    first_group_correct = advantages.argmax() if mask == "response" else None
    if mask == "response":
        assert distilled[first_group_correct] == 0
    base = make_trainer(path, tmp_path, teacher_path, distillation="kdrl", kdrl_coef=0.0)
    base.current_gradient_accumulation_steps = 1
    base.model.train()
    penalty = trainer.compute_loss(trainer.model, batch) - base.compute_loss(base.model, batch)
    student = tiny.naive_logps(trainer.model, batch)
    teacher = batch["teacher_per_token_logps"]
    tokens = batch["completion_mask"]
    expected = 10 * (0.5 * (teacher - student) ** 2 * tokens * distilled[:, None]).sum() / tokens.sum()
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-4, atol=1e-4)


# ---- configurations, metrics


def test_a_plain_grpo_config_has_the_defaults(path, teacher_path, tmp_path):
    trainer = make_trainer(path, tmp_path, teacher_path, config_class=GRPOConfig)
    assert isinstance(trainer.args, RLADConfig)
    assert (trainer.args.teacher_mixture_alpha, trainer.args.teacher_mixture_alpha_end) == (0.5, 1.0)
    assert trainer.args.teacher_log_ratio_clip == 1.0
    trainer.train()


TEACHER_METRICS = {"teacher/log_ratio", "teacher/log_ratio_abs"}
VETOES = {"teacher/veto_positive", "teacher/veto_negative"}
TRRD_METRICS = TEACHER_METRICS | VETOES | {"teacher/clamped", "teacher/mixture_alpha"}
CLIPPED_ANYWAY = {f"clip_ratio/{clip}_mean" for clip in ("low", "high", "region")}
KDRL_METRICS = TEACHER_METRICS | {"teacher/penalty", "kdrl/coef"}
REGION_METRICS = {f"outside_region/{sign}" for sign in ("positive", "negative")} | {"regularizer"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, TRRD_METRICS | CLIPPED_ANYWAY | {"policy_drift", "policy_drift_abs"}),
        ({"teacher_mixture_alpha_end": 0.5, "num_iterations": 1}, TRRD_METRICS - {"teacher/mixture_alpha"}),
        ({"num_iterations": 1}, TRRD_METRICS),
        ({"teacher_log_ratio_clip": None, "num_iterations": 1}, TRRD_METRICS - {"teacher/clamped"}),
        ({"distillation": "kdrl", "num_iterations": 1}, KDRL_METRICS),
        ({"distillation": "kdrl", "kdrl_mask": "group", "num_iterations": 1}, KDRL_METRICS | {"kdrl/distilled"}),
        ({"distillation": "trrd_and_kdrl", "num_iterations": 1}, TRRD_METRICS | KDRL_METRICS),
        (
            {"trust_region": "drpo", "num_iterations": 1},
            TEACHER_METRICS | REGION_METRICS | {"teacher/clamped", "teacher/mixture_alpha"},
        ),
    ],
)
def test_metrics(path, teacher_path, tmp_path, settings, expected):
    trainer = make_trainer(path, tmp_path, teacher_path, **settings)
    trainer.train()
    logs = trainer.state.log_history[:-1]
    prefixes = ("teacher/", "policy_drift", "kdrl/", "clip_ratio/", "outside_region", "regularizer")
    for log in logs:
        assert {n for n in log if n.startswith(prefixes)} == expected
    # the student's own samples: the mean log-ratio estimates the KL divergence, which is positive for other models
    assert all(log["teacher/log_ratio_abs"] >= log["teacher/log_ratio"] > 0 for log in logs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mixture_alpha": 1.5}, r"must be from 0 \(the teacher alone\) to 1"),
        ({"teacher_mixture_alpha": -0.1}, "must be from 0"),
        ({"teacher_mixture_alpha_end": 1.5}, "teacher_mixture_alpha_end=1.5 must be"),
        ({"teacher_log_ratio_clip": 0.0}, "must be positive: set it above 0, in nats, or to None"),
        ({"trust_region": "kl"}, "set it to one of 'drpo', 'spo'"),
        ({"distillation": "kd"}, "one of 'trrd', 'kdrl'"),
        ({"kdrl_estimator": "k1"}, "one of 'k2', 'k3'"),
        ({"kdrl_mask": "all"}, "one of 'none', 'response', 'group'"),
        ({"kdrl_coef": -1.0}, "would push the student away from its teacher"),
        ({"loss_type": "sapo"}, "set it to one of 'grpo'"),
        ({"importance_sampling_level": "sequence"}, "set it to 'token'"),
    ],
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RLADConfig(**tiny.grpo_settings(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({}, None),
        ({"distillation": "kdrl", "kdrl_coef": 0.1}, None),
        ({"distillation": "trrd_and_kdrl", "kdrl_coef": 0.1, "teacher_mixture_alpha": 0.8}, None),
        ({"kdrl_coef": 0.1}, "kdrl_coef=0.1 has no effect with distillation='trrd'"),
        ({"distillation": "kdrl", "teacher_mixture_alpha": 0.8}, "teacher_mixture_alpha=0.8 has no effect"),
        ({"distillation": "kdrl", "kdrl_correct_reward": 0.5}, "kdrl_correct_reward=0.5 has no effect"),
        ({"trust_region": "drpo", "epsilon": 0.1}, "epsilon=0.1 has no effect with trust_region='drpo'"),
    ],
)
def test_settings_without_an_effect_are_named(path, tmp_path, caplog, settings, unused):
    make_trainer(path, tmp_path, path, **settings)
    assert ("has no effect" in caplog.text) == (unused is not None)
    assert unused is None or unused in caplog.text


def test_the_rewards_of_a_subclass_mask_the_penalty(path, teacher_path, tmp_path):
    """It replaces TRL's calculation, and does not call it."""

    class Own(RLADTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = torch.tensor([[1.0], [0.0]] * (len(completions) // 2))
            return self.accelerator.gather(rewards)

    trainer = Own(
        path,
        tiny.digits_reward,
        RLADConfig(**tiny.grpo_settings(tmp_path, distillation="kdrl", kdrl_mask="response", max_steps=1)),
        tiny.prompts(),
        teacher_model=teacher_path,
    )
    trainer.train()
    assert trainer.rewards.tolist() == [1.0, 0.0] * 4
    assert 0 < trainer.state.log_history[0]["kdrl/distilled"] < 1


def test_no_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"RLADTrainer needs a teacher: pass teacher_model"):
        make_trainer("no such model", tmp_path)


def test_the_student_cannot_be_its_own_teacher(tmp_path):
    model = tiny.policy()
    with pytest.raises(ValueError, match="is the student itself"):
        make_trainer(model, tmp_path, model, processing_class=tiny.tokenizer())


@pytest.mark.supports("rlad", "one process: resuming")
def test_resume_is_exact(path, teacher_path, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "distillation": "kdrl", "kdrl_coef": 0.1}
    whole = make_trainer(path, tmp_path, teacher_path, **settings)
    whole.train()
    resumed = make_trainer(path, tmp_path / "resumed", teacher_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_rollouts_of_another_distillation_are_not_used(path, teacher_path, tmp_path, caplog):
    make_trainer(path, tmp_path, teacher_path, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(path, tmp_path / "resumed", teacher_path, distillation="kdrl")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "so that new ones are sampled" in caplog.text
    assert resumed.state.global_step == 4


@pytest.mark.slow
def test_student_moves_toward_its_teacher(path, tmp_path):
    """With equal rewards only KDRL's penalty trains: the distance to the teacher shrinks."""
    teacher = tiny.policy()  # the student, shaken
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer = make_trainer(
        path,
        tmp_path,
        teacher,
        distillation="kdrl",
        kdrl_coef=1.0,
        max_steps=60,
        num_iterations=1,
        per_device_train_batch_size=16,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    )
    trainer.train()
    distances = [log["teacher/log_ratio"] for log in trainer.state.log_history[:-1]]
    assert sum(distances[-5:]) < 0.5 * sum(distances[:5])
