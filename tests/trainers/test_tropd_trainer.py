"""Training runs of TrOPDTrainer: what it computes, on which tokens, how often, and beside GKD."""

import copy
import inspect

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
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

from trl_ext import TrOPDConfig, TrOPDTrainer, next_token
from trl_ext.losses import (
    TokenLoss,
    eopd_loss,
    forward_kl_top_k,
    least_of_top_share,
    opd_loss,
    reopold_loss,
    tropd_loss,
)
from trl_ext.tropd.objective import OBJECTIVES, Objective
from trl_ext.tropd.prompts import PromptCollator
from trl_ext.tropd.tropd_config import settings_without_effect


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
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logps = reference(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].log_softmax(-1)
    expected = logps.gather(2, batch["completion_ids"][..., None]).squeeze(2)
    valid = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["teacher_logps"][valid], expected[valid], rtol=1e-4, atol=1e-5)
    start = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert moved
    assert all("lora_" in name and ".default." in name for name in moved)
    assert not (tmp_path / "checkpoint-4" / "expert").exists()
    assert not any("expert" in name for name in load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors"))


# Which token is which


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_log_probability_belongs_to_its_token(tmp_path, side):
    """Rows of unequal length against each row alone, unpadded, through the model's own forward."""
    teacher = tiny.policy(seed=1)
    trainer = make_trainer(tmp_path, teacher=copy.deepcopy(teacher), temperature=0.7)
    if side == "right":  # prompts and labels of a collator that pads there
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
def test_the_loss_is_the_mean_over_the_steps_tokens(tmp_path, trust_region):
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
    """The draws too are of a rollout, not of the batch that it is in."""
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
            batch["teacher_logps"] = batch["teacher_logps"] - 30 * draw  # surely not better than the student
        loss, gradients = gradient(trainer, batches)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients.values())
        assert trainer._token_metrics["train"].pop()["outliers/share"] == share


def test_a_student_equal_to_its_teacher_is_not_moved(tmp_path):
    trainer = make_trainer(tmp_path, teacher=tiny.policy())
    loss, gradients = gradient(trainer, micro_batches(trainer))
    assert loss.abs() < 1e-5
    assert max(g.abs().max() for g in gradients.values()) < 1e-4


def test_the_teachers_own_end_is_no_opinion(tmp_path):
    """The student ends with token 1, the teacher with 5: it cannot judge the student's end."""
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


# Beside GKD


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


def test_one_generation_and_one_pass_of_each_model_a_step(tmp_path, monkeypatch):
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
    assert calls == {"generate": 3, "student": 12, "teacher": 12}  # one a micro-batch


def test_several_generations_of_a_prompt_stand_together(tmp_path):
    trainer = make_trainer(tmp_path, num_generations=4)
    seen = []
    sample = trainer.sampler.from_student
    trainer.sampler.from_student = lambda prompts, length: seen.append(prompts) or sample(prompts, length)
    trainer.train()
    for prompts in seen:
        assert prompts[:4] == [prompts[0]] * 4
        assert prompts[4:] == [prompts[4]] * 4
        assert prompts[0] != prompts[4]
    assert len({str(prompts[0]) for prompts in seen}) == 4  # shuffled through the data, not the same again


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
    trainer.sampler.from_student = lambda prompts, length: [[5 + i % 40 for i in range(24)] for _ in prompts]
    largest = tiny.LargestTensor()
    with largest:
        gradient(trainer, micro_batches(trainer, 8, 8))
    assert largest.elements == 32 * vocabulary  # the embedding and its gradient
    assert largest.elements < 8 * 24 * vocabulary / 4


# What is sampled


