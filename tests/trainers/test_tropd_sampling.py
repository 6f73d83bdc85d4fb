"""What TrOPDTrainer samples: from which distribution, with which random numbers, with `generate` and with vLLM."""

import inspect

import pytest
import tiny
import torch
from datasets import Dataset
from trl.generation.vllm_generation import VLLMGeneration
from tropd_runs import assert_same, gradient, hash_rollouts, hashed_completion, make_trainer, micro_batches


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

    def sample(prompts):
        return (
            trainer.sampler.from_student(prompts, 1)[0]
            if who == "student"
            else trainer.sampler.from_teacher(prompts, 1)
        )

    torch.manual_seed(0)
    drawn = frequencies([c for _ in range(4) for c in sample([prompt] * 1000)], 50)
    with torch.no_grad():
        expected = (models[who](input_ids=torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    assert (drawn - expected).abs().sum() < 0.12  # 4000 draws over 50 tokens differ by about 0.08
    assert ((drawn - 1 / 50).abs().sum()) > 0.3
    assert models[who].generation_config.repetition_penalty == 1e6  # restored


def biased_to(token, seed=0, **settings):
    """A model that almost always samples the same token."""
    model = tiny.policy(seed, **settings)
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, bias=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[token] = 50.0
    return model


def test_a_completion_keeps_its_end_token(tmp_path):
    trainer = make_trainer(tmp_path, biased_to(1))
    assert trainer.sampler.from_student([[5, 6]] * 3, 10) == ([[1]] * 3, None)


def test_a_completion_of_the_teacher_ends_with_its_own_end_token(tmp_path):
    teacher = biased_to(7)
    trainer = make_trainer(tmp_path, teacher=teacher)
    assert trainer.sampler.from_teacher([[5, 6]], 4) == [[7] * 4]
    trainer.teacher.eos_token_ids = {7}
    trainer.sampler = type(trainer.sampler)(trainer)
    assert trainer.sampler.from_teacher([[5, 6]], 4) == [[7]]
    assert trainer.sampler.without_end([3, 7, 4]) == [3]
    assert len(trainer.sampler.from_student([[5, 6]] * 8, 4)[0]) == 8


def test_a_completion_of_the_teacher_ends_before_a_token_outside_the_students_vocabulary(tmp_path):
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
    assert torch.equal(torch.get_rng_state(), state)  # the training's random numbers are not disturbed
    assert torch.equal(first["completion_ids"], again["completion_ids"])
    assert torch.equal(first["draws"], again["draws"])
    for different in (other, later):
        assert different["completion_ids"].tolist() != first["completion_ids"].tolist()
        assert different["draws"].tolist() != first["draws"].tolist()
    rows = first["draws"][0][first["completion_mask"][0].bool()]
    assert len(set(rows.tolist())) == len(rows)  # each token has its own


def test_dropout_is_off_while_sampling_and_on_in_training(tmp_path):
    student, teacher = tiny.policy(attention_dropout=0.5), tiny.policy(seed=1, attention_dropout=0.5)
    trainer = make_trainer(tmp_path, student, teacher.train(), disable_dropout=False)
    assert not trainer.teacher.model.training
    (first,), (again,) = micro_batches(trainer, 8, 8), micro_batches(trainer, 8, 8)
    assert torch.equal(first["completion_ids"], again["completion_ids"])
    assert torch.equal(first["teacher_logps"], again["teacher_logps"])
    assert trainer.model.training
    scores = [trainer._score(trainer.model, first)[0] for _ in range(2)]
    assert not torch.equal(*scores)  # the training pass has dropout


def test_bfloat16_scores_student_and_teacher_in_the_same_way(tmp_path):
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


# vLLM


class StubEngine:
    """In place of vLLM: completions that depend on the prompt alone; records weights, prompts and random draws."""

    logps = None  # of a token, by its number

    def __init__(self, **kwargs):
        self.settings, self.syncs, self.prompts, self.draws = kwargs, 0, [], []

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations):
        assert images is None
        assert num_generations == 1
        self.prompts.append(prompts)
        self.draws.append(torch.rand(()).item())
        completions = [hashed_completion(prompt) for prompt in prompts]
        logps = self.logps and [[[self.logps(token)] for token in completion] for completion in completions]
        return prompts, completions, logps, None


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
    assert [len(prompts) for prompts in engine.prompts] == [8] * 4  # the same number on every process
    assert engine.settings["temperature"] == 0.8
    assert engine.settings["max_completion_length"] == 10
    assert engine.settings.keys() <= inspect.signature(VLLMGeneration.__init__).parameters.keys()


def test_vllms_log_probabilities_are_compared_with_the_trainers(tmp_path, vllm_stub, monkeypatch):
    """On the student's own tokens alone, without those that a prefix gives or vLLM has no value for."""
    monkeypatch.setattr(StubEngine, "logps", staticmethod(lambda token: None if token % 7 == 0 else -float(token)))
    trainer = make_trainer(tmp_path, use_vllm=True, guidance="dataset", max_steps=1)
    seen, total, count = [], 0.0, 0
    score = trainer._run_score

    def record(model, batch):
        seen.append((batch, *score(model, batch)))
        return seen[-1][1:]

    trainer._run_score = record
    trainer.train()
    for batch, logps, *_ in seen:
        for row in range(len(logps)):
            own = batch["completion_mask"][row].bool() & ~batch["guided_mask"][row].bool()
            for token, logp in zip(batch["completion_ids"][row][own], logps[row, :, 0][own], strict=True):
                if token % 7:
                    total, count = total + abs(logp.item() + token.item()), count + 1
    assert any(batch["guided_mask"].any() for batch, *_ in seen)
    assert trainer.state.log_history[0]["sampling/fresh_log_ratio_abs"] == pytest.approx(total / count, rel=1e-4)


def test_processes_have_the_same_metrics_whoever_writes_their_completions(tmp_path, vllm_stub, monkeypatch):
    """Those that only draw completions of the dataset, too: the metrics of all are gathered in one tensor."""
    monkeypatch.setattr(StubEngine, "logps", staticmethod(lambda token: -1.0))
    names = set()
    for lmbda in (0.0, 1.0):
        trainer = make_trainer(tmp_path, use_vllm=True, lmbda=lmbda)
        (batch,) = micro_batches(trainer, 4, 4)
        assert batch["off_policy_mask"].any() == (lmbda == 0)
        names.add(frozenset(batch))
        assert batch["sampler_logps"].isfinite().any() == (lmbda == 1)
    assert len(names) == 1


@pytest.mark.parametrize(
    ("engine", "alike"),
    [
        ({"vllm_tensor_parallel_size": 2}, [0, 0, 1, 1]),  # each rank of an engine generates all of its prompts
        ({"vllm_tensor_parallel_size": 1}, [0, 1, 2, 3]),
        ({"vllm_tensor_parallel_size": 2, "vllm_mode": "server"}, [0, 1, 2, 3]),
    ],
)
def test_the_ranks_of_one_engine_draw_the_same_and_no_others_do(tmp_path, monkeypatch, vllm_stub, engine, alike):
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


def test_a_missing_vllm_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.tropd.sampling.is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match="pip install trl"):
        make_trainer(tmp_path, use_vllm=True)
