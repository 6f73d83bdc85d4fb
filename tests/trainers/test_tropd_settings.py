"""Settings and arguments of TrOPD: those that reach the loss, those that are refused and those without an effect."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from tropd_runs import (
    gradient,
    hash_rollouts,
    make_trainer,
    micro_batches,
    settings,
    sums,
)

from trl_ext import TrOPDConfig, TrOPDTrainer
from trl_ext.losses import (
    TokenLoss,
    eopd_loss,
    forward_kl_loss,
    least_of_top_share,
    opd_loss,
    reopold_loss,
    tropd_loss,
)
from trl_ext.tropd.checks import settings_without_effect
from trl_ext.tropd.objective import OBJECTIVES, Objective


def direct(name, logps, batch, entropy, **settings):
    arguments = (logps[..., 0], batch["teacher_logps"], batch["completion_mask"])
    columns = {"top_k_logps": logps[..., 1:], "teacher_top_k_logps": batch.get("top_k_logps")}
    if name == "tropd":
        return tropd_loss(*arguments, **columns, draws=batch["draws"], **settings)
    if name == "forward_kl":
        k = settings.pop("k")
        return forward_kl_loss(*arguments, **{name: value[..., :k] for name, value in columns.items()})
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
        ("tropd", {"outlier_loss": "forward_kl"}, {"outlier_loss": "forward_kl"}),
        ("tropd", {}, {"outlier_loss": "forward_kl_everywhere_and_clip", "clip_floor": -1.0, "clip_coef": 1.0}),
        (
            "tropd",
            {"outlier_loss": "forward_kl_and_clip", "outlier_clip_coef": 0.3},
            {"outlier_loss": "forward_kl_and_clip", "clip_floor": -1.0, "clip_coef": 0.3},
        ),
        ("forward_kl", {"outlier_top_k": 3}, {"k": 3}),
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


def test_the_top_share_is_that_of_the_least_certain_tokens():
    entropy = torch.tensor([[0.1, 0.9, float("nan"), 0.3, 0.5]])
    assert (entropy >= least_of_top_share(entropy, 0.25)).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.7, 1.0])
def test_the_least_certain_tokens_are_those_above_the_quantile(share):
    entropies = torch.rand(5, 11, generator=torch.Generator().manual_seed(0))
    entropies[1:3, 4:] = torch.nan
    expected = entropies >= torch.nanquantile(entropies, 1 - share)
    assert torch.equal(entropies >= least_of_top_share(entropies, share), expected)


def test_a_step_without_tokens_of_the_students_has_no_least_certain_ones():
    assert least_of_top_share(torch.empty(0), 0.2).isnan()
    assert least_of_top_share(torch.full((4,), torch.nan), 0.2).isnan()


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_average_their_gradients(tmp_path, monkeypatch, processes):
    """The loss of a process is the sum over its tokens, divided by the mean number of tokens per process."""
    trainer = make_trainer(tmp_path, objective="opd")
    (batch,) = micro_batches(trainer, 8, 8)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
    logps = trainer._score(trainer.model, batch)[0][..., 0]
    mask = batch["completion_mask"].bool()
    total = (logps - batch["teacher_logps"])[mask].sum().detach()
    loss = trainer.compute_loss(trainer.model, batch).detach()
    torch.testing.assert_close(loss, total * processes / mask.sum())


# Settings that are refused, or have no effect


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective": "ppo"}, "objective='ppo' is unknown: set it to one of 'tropd', 'opd'"),
        (
            {"outlier_loss": "jsd"},
            "'forward_kl_everywhere_and_clip', 'forward_kl', 'clip', 'forward_kl_and_clip'",
        ),
        ({"outlier_top_k": 0}, "set it to 1 or more"),
        ({"num_generations": 0}, "set it to 1 or more"),
        ({"guidance_share": 1.5}, "set it between 0 and 1"),
        ({"temperature": 0.0}, "set it above 0"),
        ({"guidance_coef": -1.0}, "set it to 0 or more"),
        ({"guidance_max_length": -1}, "set it to 0 or more"),
        ({"outlier_clip_floor": 0.5}, "set it to 0 nats or less"),
        ({"outlier_clip_coef": -0.5}, "outlier_clip_coef=-0.5 .* set it to 0 or more"),
        ({"packing": True}, "remove packing"),
        ({"loss_type": "dft"}, "choose an objective"),
        ({"train_sampling_strategy": "group_by_length"}, "'random' or 'sequential'"),
        ({"max_length": 0}, "set it to 1 or more, or to None"),
        ({"temperature": float("inf")}, "cannot be sampled at"),
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
        pytest.param(
            sums().add_column("image", [None] * 32),
            {},
            "reads text only",
            marks=pytest.mark.supports("tropd", "vision-language model", refused=True),
        ),
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
    tiny.tokenizer(tiny.CHARACTERS[::-1]).save_pretrained(teacher)
    with pytest.raises(ValueError, match=r"the first difference being token 3"):
        make_trainer(tmp_path, teacher=str(teacher), processing_class=tokenizer)


def test_no_teacher(tmp_path):
    with pytest.raises(ValueError, match="teacher_model_name_or_path"):
        TrOPDTrainer(tiny.policy(), None, TrOPDConfig(**settings(tmp_path)), train_dataset=sums())


@pytest.mark.parametrize(("name", "fix"), [("compute_metrics", "eval_loss"), ("formatting_func", "dataset.map")])
def test_arguments_that_have_no_meaning_here(tmp_path, name, fix):
    with pytest.raises(ValueError, match=fix):
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
        ({"outlier_loss": "forward_kl", "outlier_clip_floor": -2.0}, "outlier_clip_floor=-2.0"),
        ({"outlier_loss": "mask", "outlier_clip_coef": 0.3}, "outlier_clip_coef=0.3"),
        ({"outlier_clip_floor": -2.0, "outlier_clip_coef": 0.3}, None),
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


def test_an_objective_of_your_own_may_read_settings_of_gkd(tmp_path, monkeypatch, caplog):
    def loss(logps, teacher_logps, mask, *, beta=0.5, temperature=1.0):
        return opd_loss(logps, teacher_logps, mask)

    options = {"beta": "beta", "temperature": "temperature"}
    monkeypatch.setitem(OBJECTIVES, "theirs", Objective(loss, "theirs", options))
    make_trainer(tmp_path, objective="theirs", beta=0.9, temperature=0.7)
    make_trainer(tmp_path, temperature=0.7)
    assert "beta=" not in caplog.text
    assert "temperature=" not in caplog.text
    make_trainer(tmp_path, beta=0.9)
    assert "beta=0.9 has no effect" in caplog.text


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
def test_a_peft_teacher_that_scoring_would_ignore(tmp_path, kind):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    if kind == "head":
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    with pytest.raises(ValueError, match="merge_and_unload" if kind == "head" else "learned prompt"):
        make_trainer(tmp_path, teacher=get_peft_model(tiny.policy(seed=1), config))


def test_the_former_name_of_dtype(tmp_path):
    path = tiny.save_policy(tmp_path / "teacher", seed=1)
    trainer = make_trainer(tmp_path, teacher=path, teacher_model_init_kwargs={"torch_dtype": "bfloat16"})
    assert next(trainer.teacher.model.parameters()).dtype == torch.bfloat16