def frequencies(completions, size):
    counts = torch.bincount(torch.tensor([completion[0] for completion in completions]), minlength=size)
    return counts / counts.sum()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_samples_are_of_the_distribution_that_is_scored(tmp_path, who):
    """Against softmax(z / T), whatever the checkpoint's own generation settings are."""
    models = {"student": tiny.policy(), "teacher": tiny.policy(seed=1)}
    for model in models.values():
        model.generation_config.repetition_penalty = 1e6
        model.generation_config.min_p = 0.5
    trainer = make_trainer(tmp_path, *models.values(), temperature=0.5)
    prompt = tiny.tokenizer()("11+11=")["input_ids"]
    sample = trainer.sampler.from_student if who == "student" else trainer.sampler.from_teacher
    torch.manual_seed(0)
    drawn = frequencies([c for _ in range(4) for c in sample([prompt] * 1000, 1)], 50)
    with torch.no_grad():
        expected = (models[who](input_ids=torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    assert (drawn - expected).abs().sum() < 0.12  # 4000 draws over 50 tokens differ by about 0.08
    assert ((drawn - 1 / 50).abs().sum()) > 0.3
    assert models[who].generation_config.repetition_penalty == 1e6  # it is the user's again


def biased_to(token, seed=0, **settings):
    """A model that hardly says anything but one token."""
    model = tiny.policy(seed, **settings)
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, bias=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[token] = 50.0
    return model


def test_a_completion_keeps_its_end_token(tmp_path):
    trainer = make_trainer(tmp_path, biased_to(1))
    assert trainer.sampler.from_student([[5, 6]] * 3, 10) == [[1]] * 3


def test_the_teachers_text_ends_where_the_teacher_ends_it(tmp_path):
    teacher = biased_to(7)
    trainer = make_trainer(tmp_path, teacher=teacher)
    assert trainer.sampler.from_teacher([[5, 6]], 4) == [[7] * 4]
    trainer.teacher.eos_token_ids = {7}
    trainer.sampler = type(trainer.sampler)(trainer)
    assert trainer.sampler.from_teacher([[5, 6]], 4) == [[7]]
    assert trainer.sampler.without_end([3, 7, 4]) == [3]
    assert len(trainer.sampler.from_student([[5, 6]] * 8, 4)) == 8


def test_the_teachers_text_ends_before_a_token_of_its_padding(tmp_path):
    size = tiny.policy().config.vocab_size
    trainer = make_trainer(tmp_path, teacher=biased_to(size + 2, vocab_size=size + 9))
    assert trainer.sampler.from_teacher([[5, 6]], 4) == [[]]


def test_processes_and_steps_sample_differently_and_the_same_again(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": ["1+1="] * 8}))

    def rollouts(process=0, step=0):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        trainer.state.global_step = step
        (batch,) = micro_batches(trainer, 8, 8)
        return batch

    state = torch.get_rng_state()
    first, again, other, later = rollouts(), rollouts(), rollouts(process=1), rollouts(step=1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is disturbed
    assert torch.equal(first["completion_ids"], again["completion_ids"])
    assert torch.equal(first["draws"], again["draws"])
    for different in (other, later):
        assert different["completion_ids"].tolist() != first["completion_ids"].tolist()
        assert different["draws"].tolist() != first["draws"].tolist()
    rows = first["draws"][0][first["completion_mask"][0].bool()]
    assert len(set(rows.tolist())) == len(rows)  # each token has its own


def test_neither_dropout_nor_its_absence_in_what_is_sampled_and_scored(tmp_path):
    student, teacher = tiny.policy(attention_dropout=0.5), tiny.policy(seed=1, attention_dropout=0.5)
    trainer = make_trainer(tmp_path, student, teacher.train(), disable_dropout=False)
    assert not trainer.teacher.model.training
    (first,), (again,) = micro_batches(trainer, 8, 8), micro_batches(trainer, 8, 8)
    assert torch.equal(first["completion_ids"], again["completion_ids"])
    assert torch.equal(first["teacher_logps"], again["teacher_logps"])
    assert trainer.model.training
    scores = [trainer._score(trainer.model, first)[0] for _ in range(2)]
    assert not torch.equal(*scores)  # the training pass has it


def test_bfloat16_computes_student_and_teacher_alike(tmp_path):
    """A student equal to its teacher has exactly the same log-probabilities under mixed precision."""
    trainer = make_trainer(tmp_path, teacher=tiny.policy(), bf16=True)
    batches = micro_batches(trainer)
    dtypes = set()
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda *hook: dtypes.add(hook[-1].dtype))
    _, gradients = gradient(trainer, batches)
    assert dtypes == {torch.bfloat16}
    metrics = trainer._token_metrics["train"].pop()
    assert metrics["outliers/share"] == 0
    assert metrics["teacher/kl"] == 0
    assert all(g.dtype == torch.float32 for g in gradients.values())


# Settings reach the loss


def direct(name, logps, batch, entropy, **settings):
    arguments = (logps[..., 0], batch["teacher_logps"], batch["completion_mask"])
    columns = {"top_k_logps": logps[..., 1:], "teacher_top_k_logps": batch.get("top_k_logps")}
    if name == "tropd":
        return tropd_loss(*arguments, **columns, draws=batch["draws"], **settings)
    if name == "eopd":
        k = settings.pop("k")
        columns = {name: value[..., :k] for name, value in columns.items()}
        return eopd_loss(*arguments, **columns, teacher_entropy=batch["teacher_entropy"], **settings)
    share = settings.pop("share")
    valid = torch.where(batch["completion_mask"].bool(), entropy, float("nan"))
    uncertain = None if share is None else valid >= torch.nanquantile(valid, 1 - share)
    return reopold_loss(*arguments, uncertain=uncertain, **settings)


@pytest.mark.parametrize(
    ("objective", "overrides", "expected"),
    [
        ("tropd", {"outlier_loss": "clip", "outlier_clip_floor": -0.3}, {"outlier_loss": "clip", "clip_floor": -0.3}),
        ("tropd", {"outlier_loss": "mask"}, {"outlier_loss": "mask"}),
        ("eopd", {"eopd_top_k": 3, "eopd_entropy_threshold": 3.3}, {"k": 3, "entropy_threshold": 3.3}),
        (
            "reopold",
            {"reopold_floor": -0.2, "reopold_switch_step": 2, "reopold_top_entropy_share": 0.25, "step": 1},
            {"floor": -0.2, "share": None},
        ),
        (
            "reopold",
            {"reopold_floor": -0.2, "reopold_top_entropy_share": 0.25, "step": 2},  # half of 4
            {"floor": -0.2, "share": 0.25},
        ),
    ],
)
def test_settings_reach_the_loss(tmp_path, objective, overrides, expected):
    step = overrides.get("step", 0)
    overrides = {name: value for name, value in overrides.items() if name != "step"}
    trainer = make_trainer(tmp_path, objective=objective, **overrides)
    trainer.state.global_step = step
    (batch,) = micro_batches(trainer, 8, 8)
    logps, entropy, _ = trainer._score(trainer.model, batch)
    loss, _ = gradient(trainer, [batch])
    whole = direct(objective, logps, batch, entropy, **expected).loss.sum() / batch["completion_mask"].sum()
    torch.testing.assert_close(loss, whole.detach())


def test_the_top_share_is_of_the_least_certain_tokens():
    entropy = torch.tensor([[0.1, 0.9, float("nan"), 0.3, 0.5]])
    assert (entropy >= least_of_top_share(entropy, 0.25)).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_average_their_gradients(tmp_path, monkeypatch, processes):
    """The loss of a process is its tokens' sum over the mean number of tokens of a process."""
    trainer = make_trainer(tmp_path, objective="opd")
    (batch,) = micro_batches(trainer, 8, 8)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
    logps = trainer._score(trainer.model, batch)[0][..., 0]
    mask = batch["completion_mask"].bool()
    total = (logps - batch["teacher_logps"])[mask].sum().detach()
    loss = trainer.compute_loss(trainer.model, batch).detach()
    torch.testing.assert_close(loss, total * processes / mask.sum())


# Evaluation


def test_evaluation_samples_and_reports_the_kl(tmp_path):
    trainer = make_trainer(
        tmp_path, guidance="dataset", eval_dataset=sums(12, completions=False), per_device_eval_batch_size=4
    )
    logs = trainer.evaluate()
    assert logs["eval_loss"] > 0
    assert {"eval_teacher/kl", "eval_outliers/share", "eval_completions/mean_length"} <= logs.keys()
    assert "eval_guidance/share" not in logs  # its own samples from the first token
    twin = make_trainer(tmp_path, teacher=tiny.policy(), eval_dataset=sums(12))
    assert abs(twin.evaluate()["eval_teacher/kl"]) < 1e-5


def test_the_evaluation_loss_is_the_mean_over_its_tokens(tmp_path):
    trainer = make_trainer(tmp_path, objective="opd", lmbda=0.0, eval_dataset=sums(8), per_device_eval_batch_size=8)
    hash_rollouts(trainer)  # as unequal as they come
    logs = trainer.evaluate()
    assert logs["eval_loss"] == pytest.approx(logs["eval_teacher/kl"], rel=1e-4)
    assert "eval_off_policy/share" not in logs  # its own samples, whatever lmbda is in training
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
    # A mean of four, not their sum
    assert (in_four - without).item() == pytest.approx((with_aux - without).item(), rel=0.2)
    trainer.train()


def test_padded_vocabularies_of_different_size(tmp_path):
    size = tiny.policy().config.vocab_size
    teacher = tiny.policy(seed=1, vocab_size=size + 13)
    trainer = make_trainer(tmp_path, teacher=teacher, outlier_top_k=1000)
    (batch,) = micro_batches(trainer, 8, 8)
    assert batch["top_k_ids"].shape[-1] == size
    assert batch["top_k_ids"].max() < size
    assert (batch["top_k_logps"].exp().sum(-1)[batch["completion_mask"].bool()] < 1).all()  # over all of its own
    trainer.train()
    larger = make_trainer(tmp_path, tiny.policy(vocab_size=size + 13), tiny.policy(seed=1))
    larger.sampler.from_student = lambda prompts, length: [
        [5, size + 3, 6, 1] for _ in prompts
    ]  # one unknown to the teacher
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


class StubEngine:
    """Stands for vLLM: samples what the hash says, and remembers when it got weights."""

    def __init__(self, **kwargs):
        self.settings, self.syncs, self.prompts, self.draws = kwargs, 0, [], []

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations):
        assert images is None
        assert num_generations == 1
        self.prompts.append(prompts)
        self.draws.append(torch.rand(()).item())
        return prompts, [hashed_completion(prompt) for prompt in prompts], None, None


@pytest.fixture
def vllm_stub(monkeypatch):
    monkeypatch.setattr("trl_ext.tropd.sampling.is_vllm_available", lambda: True)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", StubEngine)


def test_vllm_samples_with_the_newest_weights(tmp_path, vllm_stub):
    finals = []
    for use_vllm in (True, False):
        trainer = make_trainer(tmp_path, use_vllm=use_vllm, temperature=0.8, guidance="dataset", lmbda=0.7)
        if not use_vllm:
            hash_rollouts(trainer)
        trainer.train()
        finals.append(dict(trainer.model.named_parameters()))
        if use_vllm:
            engine = trainer.sampler._vllm
    assert_same(*finals)
    assert engine.syncs == 4
    assert [len(prompts) for prompts in engine.prompts] == [8] * 4  # as many on every process
    assert engine.settings["temperature"] == 0.8
    assert engine.settings["max_completion_length"] == 10
    assert engine.settings.keys() <= inspect.signature(REAL_ENGINE.__init__).parameters.keys()


from trl.generation.vllm_generation import VLLMGeneration as REAL_ENGINE  # noqa: E402


@pytest.mark.parametrize(
    ("engine", "alike"),
    [
        ({"vllm_tensor_parallel_size": 2}, [0, 0, 1, 1]),  # each rank of an engine generates all of its prompts
        ({"vllm_tensor_parallel_size": 1}, [0, 1, 2, 3]),
        ({"vllm_tensor_parallel_size": 2, "vllm_mode": "server"}, [0, 1, 2, 3]),
    ],
)
def test_the_ranks_of_one_engine_draw_alike_and_no_others(tmp_path, monkeypatch, vllm_stub, engine, alike):
    trainer = make_trainer(tmp_path, use_vllm=True, guidance="dataset", **engine)
    drawn, own_draws = [], []
    for process in range(4):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        state = torch.get_rng_state()
        (batch,) = micro_batches(trainer, 8, 8)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(trainer.sampler._vllm.draws[-1])
        own_draws.append(batch["draws"][batch["completion_mask"].bool()].tolist()[:4])
    assert [drawn.index(draw) for draw in drawn] == [alike.index(engine) for engine in alike]
    assert len({str(draws) for draws in own_draws}) == 4


def test_without_vllm_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.tropd.sampling.is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match="pip install trl"):
        make_trainer(tmp_path, use_vllm=True)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective": "ppo"}, "objective='ppo' is unknown: set it to one of 'tropd', 'opd'"),
        ({"outlier_loss": "jsd"}, "'forward_kl', 'clip', 'forward_kl_and_clip', 'mask'"),
        ({"outlier_top_k": 0}, "set it to 1 or more"),
        ({"num_generations": 0}, "set it to 1 or more"),
        ({"guidance_share": 1.5}, "set it between 0 and 1"),
        ({"temperature": 0.0}, "set it above 0"),
        ({"guidance_coef": -1.0}, "set it to 0 or more"),
        ({"guidance_max_length": -1}, "set it to 0 or more"),
        ({"outlier_clip_floor": 0.5}, "set it to 0 nats or less"),
        ({"outlier_clip_coef": -0.5}, "outlier_clip_coef=-0.5 .* set it to 0 or more"),
        ({"packing": True}, "leave packing out"),
        ({"loss_type": "dft"}, "choose an objective"),
        ({"train_sampling_strategy": "group_by_length"}, "'random' or 'sequential'"),
        ({"max_length": 0}, "set it to 1 or more, or to None"),
        ({"temperature": float("inf")}, "nothing to sample at"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        TrOPDConfig(**settings(tmp_path, **overrides))


@pytest.mark.parametrize(
    ("dataset", "overrides", "message"),
    [
        (sums().rename_column("prompt", "question"), {}, "rename_column"),
        (sums(completions=False), {"guidance": "dataset"}, "guidance='dataset' needs completions"),
        (sums(completions=False), {"lmbda": 0.5}, "set lmbda=1.0"),
        (Dataset.from_dict({"prompt": ["1"], "completion": [None]}), {"guidance": "dataset"}, "the first row"),
        (Dataset.from_list([{"messages": [{"role": "user", "content": "1"}]}]), {"lmbda": 0.5}, "the first row"),
        (sums().add_column("image", [None] * 32), {}, "reads text only"),
    ],
)
def test_datasets_are_checked_before_anything_is_loaded(tmp_path, dataset, overrides, message):
    with pytest.raises(ValueError, match=message):
        TrOPDTrainer(
            "no/such-student", "no/such-teacher", TrOPDConfig(**settings(tmp_path, **overrides)), None, dataset
        )


def test_a_teacher_with_another_tokenizer(tmp_path):
    tokenizer = tiny.tokenizer()
    teacher = tmp_path / "teacher"
    tiny.policy(seed=1).save_pretrained(teacher)
    tiny.CHARACTERS, original = tiny.CHARACTERS[::-1], tiny.CHARACTERS
    try:
        tiny.tokenizer().save_pretrained(teacher)
    finally:
        tiny.CHARACTERS = original
    with pytest.raises(ValueError, match=r"the first difference being token 3"):
        make_trainer(tmp_path, teacher=str(teacher), processing_class=tokenizer)


def test_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="teacher_model_name_or_path"):
        TrOPDTrainer(tiny.policy(), None, TrOPDConfig(**settings(tmp_path)), train_dataset=sums())


@pytest.mark.parametrize(("name", "mend"), [("compute_metrics", "eval_loss"), ("formatting_func", "dataset.map")])
def test_arguments_that_mean_nothing_here(tmp_path, name, mend):
    with pytest.raises(ValueError, match=mend):
        TrOPDTrainer("student", "teacher", TrOPDConfig(**settings(tmp_path)), **{name: lambda x: x})


def test_prompt_tuning_is_refused(tmp_path):
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="use another adapter"):
        make_trainer(tmp_path, peft_config=prompt_tuning)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        ({"beta": 0.9}, "beta=0.9"),
        ({"objective": "opd", "outlier_loss": "mask", "outlier_top_k": 64}, "outlier_loss='mask'"),
        ({"seq_kd": True}, "seq_kd=True"),
        ({"guidance_coef": 0.1}, "guidance_coef=0.1"),
        ({"eopd_top_k": 3}, "eopd_top_k=3"),
        ({"outlier_clip_floor": -2.0}, "outlier_clip_floor=-2.0"),
        ({"outlier_loss": "mask", "outlier_clip_coef": 0.3}, "outlier_clip_coef=0.3"),
        ({"outlier_loss": "forward_kl_and_clip", "outlier_clip_floor": -2.0, "outlier_clip_coef": 0.3}, None),
        ({"vllm_mode": "server"}, "vllm_mode='server'"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8"),
        ({}, None),
        ({"objective": "eopd", "eopd_top_k": 3, "outlier_top_k": 64}, None),
        ({"guidance": "dataset", "guidance_coef": 0.1}, None),
    ],
)
def test_settings_without_an_effect_bring_one_warning(tmp_path, caplog, overrides, warned):
    make_trainer(tmp_path, **overrides)
    warnings = [record.message for record in caplog.records if "has no effect" in record.message]
    assert len(warnings) == (warned is not None)
    assert warned is None or warned in warnings[0]


