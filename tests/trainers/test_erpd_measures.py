"""What ERPD measures of its policies, and with which weights and random numbers."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_erpd import right_or_wrong
from tiny_erpd_trainer import hand_made_batch, make_trainer

from trl_ext.erpd.fixed_set import FixedSet
from trl_ext.erpd.measures import measure_samples, own_samples, sampling_seed


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def with_dropout(path, tmp_path, **arguments):
    """A trainer amid its training, with an adapter that dropout makes a difference to."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    trainer = make_trainer(path, tmp_path, peft_config=adapter, **arguments)
    trainer.model.train()
    return trainer


def test_the_set_is_scored_without_dropout(path, tmp_path):
    trainer = with_dropout(path, tmp_path)
    trainer._stages.fixed_set = FixedSet([hand_made_batch()], num_tokens=7)
    scores = []
    for _ in range(2):
        trainer._stages._score("base")
        scores.append(trainer._stages.fixed_set.batches[0]["base_logps"])
    assert torch.equal(*scores)
    assert trainer.model.training


def test_policies_are_measured_without_dropout(path, tmp_path):
    """The divergence of a policy from itself is 0."""
    trainer = with_dropout(path, tmp_path, eval_dataset=tiny.prompts(2))
    assert measure_samples(trainer._host, own_samples(trainer._host), base_is_loaded=True)["kl_per_sequence"] == 0
    assert trainer.model.training


def test_samples_have_random_numbers_of_their_own(path, tmp_path):
    trainer = make_trainer(path, tmp_path, eval_dataset=tiny.prompts(2))
    completions = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (sample,) = own_samples(trainer._host)
        completions.append(sample["completion_ids"])
    assert torch.equal(*completions)


@pytest.mark.parametrize(
    ("engine", "seeds"),
    [
        ({"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2}, [7, 7, 8, 8]),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2}, [7, 8, 9, 10]),
        ({"use_vllm": False, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2}, [7, 8, 9, 10]),
    ],
)
def test_the_ranks_of_one_engine_draw_alike(engine, seeds):
    """And no two engines: each rank of a colocated engine generates all of its prompts, and takes its share."""
    trainers = [
        SimpleNamespace(args=SimpleNamespace(seed=7, **engine), accelerator=SimpleNamespace(process_index=process))
        for process in range(4)
    ]
    assert [sampling_seed(trainer) for trainer in trainers] == seeds


def test_every_held_out_data_set_is_measured(path, tmp_path):
    """2 and 4 prompts, 4 completions each."""
    trainer = make_trainer(path, tmp_path, eval_dataset={"few": tiny.prompts(2), "more": tiny.prompts(4)})
    assert sum(len(sample["rewards"]) for sample in own_samples(trainer._host)) == (2 + 4) * 4


@pytest.mark.parametrize("base_is_loaded", [False, True])
def test_measures_are_means_over_what_counts(base_is_loaded):
    """Neither tokens of a tool nor padding count, nor do rewards that are not there."""
    nan = math.nan
    sample = {
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]),
        "rewards": torch.tensor([1.0, nan]),
        "entropies": torch.tensor([[1.0, 100.0, 2.0], [3.0, 4.0, 100.0]]),
        "logps": torch.tensor([[-1.0, -100.0, -1.0], [-2.0, -2.0, -100.0]]),
    }
    second = {name: values[:1] for name, values in sample.items()} | {"rewards": torch.tensor([0.0])}
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda values: values)
    host = SimpleNamespace(
        trainer=SimpleNamespace(accelerator=accelerator),
        score=lambda batch: (torch.full_like(batch["logps"], -3.0), None),
        measuring=nullcontext,
    )
    measures = measure_samples(host, [sample, second], base_is_loaded)
    expected = {"reward": (1 + 0) / 2, "entropy": (1 + 2 + 3 + 4 + 1 + 2) / 6}
    if base_is_loaded:  # log-ratios of 2 nats on two tokens of the first and third sequence, of 1 nat on the second's
        expected |= {"kl_per_sequence": (2 * 2 + 2 * 1 + 2 * 2) / 3, "kl_per_token": (2 * 2 + 2 * 1 + 2 * 2) / 6}
    assert measures == pytest.approx(expected)


@pytest.mark.parametrize("signal", ["teacher", "unlearned_reference"])
def test_a_teacher_that_is_only_as_good_as_the_base_is_announced(path, tmp_path, caplog, signal):
    """But not where the signal has an unlearned policy beside it, which is there for such teachers."""
    trainer = make_trainer(
        path, tmp_path, reward=right_or_wrong, signal=signal, extraction_loss="sapo", eval_dataset=tiny.prompts(2),
    )  # fmt: skip
    sample = trainer._host.sample

    def all_right_on_held_out_prompts(rows):
        sampled = sample(rows)
        return sampled if trainer.model.training else sampled._replace(rewards=torch.ones_like(sampled.rewards))

    trainer._host.sample = all_right_on_held_out_prompts
    trainer.train()
    announced = "is no better than the base policy (reward 1.000 against 1.000" in caplog.text
    assert announced == (signal == "teacher")


class StubEngine:
    """In place of vLLM: remembers the weights that it has been given."""

    def __init__(self, trainer):
        self.trainer, self.weights = trainer, None

    def sync_weights(self):
        self.weights = [p.detach().clone() for p in self.trainer.model.parameters()]

    def generate(self, prompts, images=None, num_generations=1, **kwargs):
        output = tiny.rollout(self.trainer.processing_class.batch_decode(prompts), self.trainer)
        logprobs = [[[math.nan if x is None else x] for x in scores] for scores in output["logprobs"]]
        return output["prompt_ids"], output["completion_ids"], logprobs, None


def test_an_engine_learns_of_the_restored_base(path, tmp_path, monkeypatch):
    """What is sampled after the boundary, in the step in which the teacher has been measured, is the base's."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **kwargs: None)
    trainer = make_trainer(path, tmp_path, eval_dataset=tiny.prompts(2), use_vllm=True, vllm_mode="colocate")
    engine = trainer.vllm_generation = StubEngine(trainer)
    weights, end_phase = {}, trainer._stages.end_phase

    def end(phase):
        end_phase(phase)
        if phase.stage == 1:
            weights["measured"] = engine.weights
            own_samples(trainer._host)
            weights["restored"] = engine.weights

    trainer._stages.end_phase = end
    base = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(p, q) for p, q in zip(weights["measured"], base, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(weights["restored"], base, strict=True))
