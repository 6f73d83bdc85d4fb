"""Training runs of TrOPDTrainer: what moves, how often it generates and scores, and what it reports."""

import copy
import inspect

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl.experimental.gkd import GKDConfig, GKDTrainer
from tropd_runs import (
    assert_same,
    gradient,
    hash_rollouts,
    hashed_completion,
    make_trainer,
    micro_batches,
    settings,
    sums,
)

from trl_ext import TrOPDTrainer, next_token
from trl_ext.losses import forward_kl_top_k


@pytest.mark.parametrize("objective", ["tropd", "opd", "forward_kl", "eopd", "reopold"])
def test_training_moves_every_parameter_and_logs(tmp_path, objective):
    trainer = make_trainer(tmp_path, objective=objective)
    start = copy.deepcopy(trainer.model)
    trainer.train()
    for (name, value), old in zip(trainer.model.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(value, old), name
    common = {"loss", "entropy", "teacher/kl", "teacher/entropy", "completions/mean_length", "num_tokens"}
    own = {
        "tropd": {"outliers/share", "outliers/forward_kl", "teacher/top_k_mass"},
        "opd": set(),
        "forward_kl": {"teacher/forward_kl", "teacher/top_k_mass"},
        "eopd": {"uncertain/share", "uncertain/forward_kl", "teacher/top_k_mass"},
        "reopold": {"floored/share"},
    }
    for log in trainer.state.log_history[:-1]:
        assert log.keys() >= common | own[objective]
        assert log["completions/min_length"] <= log["completions/mean_length"] <= log["completions/max_length"] <= 10
        assert not any(name.startswith(("guidance", "off_policy")) for name in log)


@pytest.mark.slow
def test_distillation_approaches_the_teacher(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=60, learning_rate=1e-2, trust_region="expected", per_device_train_batch_size=16
    )
    trainer.train()
    kls = [log["teacher/kl"] for log in trainer.state.log_history[:-1]]
    assert sum(kls[-10:]) < 0.6 * sum(kls[:10]), (sum(kls[-10:]), sum(kls[:10]))


def test_the_arguments_are_those_of_gkd_in_the_same_order():
    ours = list(inspect.signature(TrOPDTrainer.__init__).parameters)
    assert ours == list(inspect.signature(GKDTrainer.__init__).parameters)


def test_a_plain_gkd_config(tmp_path):
    plain = settings(tmp_path)
    del plain["outlier_top_k"]
    args = GKDConfig(**plain)
    trainer = TrOPDTrainer(
        tiny.policy(), tiny.policy(seed=1), args, train_dataset=sums(), processing_class=tiny.tokenizer()
    )
    assert isinstance(trainer, GKDTrainer)
    assert (trainer.args.lmbda, trainer.args.temperature, trainer.args.outlier_top_k) == (0.5, 0.9, 64)
    trainer.train()
    shares = [log["off_policy/share"] for log in trainer.state.log_history[:-1]]
    assert 0 < sum(shares) / len(shares) < 1


def test_lora_moves_only_the_adapter(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("teacher", ["another model", "base"])
def test_a_compiled_student_with_an_adapter(tmp_path, teacher):
    """The wrapper of `torch.compile` is taken off before PEFT's."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    finals = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        teacher_model = tiny.policy(seed=1) if teacher != "base" else teacher
        trainer = make_trainer(tmp_path, tiny.policy(), teacher_model, peft_config=lora, **compiled)
        trainer.train()
        finals.append({n.replace("_orig_mod.", ""): value for n, value in trainer.model.named_parameters()})
    assert_same(*finals, rtol=0, atol=1e-6)


def test_an_adapter_as_teacher(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny.policy(), lora)
    model.add_adapter("expert", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    reference = copy.deepcopy(model)
    reference.set_adapter("expert")
    trainer = make_trainer(
        tmp_path, model, "expert", guidance="teacher", save_strategy="steps", save_steps=4, max_steps=4
    )
    batch = micro_batches(trainer, 4)[0]
    with torch.no_grad():
        expected = tiny.naive_logps(reference, batch)
    valid = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["teacher_logps"][valid], expected[valid], rtol=1e-4, atol=1e-5)
    start = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert moved
    assert all("lora_" in name and ".default." in name for name in moved)
    assert not (tmp_path / "checkpoint-4" / "expert").exists()
    assert not any("expert" in name for name in load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors"))


def test_seq_kd_takes_the_teachers_samples(tmp_path):
    trainer = make_trainer(tmp_path, lmbda=0.0, seq_kd=True, dataset=sums(completions=False))
    hash_rollouts(trainer)
    (batch,) = micro_batches(trainer, 8, 8)
    for row, prompt in enumerate(batch["prompt_ids"]):
        prompt = prompt[batch["prompt_mask"][row].bool()].tolist()
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        assert completion == hashed_completion([0, *prompt])
    assert batch["off_policy_mask"].equal(batch["completion_mask"])
    logps, _, _ = trainer._score(trainer.model, batch)
    per_token = forward_kl_top_k(logps[..., 1:], batch["top_k_logps"], with_tail=True)
    expected = per_token[batch["completion_mask"].bool()].mean()
    torch.testing.assert_close(gradient(trainer, [batch])[0], expected.detach())


# How often


def test_one_generation_and_one_pass_of_each_model_per_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=3)
    calls = {"generate": 0, "student": 0, "teacher": 0}
    generate = trainer.model.generate

    def counted_generate(*args, **kwargs):
        calls["generate"] += 1
        assert len(kwargs["input_ids"]) == 8  # all micro-batches of the step
        student = calls["student"]
        output = generate(*args, **kwargs)
        calls["student"] = student
        return output

    monkeypatch.setattr(trainer.model, "generate", counted_generate)
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        model.model.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    trainer.train()
    assert calls == {"generate": 3, "student": 12, "teacher": 12}  # one per micro-batch


def test_the_generations_of_a_prompt_are_adjacent(tmp_path):
    trainer = make_trainer(tmp_path, num_generations=4)
    seen = []
    sample = trainer.sampler.from_student
    trainer.sampler.from_student = lambda prompts, length: seen.append(prompts) or sample(prompts, length)
    trainer.train()
    for prompts in seen:
        assert prompts[:4] == [prompts[0]] * 4
        assert prompts[4:] == [prompts[4]] * 4
        assert prompts[0] != prompts[4]
    assert len({str(prompts[0]) for prompts in seen}) == 4  # continues through the shuffled data


def test_no_tensor_of_logits(tmp_path, monkeypatch):
    """The largest tensor of a step's loss and backward pass, with a vocabulary much larger than the model."""
    vocabulary, chunk = 3000, 4
    monkeypatch.setattr(next_token, "CHUNK_ELEMENTS", chunk * vocabulary)
    trainer = make_trainer(
        tmp_path,
        tiny.policy(vocab_size=vocabulary),
        tiny.policy(seed=1, vocab_size=vocabulary),
        max_new_tokens=24,
        per_device_train_batch_size=8,
    )
    trainer.sampler.from_student = lambda prompts, length: ([[5 + i % 40 for i in range(24)] for _ in prompts], None)
    largest = tiny.LargestTensor()
    with largest:
        gradient(trainer, micro_batches(trainer, 8, 8))
    assert largest.elements == 32 * vocabulary  # the embedding and its gradient
    assert largest.elements < 8 * 24 * vocabulary / 4


# Evaluation


def test_evaluation_samples_and_reports_the_kl(tmp_path):
    trainer = make_trainer(
        tmp_path, guidance="dataset", eval_dataset=sums(12, completions=False), per_device_eval_batch_size=4
    )
    logs = trainer.evaluate()
    assert logs["eval_loss"] > 0
    assert {"eval_teacher/kl", "eval_outliers/share", "eval_completions/mean_length"} <= logs.keys()
    assert "eval_guidance/share" not in logs  # the student samples from the first token on
    twin = make_trainer(tmp_path, teacher=tiny.policy(), eval_dataset=sums(12))
    assert abs(twin.evaluate()["eval_teacher/kl"]) < 1e-5


def test_the_evaluation_loss_is_the_mean_over_its_tokens(tmp_path):
    trainer = make_trainer(tmp_path, objective="opd", lmbda=0.0, eval_dataset=sums(8), per_device_eval_batch_size=8)
    hash_rollouts(trainer)  # completions of unequal length
    logs = trainer.evaluate()
    assert logs["eval_loss"] == pytest.approx(logs["eval_teacher/kl"], rel=1e-4)
    assert "eval_off_policy/share" not in logs  # the student samples, whatever lmbda is in training
    assert logs["eval_teacher/kl"] != 0


def test_evaluation_on_several_datasets(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"a": sums(4), "b": sums(4)})
    logs = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= logs.keys()


@pytest.mark.parametrize("named", [False, True])
def test_an_iterable_evaluation_set_is_not_dispatched(tmp_path, named):
    """The main process would put the others' batches together, which differ in length."""
    data = sums(4).to_iterable_dataset()
    trainer = make_trainer(tmp_path, eval_dataset={"a": data} if named else data)
    assert trainer.accelerator.dispatch_batches is False
    assert trainer.evaluate()


# Kinds of models


def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path):
    trainer = make_trainer(tmp_path, tiny.policy(moe=True), tiny.policy(moe=True, seed=1), trust_region="expected")
    assert trainer.aux_loss_enabled
    micro_batches(trainer, 8, 8)  # generate() cannot compute it
    hash_rollouts(trainer)
    batches = micro_batches(trainer, 8, 8)
    with_aux, _ = gradient(trainer, batches)
    ids = torch.cat([batches[0]["prompt_ids"], batches[0]["completion_ids"]], 1)
    mask = torch.cat([batches[0]["prompt_mask"], batches[0]["completion_mask"]], 1)
    aux = trainer.model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    trainer.aux_loss_enabled = False
    without, _ = gradient(trainer, batches)
    torch.testing.assert_close(with_aux - without, 0.1 * aux.detach(), rtol=1e-3, atol=1e-5)
    trainer.aux_loss_enabled = True
    in_four, _ = gradient(trainer, [*micro_batches(trainer, 8, 2)])
    # The mean of four, not their sum
    assert (in_four - without).item() == pytest.approx((with_aux - without).item(), rel=0.2)
    trainer.train()


