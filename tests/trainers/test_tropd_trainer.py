"""Training runs of TrOPDTrainer: what it computes, on which tokens, how often, and compared with GKD."""

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
from trl_ext.losses import (
    forward_kl_top_k,
    tropd_loss,
)
from trl_ext.tropd.prompts import PromptCollator


@pytest.mark.parametrize("objective", ["tropd", "opd", "eopd", "reopold"])
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
        "eopd": {"uncertain/share", "uncertain/forward_kl", "teacher/top_k_mass"},
        "reopold": {"floored/share"},
    }
    for log in trainer.state.log_history[:-1]:
        assert log.keys() >= common | own[objective]
        assert log["completions/min_length"] <= log["completions/mean_length"] <= log["completions/max_length"] <= 10
        assert not any(name.startswith(("guidance", "off_policy")) for name in log)


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


# Which log-probability belongs to which token


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_log_probability_belongs_to_its_token(tmp_path, side):
    """Rows of unequal length against each row alone, unpadded, through the model's own forward."""
    teacher = tiny.policy(seed=1)
    trainer = make_trainer(tmp_path, teacher=copy.deepcopy(teacher), temperature=0.7)
    if side == "right":  # as from a collator that pads on the right
        trainer.data_collator = lambda rows: {
            k: to_the_right(v) for k, v in PromptCollator(tiny.tokenizer())(rows).items()
        }
        batches = PromptCollator(tiny.tokenizer())([trainer.train_dataset[i] for i in range(8)])
        assert (to_the_right(batches["prompts"])[:, 0] != 0).all()
    hash_rollouts(trainer)
    prompts = [tiny.tokenizer()(trainer.train_dataset[i]["prompt"])["input_ids"] for i in range(8)]
    (batch,) = micro_batches(trainer, 8, 8)
    logps, entropy, _ = trainer._score(trainer.model, batch)
    lengths = set()
    for row, prompt in enumerate(prompts):
        completion = hashed_completion(prompt)
        lengths.add((len(prompt), len(completion)))
        n = len(completion)
        assert batch["completion_mask"][row].sum() == n
        if not n:
            continue
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            student = (trainer.model(input_ids=ids).logits[0, -n - 1 : -1] / 0.7).log_softmax(-1)
            theirs = (teacher(input_ids=ids).logits[0, -n - 1 : -1] / 0.7).log_softmax(-1)
        close = {"rtol": 1e-4, "atol": 1e-5}
        columns = torch.cat([torch.tensor(completion)[:, None], theirs.topk(8).indices], 1)
        torch.testing.assert_close(logps[row, :n].detach(), student.gather(1, columns), **close)
        torch.testing.assert_close(entropy[row, :n], -(student.exp() * student).sum(-1), **close)
        torch.testing.assert_close(batch["teacher_logps"][row, :n], theirs.gather(1, columns[:, :1])[:, 0], **close)
        torch.testing.assert_close(batch["top_k_logps"][row, :n], theirs.topk(8).values, **close)
    assert len(lengths) > 5


def to_the_right(tensor):
    """Left-padded rows, right-padded."""
    padding = -100 if (tensor == -100).any() else 0
    rows = []
    for row in tensor:
        kept = row[int((row != padding).int().argmax()) :] if padding == 0 else row
        rows.append(torch.cat([kept, row.new_full((len(row) - len(kept),), padding)]))
    return torch.stack(rows)


@pytest.mark.parametrize("trust_region", ["sampled", "expected"])
def test_the_loss_is_the_mean_over_the_tokens_of_the_step(tmp_path, trust_region):
    outliers = {"outlier_loss": "forward_kl_and_clip", "outlier_clip_floor": -0.2, "outlier_clip_coef": 0.3}
    trainer = make_trainer(tmp_path, trust_region=trust_region, **outliers)
    hash_rollouts(trainer)
    batches = micro_batches(trainer)
    total, tokens = 0.0, 0
    for batch in batches:
        logps, _, _ = trainer._score(trainer.model, batch)
        mask = batch["completion_mask"]
        loss = tropd_loss(
            logps[..., 0],
            batch["teacher_logps"],
            mask,
            top_k_logps=logps[..., 1:],
            teacher_top_k_logps=batch["top_k_logps"],
            draws=batch["draws"] if trust_region == "sampled" else None,
            outlier_loss="forward_kl_and_clip",
            clip_floor=-0.2,
            clip_coef=0.3,
        ).loss
        total, tokens = total + loss.sum(), tokens + mask.sum()
    loss, _ = gradient(trainer, batches)
    torch.testing.assert_close(loss, (total / tokens).detach())


