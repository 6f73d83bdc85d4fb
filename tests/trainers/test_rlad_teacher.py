"""RLADTrainer's teacher in every form: models, adapters, end tokens, tokenizers and vocabularies."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_rlad import make_trainer, rollout_batch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from trl_ext.teacher.model import ModelTeacher


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


def other_end(tmp_path, seed=1, stops_at_both=False):
    """A model of the same tokens whose chat format ends with another one (`)`) than `<eos>`."""
    end = tiny.tokenizer().convert_tokens_to_ids(")")
    model = tiny.policy(seed, eos_token_id=end)
    model.generation_config.eos_token_id = [end, 1] if stops_at_both else end  # as Qwen's chat models do
    model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = ")"
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("stops_at_both", [False, True])
def test_end_tokens_that_the_teacher_does_not_use_have_no_score(path, tmp_path, stops_at_both):
    teacher = other_end(tmp_path / "teacher", stops_at_both=stops_at_both)

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


@pytest.mark.parametrize(
    ("stops", "format_ends", "student", "foreign"),
    [
        ({7, 1}, {7}, [7, 1], []),  # two chat models of one family
        ({7, 1}, {7}, [1], [1]),  # a base model and a chat model
        ({7, 1}, {7}, [7], []),
        ({7}, {7}, [7, 1], [1]),
        ({1}, {1}, [7, 1], [7]),  # a chat model and a base model
        ({7, 1}, set(), [1, 3], [3]),  # of a teacher whose tokenizer is not known
        (None, set(), [1], []),
    ],
)
def test_which_end_tokens_are_foreign(stops, format_ends, student, foreign):
    teacher = ModelTeacher("not loaded")
    teacher.eos_token_ids, teacher.format_ends = stops, format_ends
    assert teacher.foreign_ends(student) == foreign


def test_a_teacher_of_text_is_refused_where_prompts_have_images(path, tmp_path):
    """Many text models take any keyword, and would read the places of the images as words."""
    trainer = make_trainer(path, tmp_path, path)
    batch = {**rollout_batch(trainer), "pixel_values": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match=r"reads text only: choose one that reads images"):
        trainer.teacher.sampled_logps(batch, trainer.score_completions)


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
