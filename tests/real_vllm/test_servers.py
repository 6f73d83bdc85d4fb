"""vLLM as a server: of the teacher, and of the policy, whose weights are sent through a file here instead of NCCL."""

from pathlib import Path

import engine
import pytest
import requests
import tiny
import torch
import tropd_runs
from engine_runs import compare_with_model, make_trainer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from trl_ext import TrOPDConfig, TrOPDTrainer


class Server:
    """One vLLM server for all tests of this file, with the weights that it was sent last."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, self.folder / "model.safetensors")
        answer = requests.post(f"{self.url}/collective_rpc", json={"method": "reload_weights"}, timeout=300)
        answer.raise_for_status()


# Wider than the policies of the other tests, and with more rows in its embedding than the tokenizer has tokens
SHAPE = {"hidden_size": 48, "vocab_size": 64}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    engine.save_policy(folder, seed=2, **SHAPE)
    flags = ("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")
    with engine.serve(folder, *flags, VLLM_SERVER_DEV_MODE="1") as url:
        yield Server(folder, url)


@pytest.mark.supports("rlad", "vLLM as teacher server")
@pytest.mark.supports("tropd", "vLLM as teacher server")
def test_a_served_teacher_scores_as_a_local_one(tmp_path, server):
    student = engine.save_policy(tmp_path / "student")
    local = AutoModelForCausalLM.from_pretrained(engine.save_policy(tmp_path / "teacher", seed=1, **SHAPE))
    server.load(local.state_dict())
    rlad = make_trainer("rlad", student, tmp_path, teacher_model_server_url=server.url)
    rlad.model.train()
    rlad.current_gradient_accumulation_steps = 1
    batch = rlad._prepare_inputs([rlad.train_dataset[i // 4] for i in range(8)])
    mask = batch["completion_mask"].bool()
    expected = next_token_logps(local, batch)
    tokens = expected.gather(2, batch["completion_ids"][..., None]).squeeze(2)
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], tokens[mask], rtol=0, atol=1e-5)
    rlad.train()
    assert all(log["grad_norm"] > 0 for log in rlad.state.log_history if "grad_norm" in log)

    settings = tropd_runs.settings(tmp_path / "tropd", teacher_model_server_url=server.url, guidance="none")
    arguments = {"train_dataset": tropd_runs.sums(), "processing_class": tiny.tokenizer()}
    tropd = TrOPDTrainer(student, args=TrOPDConfig(**settings), **arguments)
    for batch in tropd_runs.micro_batches(tropd):
        mask = batch["completion_mask"].bool()
        expected = next_token_logps(local, batch)
        tokens = expected.gather(2, batch["completion_ids"][..., None]).squeeze(2)
        torch.testing.assert_close(batch["teacher_logps"][mask], tokens[mask], rtol=0, atol=1e-5)
        top = expected.topk(8).values
        known = (top > -1e30) & batch["top_k_logps"].isfinite()
        torch.testing.assert_close(batch["top_k_logps"][mask][known[mask]], top[mask][known[mask]], rtol=0, atol=1e-5)
    tropd.train()
    assert all(log["grad_norm"] > 0 for log in tropd.state.log_history if "grad_norm" in log)


def next_token_logps(model, batch):
    """Of every completion token, from full logits."""
    length = batch["prompt_ids"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, length - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.supports(name, "vLLM server, weights through a file"))
        for name in ("drpo", "rlad", "tropd", "erpd")
    ],
)
def test_the_server_samples_from_the_model_that_is_trained(tmp_path, monkeypatch, server, name):
    client = "trl.generation.vllm_client.VLLMClient."
    monkeypatch.setattr(client + "init_communicator", lambda self, device: None)  # NCCL, which needs a GPU
    monkeypatch.setattr(client + "update_named_params", lambda self, metadata, params: server.load(dict(params)))
    path = engine.save_policy(tmp_path / "policy", **SHAPE)
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    trainer = make_trainer(name, path, tmp_path, **settings)
    differences = compare_with_model(trainer)
    trainer.train()
    assert len(differences) >= 2
    assert max(differences) < 1e-4
