"""TrOPD's data: from rows to tokens, and rollouts that begin with a prefix."""

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing
from trl.experimental.utils import DataCollatorForChatML
from tropd_runs import gradient, hash_rollouts, hashed_completion, make_trainer, micro_batches, sums

from trl_ext.tropd.prompts import PromptCollator, unpad
from trl_ext.tropd.rollouts import prefix_lengths


def ids(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def pairs(rows, **settings):
    return unpad(PromptCollator(tiny.tokenizer(), **settings)(rows))


def message(role, content):
    return {"role": role, "content": content}


def test_plain_text_gets_an_end():
    rows = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "10+20=", "completion": "30<eos>"}]
    assert pairs(rows) == [(ids("1+2="), [*ids("3"), 1]), (ids("10+20="), [*ids("30"), 1])]


def test_prompts_only():
    assert pairs([{"prompt": "1+2="}, {"prompt": "10+20=", "completion": None}]) == [
        (ids("1+2="), []),
        (ids("10+20="), []),
    ]


def test_conversations():
    """The tiny template writes u(...) and a(...), and a( to begin an answer."""
    question, answer = message("user", "1+2"), message("assistant", "3")
    expected = [(ids("u(1+2)a("), ids("3)"))]
    assert pairs([{"messages": [question, answer]}]) == expected
    assert pairs([{"prompt": [question], "completion": [answer]}]) == expected
    assert pairs([{"messages": [question]}]) == pairs([{"prompt": [question]}]) == [(ids("u(1+2)a("), [])]
    longer = [question, answer, message("user", "4"), message("assistant", "5")]
    assert pairs([{"messages": longer}]) == [(ids("u(1+2)a(3)u(4)a("), ids("5)"))]


@pytest.mark.parametrize("max_length", [None, 40])
def test_messages_are_read_as_gkds_collator_reads_them(max_length):
    rows = [{"messages": [message("user", f"{i}+{i}"), message("assistant", str(2 * i))]} for i in (1, 20, 333)]
    ours = PromptCollator(tiny.tokenizer(), max_length)(rows)
    theirs = DataCollatorForChatML(tiny.tokenizer(), max_length=max_length or 1000)(rows)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_max_length_never_costs_a_prompt_its_tokens_for_a_completion():
    row = {"prompt": "123456", "completion": "78"}
    assert pairs([row], max_length=9) == [(ids("123456"), [*ids("78"), 1])]
    assert pairs([row], max_length=7) == [(ids("123456"), ids("7"))]
    assert pairs([row], max_length=4) == [(ids("3456"), [])]
    assert pairs([row], max_length=7, completions=False) == [(ids("123456"), [])]


def test_a_tokens_beginning_and_what_a_template_writes_after_the_end():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "b"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="b $A", special_tokens=[("b", tokenizer.bos_token_id)]
    )
    collator = PromptCollator(tokenizer)
    assert unpad(collator([{"prompt": "12", "completion": "3"}])) == [([*ids("b"), *ids("12")], [*ids("3"), 1])]
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("+ ')' }}", "+ eos_token + '\\n' }}")
    conversation = {"messages": [message("user", "12"), message("assistant", "3")]}
    ((prompt, completion),) = unpad(collator([conversation]))
    assert completion == [*ids("3"), 1]  # without the newline after it
    assert prompt[0] != tokenizer.bos_token_id  # a template writes its own


def test_tools_as_a_list_or_as_json_text():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ tools[0].name }}" + tiny.CHAT_TEMPLATE
    row = {"messages": [message("user", "1"), message("assistant", "2")]}
    expected = [(ids("addu(1)a("), ids("2)"))]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        assert unpad(PromptCollator(tokenizer)([{**row, "tools": tools}])) == expected
    assert pairs([{**row, "tools": ""}]) == pairs([{**row, "tools": None}]) == pairs([row])
    with pytest.raises(ValueError, match=r"not JSON .*json\.dumps"):
        pairs([{**row, "tools": "add"}])


