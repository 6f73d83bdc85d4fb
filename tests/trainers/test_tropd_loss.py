"""The loss of TrOPDTrainer on real batches: which tokens it covers, how it is averaged, and what it equals."""

import copy

import pytest
import tiny
import torch
from trl.experimental.gkd import GKDTrainer
from tropd_runs import assert_same, gradient, hash_rollouts, hashed_completion, make_trainer, micro_batches

from trl_ext.losses import tropd_loss
from trl_ext.tropd.prompts import PromptCollator


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


def test_an_end_token_that_is_not_the_teachers_has_no_loss(tmp_path):
    """The student ends with token 1, the teacher with 5."""
    teacher = tiny.policy(seed=1, eos_token_id=5)
    teacher.generation_config.eos_token_id = 5
    trainer = make_trainer(tmp_path, teacher=teacher)
    trainer.teacher.eos_token_ids = {5}
    trainer.prepare_teacher(trainer.sampler.eos_token_ids)
    hash_rollouts(trainer)
    (batch,) = micro_batches(trainer, 8, 8)
    ends = (batch["completion_ids"] == 1) & batch["completion_mask"].bool()
    assert ends.any()
    assert batch["teacher_logps"].isnan().equal(ends)
    own = batch["completion_mask"].bool()[..., None]
    either = (batch["top_k_ids"] == 1) | (batch["top_k_ids"] == 5)
    assert (either & own).any()
    assert (batch["top_k_logps"].isinf() & own).equal(either & own)
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
