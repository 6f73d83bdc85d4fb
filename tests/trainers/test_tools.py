"""
Rollouts of several turns: TRL's tool loop, `environment_factory`, and a `rollout_func` that takes turns with an
environment. What the policy did not write neither trains nor counts, and the teacher scores the rest in its context.
"""

import string
from pathlib import Path

import pytest
import tiny
import torch
import trl
from datasets import Dataset

from trl_ext import DRPOConfig, DRPOTrainer, ERPDConfig, ERPDTrainer, RLADConfig, RLADTrainer


CLASSES = {
    "drpo": (DRPOTrainer, DRPOConfig),
    "rlad": (RLADTrainer, RLADConfig),
    "erpd": (ERPDTrainer, ERPDConfig),
}
# One update for each of the two teachers, and one of the distilled policy
OWN_SETTINGS = {
    "erpd": {"max_steps": -1, "prompts_per_round": 2, "extraction_passes": 1, "distillation_passes": 1},
}
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 4}}\n</tool_call><|im_end|>'
ANSWERS = ["It is 21.<|im_end|>", "21<|im_end|>", "Twenty-one<|im_end|>", "I do not know<|im_end|>"]


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


class Calculator:
    """An environment with `add` as its tool, which rewards its use."""

    def reset(self, **kwargs) -> None:
        self.results = []

    def add(self, a: int, b: int) -> int:
        """
        Adds two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.results.append(a + b)
        return a + b

    def get_reward(self) -> float:
        return float(self.results == [21])


def tokenizer():
    """Qwen3's template, whose tool calls TRL can read."""
    tokenizer = tiny.tokenizer(string.printable)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS, "eos_token": "<|im_end|>"})
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def make_trainer(name, tmp_path, rewards, prompts, processing_class, **arguments):
    vocabulary = {"vocab_size": len(processing_class), "eos_token_id": processing_class.eos_token_id}
    vocabulary["max_position_embeddings"] = 2048
    trainer_class, config_class = CLASSES[name]
    if name == "rlad":
        arguments["teacher_model"] = tiny.policy(seed=1, **vocabulary)
    settings = {"max_completion_length": 256, "max_steps": 2, "num_iterations": 1, **OWN_SETTINGS.get(name, {})}
    settings = tiny.grpo_settings(tmp_path, **settings)
    model = tiny.policy(**vocabulary)
    return trainer_class(
        model, rewards, config_class(**settings), prompts, processing_class=processing_class, **arguments
    )


def questions():
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is 17 + {i}?"}]} for i in range(8)])