def test_an_objective_of_your_own_is_one_row(tmp_path, monkeypatch):
    """Its settings and tensors reach the loss, and the settings of other objectives are known to have no effect."""
    seen = []

    def half_loss(logps, teacher_logps, mask, *, floor, teacher_entropy, top_k_logps, teacher_top_k_logps):
        seen.append((floor, top_k_logps.shape[-1], teacher_top_k_logps.shape[-1], teacher_entropy.shape == mask.shape))
        return TokenLoss(0.5 * opd_loss(logps, teacher_logps, mask).loss)

    row = Objective(half_loss, "half", {"reopold_floor": "floor"}, ("teacher_entropy",), top_k="eopd_top_k")
    monkeypatch.setitem(OBJECTIVES, "half", row)
    losses = []
    for objective in ("half", "opd"):
        trainer = make_trainer(tmp_path, objective=objective, eopd_top_k=5, reopold_floor=-0.5)
        hash_rollouts(trainer)
        losses.append(gradient(trainer, micro_batches(trainer, 8, 8))[0])
        unused = set(settings_without_effect(trainer.args))
        assert unused >= {"eopd_entropy_threshold", "reopold_switch_step", "trust_region", "outlier_top_k"}
        assert unused & {"eopd_top_k", "reopold_floor"} == (
            {"eopd_top_k", "reopold_floor"} if objective == "opd" else set()
        )
    assert seen == [(-0.5, 5, 5, True)]
    assert losses[0] == 0.5 * losses[1]