def test_a_template_that_renders_prompts_differently_brings_a_warning():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("a({%", "a(think{%")
    rows = [{"prompt": [message("user", "1")], "completion": [message("assistant", "2")]}]
    with pytest.warns(UserWarning, match="renders the prompt differently"):
        assert unpad(PromptCollator(tokenizer)(rows)) == [(ids("u(1)a(think"), ids("2)"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1"}, "rename_column"),
        ({"prompt": ""}, "remove such rows"),
        ({"prompt": []}, "remove such rows"),
        ({"messages": []}, "remove such rows"),
        ({"prompt": "1", "completion": [message("assistant", "2")]}, "both as text or both as messages"),
        ({"prompt": [message("user", "1")], "completion": "2"}, "both as text or both as messages"),
    ],
)
def test_rows_that_cannot_be_read(row, message):
    with pytest.raises(ValueError, match=message):
        pairs([row])


@pytest.mark.parametrize("form", ["messages", "conversational prompts", "stream"])
def test_training_on_every_kind_of_data(tmp_path, form):
    def conversations():
        for i in range(32):
            yield {"messages": [message("user", f"{i}+1="), message("assistant", str(i + 1))]}

    if form == "conversational prompts":
        data = Dataset.from_list([{"prompt": row["messages"][:1]} for row in conversations()])
    else:
        data = (IterableDataset if form == "stream" else Dataset).from_generator(conversations)
    guidance = "none" if form == "conversational prompts" else "dataset"
    trainer = make_trainer(tmp_path, dataset=data, guidance=guidance, num_generations=2)
    seen = []
    sample = trainer.sampler.from_student
    trainer.sampler.from_student = lambda prompts, length: seen.extend(prompts) or sample(prompts, length)
    trainer.train()
    assert len(seen) == 32
    assert all(tiny.tokenizer().decode(prompt).startswith("u(") for prompt in seen)


def test_gkds_own_collator_can_be_passed(tmp_path):
    data = Dataset.from_list([{"messages": [message("user", f"{i}"), message("assistant", "1")]} for i in range(16)])
    collator = DataCollatorForChatML(tiny.tokenizer(), max_length=64)
    trainer = make_trainer(tmp_path, dataset=data, data_collator=collator, guidance="dataset", max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["guidance/share"] > 0


# Guidance


def test_prefix_lengths():
    generator = torch.Generator().manual_seed(0)
    assert prefix_lengths([3, 10, 0], 5, 1.0, False, generator) == [3, 5, 0]
    assert prefix_lengths([3, 10, 4], 5, 0.0, False, generator) == [0, 0, 0]
    drawn = prefix_lengths([3] * 4000, 5, 1.0, True, generator)
    assert [drawn.count(n) for n in (0, 1, 2, 3)] == pytest.approx([1000] * 4, rel=0.1)
    half = prefix_lengths([3] * 4000, 5, 0.5, False, generator)
    assert half.count(3) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("source", ["dataset", "teacher"])
def test_a_rollout_begins_with_the_teachers_words(tmp_path, source):
    trainer = make_trainer(
        tmp_path, guidance=source, guidance_prefix="longest", guidance_max_length=2, guidance_schedule="constant"
    )
    hash_rollouts(trainer)
    (batch,) = micro_batches(trainer, 8, 8)
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        example = trainer.train_dataset[row]
        written = ids(example["completion"]) if source == "dataset" else hashed_completion([0, *prompt])
        prefix = [token for token in written if token != 1][:2]  # without the end: the student continues
        assert completion == (prefix + hashed_completion(prompt + prefix))[:10]
        assert batch["guided_mask"][row].tolist() == [i < len(prefix) for i in range(len(batch["guided_mask"][row]))]


def test_guided_tokens_have_their_likelihood_times_the_coefficient(tmp_path):
    results = []
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(
            tmp_path,
            guidance="dataset",
            guidance_prefix="longest",
            guidance_schedule="constant",
            guidance_coef=coefficient,
            objective="opd",
        )
        hash_rollouts(trainer)
        batches = micro_batches(trainer, 8, 8)
        results.append(gradient(trainer, batches)[0])
    (batch,) = batches
    logps = trainer._score(trainer.model, batch)[0][..., 0]
    guided = batch["guided_mask"].bool()
    assert guided.any(1).all()
    assert not (guided & (batch["completion_ids"] == 1)).any()
    expected = -0.5 * logps[guided].sum() / batch["completion_mask"].sum()
    torch.testing.assert_close(results[1] - results[0], expected.detach(), rtol=1e-4, atol=1e-6)


def test_guidance_ends_with_the_run_and_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, guidance="dataset", guidance_prefix="longest", max_steps=4)
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert [log["guidance/max_length"] for log in logs] == [10, 8, 5, 1]  # 10 (1 + cos(pi s / 4)) / 2, rounded down
    assert logs[0]["guidance/share"] > logs[3]["guidance/share"] > 0


def test_only_the_guided_share_is_guided_by_its_schedule(tmp_path):
    settings = {"guidance": "dataset", "guidance_prefix": "longest", "guidance_max_length": 2}
    unguided = make_trainer(tmp_path, **settings, guidance_share=0.0)
    assert micro_batches(unguided, 8, 8)[0]["guided_mask"].sum() == 0
    trainer = make_trainer(tmp_path, **settings, guidance_schedule="linear")
    hash_rollouts(trainer)
    lengths = []
    for step in (0, 2, 4):  # 2 (1 - s / 4)
        trainer.state.global_step = step
        lengths.append(micro_batches(trainer, 8, 8)[0]["guided_mask"].sum(1).max().item())
    assert lengths == [2, 1, 0]


def test_guided_tokens_have_no_other_loss_and_are_in_no_other_metric(tmp_path):
    trainer = make_trainer(
        tmp_path, guidance="dataset", guidance_prefix="longest", guidance_coef=0.0, objective="opd",
        guidance_schedule="constant",
    )  # fmt: skip
    hash_rollouts(trainer)
    (batch,) = micro_batches(trainer, 8, 8)
    trainer._token_metrics["train"].pop()
    loss, _ = gradient(trainer, [batch])
    logps, entropy, _ = trainer._score(trainer.model, batch)
    own = batch["completion_mask"].bool() & ~batch["guided_mask"].bool()
    assert 0 < own.sum() < batch["completion_mask"].sum()
    difference = (logps[..., 0] - batch["teacher_logps"])[own].detach()
    torch.testing.assert_close(loss, difference.sum() / batch["completion_mask"].sum())
    metrics = trainer._token_metrics["train"].pop()
    assert metrics["entropy"] == pytest.approx(entropy[own].mean().item(), rel=1e-4)
    assert metrics["teacher/kl"] == pytest.approx(difference.mean().item(), rel=1e-4)


def test_a_rollout_is_never_longer_than_it_may_be(tmp_path):
    long = Dataset.from_dict({"prompt": ["1+"] * 8, "completion": ["12345678901234567890"] * 8})
    trainer = make_trainer(tmp_path, dataset=long, guidance="dataset", guidance_prefix="longest")
    (batch,) = micro_batches(trainer, 8, 8)
    assert batch["guided_mask"].sum(1).tolist() == [9] * 8  # the student writes the last token
    assert batch["completion_mask"].sum(1).tolist() == [10] * 8


# Hostile inputs


def test_empty_completions(tmp_path):
    data = Dataset.from_dict({"prompt": ["1+1="] * 8, "completion": ["2"] + [""] * 7})
    trainer = make_trainer(tmp_path, dataset=data, lmbda=0.0, guidance="dataset", per_device_train_batch_size=1)
    trainer.train_dataset = data.select(range(1, 8))
    (batch,) = micro_batches(trainer, 7, 7)
    assert batch["completion_mask"].sum() == 0
    loss, gradients = gradient(trainer, [batch])
    assert loss == 0
    assert all((g == 0).all() for g in gradients.values())
    trainer.train()


def test_a_prompt_longer_than_the_limit(tmp_path):
    data = Dataset.from_dict({"prompt": ["1+2+3+4+5+6+7+8+9+0=" * 4] * 8})
    trainer = make_trainer(tmp_path, dataset=data, max_length=12, max_steps=1)
    (batch,) = micro_batches(trainer, 8, 8)
    assert batch["prompt_ids"].tolist() == [ids(data[0]["prompt"])[-12:]] * 8
    trainer.train()


def test_without_a_padding_token(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    trainer = make_trainer(tmp_path, processing_class=tokenizer)
    trainer.train()
    assert tokenizer.pad_token == tokenizer.eos_token


def test_no_padding_and_no_end_token(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set TrOPDConfig\(pad_token="):
        make_trainer(tmp_path, processing_class=tokenizer)
    assert make_trainer(tmp_path, pad_token="<unk>")._tokenizer.pad_token == "<unk>"


def test_a_short_last_step(tmp_path):
    """10 rows in micro-batches of 4, two per step: the second step has 2 rows."""
    trainer = make_trainer(tmp_path, dataset=sums(10), max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 4
