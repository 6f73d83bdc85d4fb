"""RLADTrainer on tiny models: the teacher in every form, the loss, what is refused."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import RLADConfig, RLADTrainer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    """Another model, of another size, with a padded vocabulary."""
    return tiny.save_policy(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=48, vocab_size=64)


def make_trainer(model, tmp_path, teacher_model=None, config_class=RLADConfig, trainer_class=RLADTrainer, **kwargs):
    names = ("peft_config", "rollout_func", "processing_class", "reward_funcs")
    arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
    args = config_class(**tiny.grpo_settings(tmp_path, **kwargs))
    if trainer_class is RLADTrainer:
        arguments["teacher_model"] = teacher_model
    reward = arguments.pop("reward_funcs", tiny.digits_reward)
    return trainer_class(model, reward, args, tiny.prompts(), **arguments)


def rollout_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])


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


# ---- the teacher, in every form


def test_teacher_scores_once_a_rollout_batch_in_micro_batches(path, teacher_path, tmp_path):
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 8}
    trainer = make_trainer(path, tmp_path, teacher_path, **settings)
    sizes = []
    trainer.teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert sizes == [4, 4, 4, 4]  # 16 completions, used for 8 updates


@pytest.mark.parametrize("form", ["path", "model", "config", "peft model"])
def test_teacher_forms_give_the_same_scores(path, teacher_path, tmp_path, form):
    model = AutoModelForCausalLM.from_pretrained(teacher_path)
    teacher = {"path": teacher_path, "model": model, "config": None}.get(form)
    if form == "peft model":
        teacher = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    settings = {"teacher_model_name_or_path": teacher_path} if form == "config" else {}
    trainer = make_trainer(path, tmp_path, teacher, temperature=0.7, **settings)
    batch = rollout_batch(trainer)
    expected = tiny.naive_logps(AutoModelForCausalLM.from_pretrained(teacher_path), batch, 0.7)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_top_k_of_the_next_token(path, teacher_path, tmp_path, batch_size):
    trainer = make_trainer(path, tmp_path, teacher_path, temperature=0.7)
    batch = rollout_batch(trainer)
    scores = trainer.teacher.next_tokens(batch, 5, batch_size)
    expected = tiny.all_logps(AutoModelForCausalLM.from_pretrained(teacher_path), batch, 0.7).topk(5)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(scores.top_k_logps[mask], expected.values[mask], rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.top_k_ids[mask], expected.indices[mask])
    assert not scores.top_k_logps.requires_grad
    # in the same pass, what sampled_logps() says
    torch.testing.assert_close(scores.logps[mask], batch["teacher_per_token_logps"][mask], rtol=1e-4, atol=1e-5)


def test_teacher_is_frozen_and_not_saved(path, teacher_path, tmp_path):
    trainer = make_trainer(path, tmp_path, teacher_path, save_strategy="steps", save_steps=4)
    before = {name: value.clone() for name, value in trainer.teacher.model.named_parameters()}
    trainer.train()
    assert not trainer.teacher.model.training
    for name, value in trainer.teacher.model.named_parameters():
        assert torch.equal(value, before[name])
        assert not value.requires_grad
        assert value.grad is None
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(value) for value in trainer.teacher.model.parameters()}
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(saved) <= {name for name, _ in trainer.model.named_parameters()}


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_a_teacher_is_wrapped_as_trl_wraps_a_reference_model(path, teacher_path, tmp_path, monkeypatch, backend):
    """Under FSDP, which cannot run here, and DeepSpeed: by TRL's own function, once the head is fused."""
    trainer = make_trainer(path, tmp_path, teacher_path)
    wrapped = []
    prepare = lambda model, accelerator: wrapped.append(model) or "wrapped"  # noqa: E731
    monkeypatch.setattr(f"trl_ext.teacher.model.prepare_{backend}", prepare)
    monkeypatch.setattr(trainer, f"is_{backend}_enabled", True)
    teacher = type(trainer.teacher)(teacher_path)
    teacher.prepare(trainer)
    assert teacher.model == "wrapped"
    assert not wrapped[0].training
    assert not any(p.requires_grad for p in wrapped[0].parameters())
    assert "fused" in wrapped[0].forward.__func__.__code__.co_name


