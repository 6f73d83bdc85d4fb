"""What ERPD measures of its policies, and with which weights and random numbers."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_erpd import assert_equal, parameters, right_or_wrong
from tiny_erpd_runs import Recorder, make_run, with_key
from tiny_erpd_trainer import hand_made_batch, make_trainer

from trl_ext.erpd.fixed_set import FixedSet
from trl_ext.erpd.measures import measure_samples, own_samples, sampling_seed


def with_dropout(path, tmp_path, **arguments):
    """A trainer in the middle of its training, with an adapter whose dropout changes its scores."""
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
def test_the_ranks_of_one_engine_draw_the_same(engine, seeds):
    """And no two engines: each rank of a colocated engine generates all of its prompts, and takes its share."""
    trainers = [
        SimpleNamespace(args=SimpleNamespace(seed=7, **engine), accelerator=SimpleNamespace(process_index=process))
        for process in range(4)
    ]
    assert [sampling_seed(trainer) for trainer in trainers] == seeds


def test_every_held_out_data_set_is_measured(path, tmp_path):
    """2 and 4 prompts, 4 completions each, also from workers that TRL keeps."""
    data = {"few": tiny.prompts(2), "more": tiny.prompts(4)}
    for workers in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = make_trainer(path, tmp_path, eval_dataset=data, **workers)
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


# ---- whole runs


def test_measures_on_held_out_prompts(path, tmp_path):
    eval_dataset = tiny.prompts(8)
    trainer = make_run(
        path,
        tmp_path,
        eval_dataset=eval_dataset,
        per_device_eval_batch_size=8,
        temperature=0.8,
        num_generations_eval=2,
    )
    trainer.train()
    base, teacher, distilled = (with_key(trainer, f"{n}/reward")[0] for n in ("base", "teacher_ce", "distilled"))
    assert "base/kl_per_sequence" not in base  # which could only be 0
    assert [log["step"] for log in (base, teacher, distilled)] == [0, 8, 16]
    for name, log in (("teacher_ce", teacher), ("distilled", distilled)):
        assert 0 <= log[f"{name}/reward"] <= 1
        assert log[f"{name}/kl_per_sequence"] > log[f"{name}/kl_per_token"] > 0
    assert not any(name.startswith("eval_") for log in trainer.state.log_history for name in log)


def test_divergence_and_entropy_are_those_of_full_distributions(path, tmp_path, monkeypatch):
    """On own samples of the policy, the base's log-probabilities with the base's weights, and back again."""
    from trl_ext.erpd import stages

    seen, original = [], stages.own_samples

    def watched(host):
        seen.append(original(host))
        return seen[-1]

    monkeypatch.setattr(stages, "own_samples", watched)
    trainer = make_run(path, tmp_path, eval_dataset=tiny.prompts(8), per_device_eval_batch_size=8)
    start = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.train()
    final = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    sums = {"kl": 0.0, "entropy": 0.0, "tokens": 0, "sequences": 0, "reward": 0.0}
    for sample in seen[-1]:
        mask, results = sample["completion_mask"].bool(), []
        for weights in (final, start):
            trainer.model.load_state_dict(weights)
            with torch.no_grad():
                results.append(tiny.naive_logps(trainer.model.eval(), sample))
        assert torch.allclose(results[0][mask], sample["logps"][mask], atol=1e-4)  # the distilled policy's samples
        sums["kl"] += (results[0] - results[1])[mask].sum().item()
        sums["entropy"] += sample["entropies"][mask].sum().item()
        sums["tokens"] += mask.sum().item()
        sums["sequences"] += len(mask)
        sums["reward"] += sample["rewards"].sum().item()
    log = with_key(trainer, "distilled/reward")[0]
    assert log["distilled/kl_per_sequence"] == pytest.approx(sums["kl"] / sums["sequences"], rel=1e-3)
    assert log["distilled/kl_per_token"] == pytest.approx(sums["kl"] / sums["tokens"], rel=1e-3)
    assert log["distilled/entropy"] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-5)
    assert log["distilled/reward"] == pytest.approx(sums["reward"] / sums["sequences"])


def test_measuring_does_not_change_the_training(path, tmp_path):
    plain = make_run(path, tmp_path, rounds=2, extraction_passes=1, distillation_passes=1)
    plain.train()
    measured = make_run(
        path, tmp_path, rounds=2, extraction_passes=1, distillation_passes=1, eval_dataset=tiny.prompts(8),
        per_device_eval_batch_size=8,
    )  # fmt: skip
    measured.train()
    assert_equal(parameters(measured), parameters(plain))


def test_measures_on_the_set_without_held_out_prompts(path, tmp_path):
    trainer = make_run(path, tmp_path, trainer_class=Recorder)
    trainer.train()
    log = with_key(trainer, "teacher_ce/set_kl_per_sequence")[0]
    batches = trainer.record[2][4]  # at the start of stage 2: the base's scores
    trainer.model.load_state_dict(trainer.record[1][2])
    kl = tokens = good = count = 0.0
    for batch in batches:
        with torch.no_grad():
            difference = (batch["base_logps"] - tiny.naive_logps(trainer.model.eval(), batch)) * batch[
                "completion_mask"
            ]
        kl += difference.sum().item()
        tokens += batch["completion_mask"].sum().item()
        good -= difference.sum(1)[batch["advantages"] > 0].sum().item()
        count += (batch["advantages"] > 0).sum().item()
    assert log["teacher_ce/set_kl_per_sequence"] == pytest.approx(kl / 32, rel=1e-3)
    assert log["teacher_ce/set_kl_per_token"] == pytest.approx(kl / tokens, rel=1e-3)
    assert log["teacher_ce/set_log_ratio_of_correct"] == pytest.approx(good / count, rel=1e-3)
    assert with_key(trainer, "distilled/set_kl_per_sequence")[0]["step"] == 16


def test_prompts_that_only_fill_up_the_last_batch_do_not_count(path, tmp_path, monkeypatch):
    """As on several processes, where the last batches begin again with the first prompts."""
    held_out = tiny.prompts(3)
    trainer = make_run(path, tmp_path, eval_dataset=held_out, per_device_eval_batch_size=8, num_generations_eval=4)
    trainer._stages.base.take()
    rows = [held_out[i] for i in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0)]
    monkeypatch.setattr(trainer, "get_eval_dataloader", lambda dataset: [rows[:8], rows[8:]])
    samples = own_samples(trainer._host)
    assert [sample["rewards"].isnan().tolist() for sample in samples] == [[False] * 8, [False] * 4 + [True] * 4]
    assert samples[1]["completion_mask"][4:].sum() == 0
    assert samples[1]["completion_mask"][:4].sum() > 0
