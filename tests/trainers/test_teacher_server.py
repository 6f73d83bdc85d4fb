"""A teacher behind a URL, against a stub that speaks vLLM's protocol, well, slowly, wrongly or not at all."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
import tropd_runs
from transformers import AutoConfig, AutoModelForCausalLM

from trl_ext import RLADConfig, RLADTrainer, TrOPDConfig, TrOPDTrainer
from trl_ext.tropd.objective import completion_loss


class Stub(BaseHTTPRequestHandler):
    """`/health`, `/v1/models` and `/v1/completions` with `prompt_logprobs`, computed by a tiny model."""

    def do_GET(self):
        if self.server.health != 200 or self.path not in ("/health", "/v1/models"):
            self.send_error(self.server.health if self.path == "/health" else 404)
        else:
            self.answer({"data": [{"id": "teacher", **self.server.served}]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        behaviour = self.server.behaviour
        if behaviour == "slow":
            time.sleep(3)
        elif behaviour == "failing" or (behaviour == "failing once" and len(self.server.requests) == 1):
            self.send_error(503)
            return
        vocabulary, longest = self.server.model.config.vocab_size, self.server.served.get("max_model_len", 1000)
        refusals = {
            f"Token id {vocabulary} is out of vocabulary": any(i >= vocabulary for ids in body["prompt"] for i in ids),
            f"This model's maximum context length is {longest} tokens": max(map(len, body["prompt"])) + 1 > longest,
            "Requested prompt logprobs, which is greater than max allowed: 20": body["prompt_logprobs"] > 20,
        }
        for message, refused in refusals.items():
            if refused:
                self.answer({"error": {"message": message}}, status=400)
                return
        choices = [{"prompt_logprobs": self.score(ids, body["prompt_logprobs"])} for ids in body["prompt"]]
        if behaviour == "truncated":
            for choice in choices:
                choice["prompt_logprobs"].pop()
        if behaviour == "html":
            self.answer("<html>", raw=True)
            return
        self.answer({"choices": choices})

    def score(self, ids, k):
        with torch.no_grad():
            logps = self.server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = [None]
        for position in range(1, len(ids)):
            row = logps[position - 1]
            order = row.argsort(descending=True).tolist()
            shown = {*order[:k], ids[position]}
            rows.append({str(t): {"logprob": row[t].item(), "rank": order.index(t) + 1} for t in shown})
            if self.server.behaviour == "positive":
                rows[-1] = {t: {"logprob": 1.0, "rank": entry["rank"]} for t, entry in rows[-1].items()}
            if self.server.behaviour == "unscored" and position % 7 == 0:
                rows[-1] = {t: {"logprob": float("nan"), "rank": entry["rank"]} for t, entry in rows[-1].items()}
        return rows

    def answer(self, content, raw=False, status=200):
        data = content.encode() if raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    # TRL's client asks for vLLM to be installed where it runs, though it only speaks HTTP
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    server.model, server.behaviour, server.requests = tiny.policy(1), "well", []
    server.health, server.served = 200, {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees its end
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tiny.save_policy(tmp_path / "student")


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def make_trainer(path, tmp_path, server, **settings):
    settings = {"teacher_model_server_url": url(server) + "/", **settings}
    args = RLADConfig(**tiny.grpo_settings(tmp_path, **settings))
    return RLADTrainer(path, tiny.digits_reward, args, tiny.prompts(), rollout_func=rollout)


def rollout(prompts, trainer):
    """Completions of unequal length, every other one without an end."""
    output = tiny.rollout(prompts, trainer)
    ends = [[1] if i % 2 else [] for i in range(len(prompts))]
    output["completion_ids"] = [ids[: 2 + i] + ends[i] for i, ids in enumerate(output["completion_ids"])]
    return {**output, "logprobs": None}


def rollout_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])


def expected_logps(server, batch):
    with torch.no_grad():
        return tiny.all_logps(server.model, batch)


def test_scores_and_top_k_of_unequal_completions(path, tmp_path, server):
    trainer = make_trainer(path, tmp_path, server)
    batch = rollout_batch(trainer)
    mask = batch["completion_mask"].bool()
    assert len({int(n) for n in mask.sum(1)}) > 1
    expected = expected_logps(server, batch)
    tokens = expected.gather(2, batch["completion_ids"][..., None]).squeeze(2)
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], tokens[mask], rtol=1e-4, atol=1e-4)
    scores = trainer.teacher.next_tokens(batch, 3, 8)
    torch.testing.assert_close(scores.top_k_logps[mask], expected.topk(3).values[mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.top_k_ids[mask], expected.topk(3).indices[mask])
    torch.testing.assert_close(scores.logps[mask], tokens[mask], rtol=1e-4, atol=1e-4)
    assert scores.entropy is None


def test_the_server_is_sent_the_teachers_own_prompt(path, tmp_path, server):
    trainer = make_trainer(path, tmp_path, server)
    trainer.train_dataset = trainer.train_dataset.add_column("teacher_prompt", [f"hint {i}" for i in range(32)])
    rollout_batch(trainer)
    hints = tiny.tokenizer()(["hint 0"] * 4 + ["hint 1"] * 4)["input_ids"]
    assert [ids[:6] for ids in server.requests[0]["prompt"]] == hints


def test_training_asks_once_a_rollout_batch(path, tmp_path, server):
    trainer = make_trainer(path, tmp_path, server)
    trainer.train()
    assert len(server.requests) == 2
    assert trainer.state.log_history[0]["teacher/log_ratio"] > 0


def test_a_completion_that_is_masked_whole_is_not_asked_for(path, tmp_path, server):
    trainer = make_trainer(path, tmp_path, server, mask_truncated_completions=True)
    batch = rollout_batch(trainer)
    kept = batch["completion_mask"].any(dim=1)
    assert 0 < kept.sum() < 8
    assert len(server.requests[0]["prompt"]) == kept.sum()
    assert batch["teacher_per_token_logps"][kept].isfinite().any(dim=1).all()
    trainer.compute_loss(trainer.model, batch)
    batch["completion_mask"].zero_()
    assert trainer.teacher.sampled_logps(batch, None).isnan().all()
    assert trainer.teacher.next_tokens(batch, 2, 8).top_k_logps.shape == (*batch["completion_ids"].shape, 2)


def test_tokens_without_a_score_are_neutral(path, tmp_path, server):
    server.behaviour = "unscored"
    batch = rollout_batch(make_trainer(path, tmp_path, server))
    missing = batch["teacher_per_token_logps"].isnan() & batch["completion_mask"].bool()
    assert 0 < missing.sum() < batch["completion_mask"].sum() / 2


@pytest.mark.parametrize("distillation", ["trrd", "kdrl"])
def test_the_distance_to_the_teacher_is_a_mean_over_the_tokens_that_it_scored(
    path, tmp_path, server, distillation, monkeypatch
):
    server.behaviour = "unscored"
    trainer = make_trainer(path, tmp_path, server, distillation=distillation, max_steps=1)
    batches, policy_loss = [], trainer.policy_loss
    monkeypatch.setattr(trainer, "policy_loss", lambda *args: batches.append(args) or policy_loss(*args))
    trainer.train()
    ((logps, _, _, mask, inputs),) = batches
    teacher = inputs["teacher_per_token_logps"]
    known = mask.bool() & teacher.isfinite()
    log = trainer.state.log_history[0]
    assert log["teacher/log_ratio"] == pytest.approx((logps.detach() - teacher)[known].mean().item(), rel=1e-3)
    assert log["teacher/log_ratio_abs"] == pytest.approx(
        (logps.detach() - teacher)[known].abs().mean().item(), rel=1e-3
    )
    assert log["teacher/neutral"] == pytest.approx(1 - known.sum().item() / mask.sum().item(), abs=1e-3)


def test_a_passing_fault_is_survived(path, tmp_path, server):
    server.behaviour = "failing once"
    batch = rollout_batch(make_trainer(path, tmp_path, server))
    assert len(server.requests) == 2
    assert batch["teacher_per_token_logps"][batch["completion_mask"].bool()].isfinite().all()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("failing", r"failed, with up to 3 retries of 0.5 s \("),
        ("slow", r"failed, with up to 3 retries of 0.5 s \("),
        ("html", r"failed, with up to 3 retries of 0.5 s \("),
        ("truncated", "which are not the log-probabilities of a completion"),
        ("positive", "which are not the log-probabilities of a completion"),
    ],
)
def test_a_lasting_fault_is_an_error_with_the_url(path, tmp_path, server, behaviour, message):
    trainer = make_trainer(path, tmp_path, server, teacher_server_timeout=0.5)
    server.behaviour = behaviour
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=message) as error:
        rollout_batch(trainer)
    assert time.monotonic() - start < 30
    assert url(server) in str(error.value)


def test_a_server_that_is_down_is_an_error_with_the_url(path, tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="start it with `vllm serve`, correct the URL") as error:
        make_trainer(path, tmp_path, server, teacher_server_timeout=0.2)
    assert url(server) in str(error.value)


@pytest.mark.parametrize(("health", "fault"), [(503, "status 503"), (404, "status 404")])
def test_a_server_that_is_not_healthy_is_waited_for_no_longer_than_asked(path, tmp_path, server, health, fault):
    server.health = health
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"was not ready within 0.5 s \(/health answered with {fault}\)"):
        make_trainer(path, tmp_path, server, teacher_server_timeout=0.5)
    assert time.monotonic() - start < 20


def test_the_url_of_the_api_is_the_servers(path, tmp_path, server):
    """`http://host:port/v1` is what an OpenAI client is given."""
    args = RLADConfig(**tiny.grpo_settings(tmp_path, teacher_model_server_url=url(server) + "/v1/"))
    trainer = RLADTrainer(path, tiny.digits_reward, args, tiny.prompts(), rollout_func=rollout)
    assert rollout_batch(trainer)["teacher_per_token_logps"].isfinite().any()


def test_what_is_beyond_the_servers_length_has_no_teacher(path, tmp_path, server, caplog):
    """The longest sequence takes all of `max_model_len`, of which one token is the one that the server generates."""
    trainer = make_trainer(path, tmp_path, server)
    whole = rollout_batch(trainer)
    lengths = whole["prompt_mask"].sum(1) + whole["completion_mask"].sum(1)
    trainer.teacher.max_length = server.served["max_model_len"] = int(lengths.max())
    scores = trainer.teacher.sampled_logps(whole, None)
    missing = scores.isnan() & whole["completion_mask"].bool()
    assert torch.equal(missing.sum(1), (lengths == lengths.max()).long())
    assert missing[:, :-1][whole["completion_mask"][:, 1:].bool()].sum() == 0  # the last tokens
    torch.testing.assert_close(scores[~missing], whole["teacher_per_token_logps"][~missing], equal_nan=True)
    assert "serve it with a larger --max-model-len" in caplog.text
    assert trainer.teacher.next_tokens(whole, 2, 8).top_k_logps[missing].isneginf().all()


def test_the_length_is_the_one_that_the_server_reports(path, tmp_path, server):
    server.served["max_model_len"] = 12
    assert make_trainer(path, tmp_path, server).teacher.max_length == 12


def test_a_token_that_the_teacher_does_not_know_has_no_teacher(path, tmp_path, server):
    trainer = make_trainer(path, tmp_path, server, teacher_model_name_or_path=path)
    batch = rollout_batch(trainer)
    expected = batch["teacher_per_token_logps"][:, 0].clone()
    batch["completion_ids"][:, 1] = server.model.config.vocab_size + 3
    scores = trainer.teacher.sampled_logps(batch, None)
    assert scores[:, 1].isnan().all()
    torch.testing.assert_close(scores[:, 0], expected)


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("vocabulary", "choose a teacher of the student's model family"),
        ("length", "serve it with a larger --max-model-len"),
        ("logprobs", "serve it with --max-logprobs 25"),
    ],
)
def test_a_refusal_names_its_remedy(path, tmp_path, server, fault, remedy):
    trainer = make_trainer(path, tmp_path, server)
    batch = rollout_batch(trainer)
    if fault == "vocabulary":
        batch["completion_ids"][0, 0] = 1000
    elif fault == "length":
        server.served["max_model_len"] = 8  # unknown to the teacher, as with a server that does not report it
    with pytest.raises(ConnectionError, match=remedy):
        trainer.teacher.next_tokens(batch, 25 if fault == "logprobs" else 3, 8)


def test_tokens_without_a_score_have_no_top_k_mass(tmp_path):
    """The mean is over those that the server has scored."""
    inputs = {name: torch.zeros(1, 2).long() for name in ("guided_mask", "off_policy_mask")}
    inputs |= {"completion_mask": torch.ones(1, 2).long(), "draws": torch.zeros(1, 2)}
    inputs |= {"teacher_logps": torch.tensor([[-1.0, torch.nan]]), "top_k_ids": torch.zeros(1, 2, 2).long()}
    inputs["top_k_logps"] = torch.tensor([[0.6, 0.3], [0.0, 0.0]]).log()[None]
    args = TrOPDConfig(**tropd_runs.settings(tmp_path, outlier_top_k=2))
    _, metrics = completion_loss(args, True, torch.full((1, 2, 3), -1.0), torch.ones(1, 2), inputs)
    ((values, mask),) = [
        (found["teacher/top_k_mass"], mask) for found, mask in metrics if "teacher/top_k_mass" in found
    ]
    assert mask.tolist() == [[True, False]]
    assert values[mask].tolist() == [pytest.approx(0.9)]


def test_temperature_is_refused(path, tmp_path, server):
    with pytest.raises(ValueError, match=r"scores at temperature 1 only.*set it to 1.0"):
        make_trainer(path, tmp_path, server, temperature=0.7)


def test_the_served_models_tokenizer_is_loaded_as_the_settings_say(path, tmp_path, server, monkeypatch, caplog):
    loaded, load = [], AutoConfig.from_pretrained.__func__

    def record(cls, name, **options):
        loaded.append((options.get("revision"), options.get("trust_remote_code")))
        return load(cls, name, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", classmethod(record))
    settings = {"teacher_model_revision": "v2", "trust_remote_code": True, "teacher_model_name_or_path": path}
    make_trainer(path, tmp_path, server, **settings)
    assert loaded.count(("v2", True)) >= 2  # to see that it is a language model, and for its vocabulary
    assert "has no effect" not in caplog.text
    make_trainer(path, tmp_path, server, teacher_model_init_kwargs={"dtype": "bfloat16"})
    assert "teacher_model_init_kwargs has no effect on a teacher behind a URL" in caplog.text


def test_the_served_models_tokenizer_is_checked_where_it_is_named(path, tmp_path, server):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["zz"])  # the student knows one more than the teacher
    student = tmp_path / "student with one more"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(student)
    tokenizer.save_pretrained(student)
    with pytest.raises(ValueError, match="'zz' for the student and unknown to the teacher"):
        make_trainer(str(student), tmp_path, server, teacher_model_name_or_path=path)
    make_trainer(path, tmp_path, server, teacher_model_name_or_path=path)
    server.served["root"] = path  # of a server on this machine: no need to name it
    with pytest.raises(ValueError, match="'zz' for the student and unknown to the teacher"):
        make_trainer(str(student), tmp_path, server)


def test_a_served_model_that_is_not_here_is_not_checked(path, tmp_path, server, caplog):
    server.served["root"] = str(tmp_path / "on another machine")
    make_trainer(path, tmp_path, server)
    assert "nothing checks that its tokenizer is the student's: set teacher_model_name_or_path" in caplog.text


def tropd_trainer(tmp_path, server, **overrides):
    settings = tropd_runs.settings(tmp_path, teacher_model_server_url=url(server))
    args = TrOPDConfig(**{**settings, "outlier_top_k": 5, **overrides})
    return TrOPDTrainer(tiny.policy(), None, args, train_dataset=tropd_runs.sums(), processing_class=tiny.tokenizer())


def test_tropd_learns_from_a_server(tmp_path, server):
    trainer = tropd_trainer(tmp_path, server)
    tropd_runs.hash_rollouts(trainer)
    (batch,) = tropd_runs.micro_batches(trainer, 8, 8)
    mask = batch["completion_mask"].bool()
    expected = expected_logps(server, batch)
    tokens = expected.gather(2, batch["completion_ids"][..., None]).squeeze(2)
    torch.testing.assert_close(batch["teacher_logps"][mask], tokens[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["top_k_logps"][mask], expected.topk(5).values[mask], rtol=1e-4, atol=1e-4)
    server.requests.clear()
    trainer.train()
    assert len(server.requests) == 8  # one a micro-batch
    assert "teacher/entropy" not in trainer.state.log_history[0]  # a server does not tell it
    assert trainer.state.log_history[0]["outliers/share"] > 0


def test_tropd_leaves_out_what_the_server_could_not_score(tmp_path, server):
    server.behaviour = "unscored"
    trainer = tropd_trainer(tmp_path, server)
    loss, gradients = tropd_runs.gradient(trainer, tropd_runs.micro_batches(trainer))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        ({"guidance": "teacher"}, "guidance='dataset'"),
        ({"objective": "eopd"}, "choose another objective"),
        ({"lmbda": 0.5, "seq_kd": True}, "lmbda=1.0"),
        ({"temperature": 0.9}, "set it to 1.0"),
    ],
)
def test_what_tropd_cannot_ask_of_a_server(tmp_path, server, overrides, fix):
    with pytest.raises(ValueError, match=fix):
        tropd_trainer(tmp_path, server, **overrides)