def test_lora_student_with_a_full_teacher(path, teacher_path, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(path, tmp_path, teacher_path, peft_config=lora, beta=0.05)
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def adapter_student(path, teacher="expert"):
    """A base model with two adapters: the student's, fresh, and a random one to be the teacher."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    model.add_adapter(
        teacher, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    )
    for name, parameter in model.named_parameters():  # as after `is_trainable=True`
        if f"lora_A.{teacher}." in name or f"lora_B.{teacher}." in name:
            parameter.requires_grad_(True)
    return model


def test_adapter_teacher(path, tmp_path):
    model = adapter_student(path)
    reference = adapter_student(path)
    reference.set_adapter("expert")
    reference.eval()
    trainer = make_trainer(
        model, tmp_path, "expert", processing_class=tiny.tokenizer(), save_strategy="steps", save_steps=4
    )
    batch = rollout_batch(trainer)
    mask = batch["completion_mask"].bool()
    expected = tiny.naive_logps(reference, batch)
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-5)
    scores = trainer.teacher.next_tokens(batch, 3, 8)
    torch.testing.assert_close(
        scores.top_k_logps[mask],
        tiny.all_logps(reference, batch).topk(3).values[mask],
        rtol=1e-4,
        atol=1e-5,
    )
    assert trainer.model.training
    assert trainer.model.active_adapters == ["default"]

    trainer._buffered_inputs = None
    start = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name, _ in model.named_parameters() if ".default." in name}
    # neither the teacher's weights nor its folder are in the checkpoint, and the adapter is still there
    checkpoint = tmp_path / "checkpoint-4"
    assert not any("expert" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    assert not (checkpoint / "expert").exists()
    assert "expert" in model.peft_config
    assert isinstance(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), checkpoint), PeftModel)


def test_a_teachers_adapter_may_have_the_name_of_a_layer(path, tmp_path):
    """Freezing it must not freeze the student's adapter, whose parameters' names hold `.layers.` too."""
    model = adapter_student(path, teacher="layers")
    trainer = make_trainer(model, tmp_path, "layers", processing_class=tiny.tokenizer())
    start = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name, _ in model.named_parameters() if ".default." in name}


def test_the_trained_adapter_cannot_be_the_teacher(path, tmp_path):
    with pytest.raises(ValueError, match="is the one that is trained: activate"):
        make_trainer(adapter_student(path), tmp_path, "default", processing_class=tiny.tokenizer())


# ---- ends of sequence, tokenizers, vocabularies


def other_end(tmp_path, seed=1):
    """A model of the same tokens whose chat format ends with another one (`)`) than `<eos>`."""
    end = tiny.tokenizer().convert_tokens_to_ids(")")
    model = tiny.policy(seed, eos_token_id=end)
    model.generation_config.eos_token_id = end
    model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = ")"
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_teacher_has_no_opinion_of_ends_that_it_does_not_use(path, tmp_path):
    teacher = other_end(tmp_path / "teacher")

    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        output["completion_ids"] = [[*ids[:4], 1] for ids in output["completion_ids"]]  # all end with <eos>
        output["logprobs"] = None
        return output

    trainer = make_trainer(path, tmp_path, teacher, rollout_func=rollout)
    batch = rollout_batch(trainer)
    ends = batch["completion_ids"] == 1
    scores = batch["teacher_per_token_logps"]
    assert ends.any(dim=1).all()
    assert scores[ends].isnan().all()
    assert scores[~ends].isfinite().all()
    # with a teacher that ends the same way nothing is left out
    same = rollout_batch(make_trainer(path, tmp_path, path, rollout_func=rollout))
    assert same["teacher_per_token_logps"].isfinite().all()
    trainer.train()
    share = [log["teacher/neutral"] for log in trainer.state.log_history[:-1]]
    assert all(0 < value <= 0.5 for value in share)


def test_another_tokenizer_is_refused_before_any_model(path, tmp_path):
    tokenizer = tiny.tokenizer()
    first = tokenizer.convert_tokens_to_ids("a")
    state = tokenizer.backend_tokenizer.to_str().replace(f'"a":{first}', f'"%":{first}')
    broken = type(tokenizer)(tokenizer_object=Tokenizer.from_str(state), pad_token="<pad>", eos_token="<eos>")
    broken.save_pretrained(tmp_path / "teacher")  # there are no weights in this folder: none are loaded
    tiny.policy().config.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=f"the first difference being token {first}") as error:
        make_trainer(path, tmp_path, str(tmp_path / "teacher"))
    assert path in str(error.value)
    assert str(tmp_path / "teacher") in str(error.value)


def test_a_teacher_that_knows_more_tokens_is_fine(path, tmp_path):
    model = tiny.policy(1, vocab_size=80)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    make_trainer(path, tmp_path, str(tmp_path / "teacher")).train()


def test_a_teacher_with_too_small_a_vocabulary_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="has a vocabulary of 40 and cannot score"):
        make_trainer(path, tmp_path, tiny.policy(1, vocab_size=40))


# ---- configurations, metrics


def test_a_plain_grpo_config_has_the_defaults(path, teacher_path, tmp_path):
    trainer = make_trainer(path, tmp_path, teacher_path, config_class=GRPOConfig)
    assert isinstance(trainer.args, RLADConfig)
    assert (trainer.args.teacher_mixture_alpha, trainer.args.teacher_log_ratio_clip) == (0.5, 1.0)
    trainer.train()


TEACHER_METRICS = {"teacher/log_ratio", "teacher/log_ratio_abs"}
TRRD_METRICS = TEACHER_METRICS | {"teacher/veto_positive", "teacher/veto_negative", "teacher/clamped"}
KDRL_METRICS = TEACHER_METRICS | {"teacher/penalty", "kdrl/coef"}
REGION_METRICS = {f"outside_region/{sign}" for sign in ("positive", "negative")} | {"regularizer"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, TRRD_METRICS | {"policy_drift", "policy_drift_abs"}),
        ({"num_iterations": 1}, TRRD_METRICS),
        ({"teacher_log_ratio_clip": None, "num_iterations": 1}, TRRD_METRICS - {"teacher/clamped"}),
        ({"distillation": "kdrl", "num_iterations": 1}, KDRL_METRICS),
        ({"distillation": "kdrl", "kdrl_mask": "group", "num_iterations": 1}, KDRL_METRICS | {"kdrl/distilled"}),
        ({"distillation": "trrd_and_kdrl", "num_iterations": 1}, TRRD_METRICS | KDRL_METRICS),
        (
            {"trust_region": "drpo", "num_iterations": 1},
            TEACHER_METRICS | REGION_METRICS | {"teacher/clamped"},
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
        ({"teacher_log_ratio_clip": 0.0}, "must be a positive number of nats, or None"),
        ({"trust_region": "kl"}, "set it to one of 'drpo', 'spo'"),
        ({"distillation": "kd"}, "one of 'trrd', 'kdrl'"),
        ({"kdrl_estimator": "k1"}, "one of 'k2', 'k3'"),
        ({"kdrl_mask": "all"}, "one of 'none', 'response', 'group'"),
        ({"kdrl_coef": -1.0}, "must be 0 or more"),
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


def test_rollouts_of_another_distillation_are_sampled_anew(path, teacher_path, tmp_path, caplog):
    make_trainer(path, tmp_path, teacher_path, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(path, tmp_path / "resumed", teacher_path, distillation="kdrl")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "so that new ones are sampled" in caplog.text
    assert resumed.state.global_step == 4


def test_student_moves_toward_its_teacher(path, tmp_path):
    """With equal rewards there is nothing but the teacher in KDRL: the distance to it shrinks."""
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