REOPOLD_2 = {"objective": "reopold", "reopold_switch_step": 0}  # its second phase


@pytest.mark.parametrize(
    "options", [{}, {"guidance": "dataset"}, {"lmbda": 0.5}, {"objective": "eopd"}, REOPOLD_2], ids=str
)
def test_one_micro_batch_or_four(tmp_path, options):
    """The draws too belong to a rollout and do not depend on its batch."""
    results = []
    for size in (8, 2):
        trainer = make_trainer(tmp_path, **options)
        hash_rollouts(trainer)
        results.append(gradient(trainer, micro_batches(trainer, 8, size)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_full_runs_with_one_micro_batch_or_four(tmp_path):
    finals = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_steps=3,
            max_grad_norm=1e9,  # clipping would hide a factor
        )
        hash_rollouts(trainer)
        trainer.train()
        finals.append(dict(trainer.model.named_parameters()))
    assert_same(*finals, rtol=1e-4, atol=1e-6)


def test_every_token_an_outlier_and_none(tmp_path):
    for draw, share in ((1.0, 1.0), (0.0, 0.0)):
        trainer = make_trainer(tmp_path)
        batches = micro_batches(trainer)
        for batch in batches:
            batch["draws"] = torch.full_like(batch["draws"], draw)
            batch["teacher_logps"] = batch["teacher_logps"] - 30 * draw  # below the student for certain
        loss, gradients = gradient(trainer, batches)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients.values())
        assert trainer._token_metrics["train"].pop()["outliers/share"] == share


def test_a_student_equal_to_its_teacher_is_not_moved(tmp_path):
    trainer = make_trainer(tmp_path, teacher=tiny.policy())
    loss, gradients = gradient(trainer, micro_batches(trainer))
    assert loss.abs() < 1e-5
    assert max(g.abs().max() for g in gradients.values()) < 1e-4


def test_the_teacher_cannot_judge_an_end_token_that_is_not_its_own(tmp_path):
    """The student ends with token 1, the teacher with 5."""
    teacher = tiny.policy(seed=1, eos_token_id=5)
    teacher.generation_config.eos_token_id = 5
    trainer = make_trainer(tmp_path, teacher=teacher)
    trainer.teacher.eos_token_ids = {5}
    trainer._foreign_ends = trainer.teacher.foreign_ends(trainer.sampler.eos_token_ids)
    hash_rollouts(trainer)
    (batch,) = micro_batches(trainer, 8, 8)
    ends = (batch["completion_ids"] == 1) & batch["completion_mask"].bool()
    assert ends.any()
    assert batch["teacher_logps"].isnan().equal(ends)
    loss, gradients = gradient(trainer, [batch])
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


# Compared with GKD


def test_off_policy_with_the_whole_vocabulary_is_gkds_forward_kl(tmp_path):
    """lmbda=0 and k = vocabulary against GKD's loss with beta=0, on the dataset's completions: value and gradient."""
    size = tiny.policy().config.vocab_size
    trainer = make_trainer(tmp_path, lmbda=0.0, outlier_top_k=size)
    batches = micro_batches(trainer)
    ours = gradient(trainer, batches)
    examples = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    student, teacher = tiny.policy(), tiny.policy(seed=1)
    inputs = {name: examples[name] for name in ("input_ids", "attention_mask")}
    theirs = GKDTrainer.generalized_jsd_loss(
        student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1], examples["labels"][:, 1:], beta=0
    )
    theirs.backward()
    torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-4, atol=1e-5)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same(ours[1], expected, rtol=1e-3, atol=1e-5)


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
    expected = forward_kl_top_k(logps[..., 1:], batch["top_k_logps"])[batch["completion_mask"].bool()].mean()
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
    assert len({str(prompts[0]) for prompts in seen}) == 4  # goes on through the shuffled data


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


# Kinds of models


def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path):
    trainer = make_trainer(tmp_path, tiny.policy(moe=True), tiny.policy(moe=True, seed=1), trust_region="expected")
    assert trainer.aux_loss_enabled
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