def write_by_script(trainer):
    """Every other completion calls the tool in its first turn. Rows that have called it, or need not, answer."""
    tokenizer = trainer.processing_class

    def scripted(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        texts = []
        for i, ids in enumerate(prompt_ids):
            calls = i % 2 == 0 and "<tool_response>" not in tokenizer.decode(ids)
            texts.append(CALL if calls else ANSWERS[i % 4])
        return [tokenizer(text)["input_ids"] for text in texts], None

    trainer._generate_single_turn = scripted


def record_batches(trainer):
    batches, policy_loss = [], trainer.policy_loss

    def recorded(logps, behaviour_logps, advantages, mask, inputs):
        batches.append({**inputs, "mask": mask.bool(), "behaviour_logps": behaviour_logps})
        return policy_loss(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = recorded
    return batches


def assert_trains_on_what_the_policy_wrote(trainer, batches):
    tokenizer = trainer.processing_class
    called = 0
    for batch in batches:
        for ids, mask, written in zip(
            batch["completion_ids"], batch["completion_mask"].bool(), batch["mask"], strict=True
        ):
            whole, own = tokenizer.decode(ids[mask]), tokenizer.decode(ids[written])
            if "<tool_call>" in whole:
                called += 1
                assert "<tool_response>\n21\n</tool_response>" in whole
                assert own == CALL + next(answer for answer in ANSWERS if whole.endswith(answer))
            else:
                assert own == whole
    assert called == len(batches) * 4
    for (name, ours), start in zip(trainer.model.named_parameters(), start_of(trainer).parameters(), strict=True):
        assert not torch.equal(ours, start), name


def start_of(trainer):
    config = trainer.model.config
    return tiny.policy(vocab_size=config.vocab_size, max_position_embeddings=2048)


def assert_teacher_scored_in_context(trainer, batch):
    with torch.no_grad():
        expected = tiny.naive_logps(trainer.teacher.model, batch)
    own = batch["mask"]
    torch.testing.assert_close(batch["teacher_per_token_logps"][own], expected[own], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("environment", [False, True])
def test_the_teachers_own_prompt_has_the_tools_of_the_rows_environment(tmp_path, environment):
    hint = [{"role": "user", "content": "What is 17 + 4? It is 21."}]
    data = questions().add_column("teacher_prompt", [hint] * 8)
    arguments = {"environment_factory": Calculator} if environment else {"tools": [add]}
    rewards = None if environment else lambda completions, **kwargs: [float(len(str(c))) for c in completions]
    trainer = make_trainer("rlad", tmp_path, rewards, data, tokenizer(), **arguments)
    write_by_script(trainer)
    seen, score = [], trainer.teacher.sampled_logps
    trainer.teacher.sampled_logps = lambda batch, scores: seen.append(batch) or score(batch, scores)
    trainer.train()
    for ids, mask in zip(seen[0]["prompt_ids"], seen[0]["prompt_mask"].bool(), strict=True):
        text = trainer.processing_class.decode(ids[mask])
        assert "It is 21." in text
        assert '"name": "add"' in text


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.supports(n, "tool loop")) for n in CLASSES])
def test_tool_loop(tmp_path, name):
    def brevity(completions, **kwargs):
        return [-float(len(str(completion))) for completion in completions]

    trainer = make_trainer(name, tmp_path, brevity, questions(), tokenizer(), tools=[add])
    write_by_script(trainer)
    batches = record_batches(trainer)
    trainer.train()
    assert_trains_on_what_the_policy_wrote(trainer, batches)
    log = trainer.state.log_history[0]
    assert log["tools/call_frequency"] == 0.5
    assert log["tools/failure_frequency"] == 0
    if name == "rlad":
        assert_teacher_scored_in_context(trainer, batches[0])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(n, "environment_factory")) for n in CLASSES]
)
def test_environment_factory(tmp_path, name):
    """The environment has the tool and the reward; no reward function is given."""
    trainer = make_trainer(name, tmp_path, None, questions(), tokenizer(), environment_factory=Calculator)
    write_by_script(trainer)
    batches = record_batches(trainer)
    trainer.train()
    assert_trains_on_what_the_policy_wrote(trainer, batches)
    assert trainer.state.log_history[0]["reward"] == 0.5
    for batch in batches:
        called = (batch["completion_mask"].bool() & ~batch["mask"]).any(1)
        assert torch.equal(batch["advantages"] > 0, called)
    if name == "rlad":
        assert_teacher_scored_in_context(trainer, batches[0])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(n, "multi-turn rollout_func")) for n in CLASSES]
)
def test_rollout_func_of_two_turns(tmp_path, name):
    """The policy writes, the environment replies, and the policy writes again, with the log-probabilities of both."""
    reply = tiny.tokenizer()("; is it? ")["input_ids"]

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        first = tiny.rollout(prompts, trainer)
        turns = zip(prompts, first["completion_ids"], strict=True)
        contexts = [prompt + tokenizer.decode([*ids, *reply], skip_special_tokens=True) for prompt, ids in turns]
        second = tiny.rollout(contexts, trainer)
        output = {"prompt_ids": first["prompt_ids"], "completion_ids": [], "logprobs": [], "env_mask": []}
        for i in range(len(prompts)):
            own = [first["completion_ids"][i], second["completion_ids"][i]]
            output["completion_ids"].append([*own[0], *reply, *own[1]])
            output["env_mask"].append([1] * len(own[0]) + [0] * len(reply) + [1] * len(own[1]))
            output["logprobs"].append([*first["logprobs"][i], *[0.0] * len(reply), *second["logprobs"][i]])
        return output

    prompts = tiny.prompts()
    trainer = make_trainer(name, tmp_path, tiny.digits_reward, prompts, tiny.tokenizer(), rollout_func=rollout)
    batches = record_batches(trainer)
    trainer.train()
    for batch in batches:
        ids, own = batch["completion_ids"], batch["mask"]
        for row, written, real in zip(ids, own, batch["completion_mask"].bool(), strict=True):
            assert row[real & ~written].tolist() == reply
        if name == "drpo":
            assert batch["behaviour_logps"] is batch["sampling_per_token_logps"]
            missing = (~batch["behaviour_logps"].isfinite())[own].float().mean()
            assert 0.05 < missing < 0.25  # every fifth token of a turn is not scored
        elif name == "rlad":
            assert_teacher_scored_in_context(trainer, batch)
        else:
            expected = tiny.naive_logps(start_of(trainer), batch).detach()
            torch.testing.assert_close(batch["base_logps"][own], expected[own], rtol=1e-4, atol=1e-4)
    for (parameter, ours), start in zip(trainer.model.named_parameters(), start_of(trainer).parameters(), strict=True):
        assert not torch.equal(ours, start), parameter