def test_a_teacher_by_path_is_loaded_with_its_init_kwargs(tmp_path):
    path = tiny.save_policy(tmp_path / "teacher", seed=1)
    trainer = make_trainer(
        tmp_path, teacher=path, teacher_model_init_kwargs={"dtype": "bfloat16"}, per_device_train_batch_size=8
    )
    assert next(trainer.teacher.model.parameters()).dtype == torch.bfloat16
    assert next(AutoModelForCausalLM.from_pretrained(path).parameters()).dtype == torch.float32
    trainer.train()


@pytest.mark.parametrize("kind", ["prompt tuning", "head"])
def test_a_peft_teacher_that_scoring_would_pass_over(tmp_path, kind):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    if kind == "head":
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_trainer(tmp_path, teacher=get_peft_model(tiny.policy(seed=1), config))


def test_the_former_name_of_dtype(tmp_path):
    path = tiny.save_policy(tmp_path / "teacher", seed=1)
    trainer = make_trainer(tmp_path, teacher=path, teacher_model_init_kwargs={"torch_dtype": "bfloat16"})
    assert next(trainer.teacher.model.parameters()).dtype == torch.bfloat16


def test_num_tokens_counts_prompts_and_completions(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    prompts = log["num_tokens"] - 8 * log["completions/mean_length"]
    assert 8 * 4 <= round(prompts) <= 8 * 6  # "7+1=" to "112+16="
