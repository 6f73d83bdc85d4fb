"""A teacher that is a model or an adapter: what RLAD and TrOPD share, and what cannot be a teacher."""

import math

import pytest
import tiny
import torch
import tropd_runs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3ForSequenceClassification

from trl_ext import RLADConfig, RLADTrainer
from trl_ext.teacher.model import ModelTeacher


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("student"))


def rlad(tmp_path, teacher, student=None, **overrides):
    args = RLADConfig(**tiny.grpo_settings(tmp_path, **overrides))
    model = tiny.policy() if student is None else student
    return RLADTrainer(
        model, tiny.digits_reward, args, tiny.prompts(), processing_class=tiny.tokenizer(), teacher_model=teacher
    )


def tropd(tmp_path, teacher, student=None, **overrides):
    return tropd_runs.make_trainer(tmp_path, student, teacher, **overrides)


TRAINERS = pytest.mark.parametrize("make", [rlad, tropd])


def peft_model(seed=1, path=None, **settings):
    """A model with a random adapter; `task_type` changes the class of what wraps it, and its forward."""
    base = tiny.policy(seed) if path is None else AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**LORA, **settings))


def batch_of(trainer):
    """A batch of a trainer's own sampling format, of fixed tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (4, 9), generator=generator)
    batch = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:]}
    masks = {name.replace("ids", "mask"): torch.ones_like(values) for name, values in batch.items()}
    masks["completion_mask"][0, 3:] = 0
    return batch | masks


def expected_logps(model, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    with torch.no_grad():
        logps = model.eval()(input_ids=ids).logits[:, 3:-1].log_softmax(-1)
    return logps.gather(2, batch["completion_ids"][..., None]).squeeze(2)


def assert_scores(trainer, reference):
    batch = batch_of(trainer)
    mask, expected = batch["completion_mask"].bool(), expected_logps(reference, batch)
    scores = [trainer.teacher.next_tokens(batch, 3, 2).logps]
    if isinstance(trainer, RLADTrainer):
        scores.append(trainer.teacher.sampled_logps(batch, trainer.score_completions))
    for logps in scores:
        torch.testing.assert_close(logps[mask], expected[mask], rtol=1e-4, atol=1e-5)


# ---- adapters


@TRAINERS
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_peft_model_scores_with_its_adapter(tmp_path, make, task_type):
    trainer = make(tmp_path, peft_model(task_type=task_type), max_steps=1)
    assert_scores(trainer, peft_model(task_type=task_type))
    trainer.train()


@TRAINERS
def test_the_folder_of_an_adapter(tmp_path, make, path):
    peft_model(path=path, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    trainer = make(tmp_path, str(tmp_path / "adapter"), max_steps=1)
    assert_scores(trainer, peft_model(path=path))
    assert trainer.teacher.eos_token_ids == {1}  # the base model's
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())


def test_the_folder_of_an_adapter_is_checked_by_the_tokenizer_of_its_base(tmp_path, path):
    peft_model(path=path).save_pretrained(tmp_path / "adapter")
    student = tiny.tokenizer()
    student.add_tokens(["zz"])
    with pytest.raises(ValueError, match="'zz' for the student and unknown to the teacher"):
        ModelTeacher(str(tmp_path / "adapter")).check_tokenizer(student, "student")


def two_adapters():
    model = peft_model(0, task_type="CAUSAL_LM")
    model.add_adapter("expert", LoraConfig(**LORA, task_type="CAUSAL_LM"))
    return model


@TRAINERS
def test_an_adapter_scores_through_what_wraps_the_model_by_then(tmp_path, make):
    """FSDP1 wraps it when training begins, after the teacher has been prepared."""
    trainer = make(tmp_path, "expert", two_adapters(), max_steps=1)
    reference = two_adapters()
    reference.set_adapter("expert")
    assert_scores(trainer, reference)

    class Wrapper(torch.nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            Wrapper.calls += 1
            return self.module(*args, **kwargs)

    wrapped, unwrap = Wrapper(trainer.model), trainer.accelerator.unwrap_model
    trainer.accelerator.unwrap_model = lambda model, **options: unwrap(getattr(model, "module", model), **options)
    trainer.model = wrapped
    batch = batch_of(trainer)
    mask, expected = batch["completion_mask"].bool(), expected_logps(reference, batch)
    with trainer.teacher.scoring() as model:
        assert model is wrapped
    torch.testing.assert_close(
        trainer.teacher.next_tokens(batch, 3, 2).logps[mask], expected[mask], rtol=1e-4, atol=1e-5
    )
    assert Wrapper.calls == 2


# ---- NaN


@TRAINERS
@pytest.mark.parametrize("form", ["model", "adapter"])
def test_a_teacher_that_returns_nan_stops_the_run_by_its_name(tmp_path, make, form):
    if form == "model":
        student, teacher = tiny.policy(), tiny.policy(1)
        teacher.model.norm.weight.data[3] = math.nan
        teacher.config._name_or_path = name = "broken-teacher"
    else:
        student, teacher, name = two_adapters(), "expert", "expert"
        for parameter_name, parameter in student.named_parameters():
            if "expert" in parameter_name:
                parameter.data.fill_(math.nan)
    trainer = make(tmp_path, teacher, student)
    with pytest.raises(FloatingPointError, match=rf"The teacher {name} returned NaN for (\d+) of \1 tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- tokens and tokenizers


def test_a_token_of_the_students_padding_is_impossible_to_the_teacher(tmp_path):
    trainer = rlad(tmp_path, tiny.policy(1), tiny.policy(vocab_size=64))
    batch = batch_of(trainer)
    batch["completion_ids"][1, 2] = 60  # an embedding that the teacher lacks
    scores = trainer.teacher.sampled_logps(batch, trainer.score_completions)
    assert scores[1, 2] == -math.inf
    assert scores.isinf().sum() == 1


@TRAINERS
def test_a_folder_without_a_tokenizer_is_a_teacher_that_is_not_checked(tmp_path, make, caplog):
    tiny.policy(1).save_pretrained(tmp_path / "teacher")
    trainer = make(tmp_path, str(tmp_path / "teacher"))
    assert "has no tokenizer that could be loaded, so that nothing checks" in caplog.text
    assert_scores(trainer, tiny.policy(1))


# ---- what is refused


@TRAINERS
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("path", "is a Qwen3ForSequenceClassification, which has no LM head"),
        ("model", "must be a causal language model, its name or a URL, got Qwen3ForSequenceClassification"),
    ],
    ids=["path", "model"],
)
def test_a_classifier_cannot_score_tokens(tmp_path, make, form, message):
    model = Qwen3ForSequenceClassification(tiny.policy().config)
    model.save_pretrained(tmp_path / "classifier")
    teacher = str(tmp_path / "classifier") if form == "path" else model
    with pytest.raises((TypeError, ValueError), match=message):
        make(tmp_path, teacher)


@TRAINERS
def test_a_mistyped_adapter_is_refused_with_the_names_there_are(tmp_path, make):
    with pytest.raises(
        ValueError, match=r"The teacher 'exprt' could not be loaded .*the student's adapters \('default', 'expert'\)"
    ):
        make(tmp_path, "exprt", two_adapters())