def test_padded_vocabularies_of_different_size(tmp_path):
    size = tiny.policy().config.vocab_size
    teacher = tiny.policy(seed=1, vocab_size=size + 13)
    trainer = make_trainer(tmp_path, teacher=teacher, outlier_top_k=1000)
    (batch,) = micro_batches(trainer, 8, 8)
    assert batch["top_k_ids"].shape[-1] == size
    assert batch["top_k_ids"].max() < size
    assert (
        batch["top_k_logps"].exp().sum(-1)[batch["completion_mask"].bool()] < 1
    ).all()  # normalized over the teacher's whole vocabulary
    trainer.train()
    larger = make_trainer(tmp_path, tiny.policy(vocab_size=size + 13), tiny.policy(seed=1))
    larger.sampler.from_student = lambda prompts, length: (
        [[5, size + 3, 6, 1] for _ in prompts],  # one is outside the teacher's vocabulary
        None,
    )
    (batch,) = micro_batches(larger, 8, 8)
    assert batch["teacher_logps"].isinf().tolist() == [[False, True, False, False]] * 8
    larger.train()


def test_gradient_checkpointing_changes_nothing(tmp_path):
    finals = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing)
        hash_rollouts(trainer)
        trainer.train()
        finals.append(dict(trainer.model.named_parameters()))
    assert_same(*finals, rtol=1e-4, atol=1e-6)


def test_num_tokens_counts_prompts_and_completions(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    prompts = log["num_tokens"] - 8 * log["completions/mean_length"]
    assert 8 * 4 <= round(prompts) <= 8 * 6  # "7+1=" to "112+16="
