"""A teacher that sees another prompt than the student, and the student without its adapter as the teacher."""

import pytest
import tiny
import torch
import tropd_runs
from peft import LoraConfig, get_peft_model

from trl_ext import RLADConfig, RLADTrainer


def with_hints(rows=16, **columns):
    """Sums; every other row has a hint of a length of its own in what the teacher sees."""
    data = tiny.prompts(rows)
    hints = [f"{'hint ' * (i % 5 + 1)}{prompt}" if i % 2 else None for i, prompt in enumerate(data["prompt"])]
    return data.add_column("teacher_prompt", columns.get("teacher_prompt", hints))


def lora(model=None, **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings)
    return get_peft_model(tiny.policy() if model is None else model, config)


def make_rlad(tmp_path, teacher, student=None, dataset=None, **overrides):
    args = RLADConfig(**tiny.grpo_settings(tmp_path, **overrides))
    return RLADTrainer(
        tiny.policy() if student is None else student,
        tiny.digits_reward,
        args,
        with_hints() if dataset is None else dataset,
        processing_class=tiny.tokenizer(),
        teacher_model=teacher,
    )


def rlad_scores(tmp_path, teacher, student=None, dataset=None, **overrides):
    """The trainer, what the teacher saw for each row of a rollout batch, the completions and their scores."""
    trainer = make_rlad(tmp_path, teacher, student, dataset, **overrides)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    batch = trainer.roll_out(rows)
    prompts = [row.get("teacher_prompt") or row["prompt"] for row in rows]
    return trainer, prompts, batch, batch["teacher_per_token_logps"]


def tropd_scores(tmp_path, teacher, student=None, dataset=None, **overrides):
    data = with_hints() if dataset is None else dataset
    trainer = tropd_runs.make_trainer(tmp_path, student, teacher, data, **overrides)
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in range(4)]
    (batch,) = trainer._make_rollouts([trainer.data_collator(rows)])
    prompts = [row.get("teacher_prompt") or row["prompt"] for row in rows]
    return trainer, prompts, batch, batch["teacher_logps"]


def assert_scored_after(model, prompts, batch, scores):
    """Each completion alone, without padding, after what the teacher is to see."""
    tokenizer, model = tiny.tokenizer(), model.eval()
    for prompt, ids, mask, values in zip(
        prompts, batch["completion_ids"], batch["completion_mask"].bool(), scores, strict=True
    ):
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        before = torch.tensor(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.cat([before, ids[mask]])[None]).logits[0, len(before) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[mask][:, None]).squeeze(1)
        torch.testing.assert_close(values[mask], expected, rtol=1e-4, atol=1e-4)


SCORES = pytest.mark.parametrize("scores_of", [rlad_scores, tropd_scores])


@SCORES
def test_the_teacher_scores_after_its_own_prompt(tmp_path, scores_of):
    trainer, prompts, batch, scores = scores_of(tmp_path, tiny.policy(1))
    assert any("hint" in prompt for prompt in prompts)
    assert not all("hint" in prompt for prompt in prompts)
    assert_scored_after(tiny.policy(1), prompts, batch, scores)
    # the student sees nothing of it
    longest = max(len(prompt) for prompt in trainer.train_dataset["prompt"])
    assert batch["prompt_ids"].shape[1] <= longest
    trainer.train()


@SCORES
def test_a_teacher_prompt_of_messages(tmp_path, scores_of):
    messages = [[{"role": "user", "content": f"say {i}"}] for i in range(16)]
    data = with_hints(teacher_prompt=messages)
    _, prompts, batch, scores = scores_of(tmp_path, tiny.policy(1), dataset=data)
    assert_scored_after(tiny.policy(1), prompts, batch, scores)


def test_without_unused_columns_the_teachers_prompt_stays(tmp_path):
    trainer = make_rlad(tmp_path, tiny.policy(1), remove_unused_columns=True)
    assert "teacher_prompt" in next(iter(trainer.get_train_dataloader()))[0]


@SCORES
def test_too_long_a_prompt_for_the_teacher_is_named(tmp_path, scores_of, caplog):
    scores_of(tmp_path, tiny.policy(1, max_position_embeddings=20))
    assert "was made for 20: shorten the column teacher_prompt" in caplog.text


@pytest.mark.parametrize("hinted", [False, True])
def test_a_row_without_one_is_scored_after_what_the_student_saw(tmp_path, hinted):
    """Here a `rollout_func` with a template of its own, whatever the other rows of the batch have."""

    def rollout(prompts, trainer):
        return {**tiny.rollout([f"sum {prompt}" for prompt in prompts], trainer), "logprobs": None}

    data = with_hints(teacher_prompt=["hint" if i % 2 and hinted else None for i in range(16)])
    args = RLADConfig(**tiny.grpo_settings(tmp_path))
    teacher, tokenizer = tiny.policy(1), tiny.tokenizer()
    arguments = {"processing_class": tokenizer, "teacher_model": teacher, "rollout_func": rollout}
    trainer = RLADTrainer(tiny.policy(), tiny.digits_reward, args, data, **arguments)
    trainer.model.train()
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    batch = trainer.roll_out(rows)
    prompts = [row["teacher_prompt"] or f"sum {row['prompt']}" for row in rows]
    assert_scored_after(tiny.policy(1), prompts, batch, batch["teacher_per_token_logps"])


# ---- the student without its adapter


@SCORES
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_the_base_model_is_the_teacher_at_no_cost_of_memory(tmp_path, scores_of, modules_to_save):
    student = lora(init_lora_weights=False, lora_dropout=0.5, modules_to_save=modules_to_save)
    trainer, prompts, batch, scores = scores_of(tmp_path, "base", student, save_strategy="steps", save_steps=4)
    assert_scored_after(tiny.policy(), prompts, batch, scores)  # not the adapter's, which is random
    assert trainer.teacher.name == "base"
    trainer._buffered_inputs = None
    start = {name: value.clone() for name, value in student.named_parameters()}
    trainer.train()
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name or "modules_to_save" in name}
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert_scored_after(tiny.policy(), prompts, batch, scores)


@pytest.mark.parametrize("teacher", ["base", "another model"])
def test_the_teacher_scores_in_the_micro_batches_of_training(tmp_path, teacher):
    """Not in those of evaluation, although the adapter is switched off in evaluation mode."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 8}
    trainer = make_rlad(tmp_path, tiny.policy(1) if teacher != "base" else teacher, lora(), **sizes)
    scored, score = [], trainer._score
    trainer._score = lambda model, batch, **settings: (
        scored.append(settings["batch_size"]) or score(model, batch, **settings)
    )
    trainer.model.train()
    trainer.roll_out([trainer.train_dataset[i // 4] for i in range(8)])
    assert scored == [2]


def test_a_teacher_that_holds_the_students_adapter_is_refused(tmp_path):
    model = tiny.policy()
    student = lora(model)  # PEFT changes the model itself
    with pytest.raises(ValueError, match=r"shares its weights, which would be frozen: pass .*teacher_model='base'"):
        make_rlad(tmp_path, model, student)
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_the_base_model_with_an_adapter_of_the_trainers(tmp_path):
    args = RLADConfig(**tiny.grpo_settings(tmp_path, max_steps=1))
    trainer = RLADTrainer(
        tiny.policy(),
        tiny.digits_reward,
        args,
        with_hints(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        teacher_model="base",
    )
    trainer.train()
    assert trainer.state.log_history[0]["teacher/log_ratio_abs"] > 0  # by its prompts alone


def test_a_student_without_an_adapter_has_no_base(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_model='base' is the student without its adapter.*pass peft_config"):
        make_rlad(tmp_path, "base")
