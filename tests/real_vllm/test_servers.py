"""vLLM as a server: of the teacher, and of the policy, whose weights travel by disk here instead of NCCL."""

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


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return engine.save_policy(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=48, vocab_size=64)


@pytest.mark.supports("rlad", "vLLM as teacher server")
@pytest.mark.supports("tropd", "vLLM as teacher server")
def test_a_served_teacher_scores_as_a_local_one(tmp_path, teacher):
    path = engine.save_policy(tmp_path / "student")
    local = AutoModelForCausalLM.from_pretrained(teacher)
    with engine.serve(teacher, "--max-logprobs", "64") as url:
        rlad = make_trainer("rlad", path, tmp_path, teacher_model_server_url=url)
        rlad.model.train()
        rlad.current_gradient_accumulation_steps = 1
        batch = rlad._prepare_inputs([rlad.train_dataset[i // 4] for i in range(8)])
        mask = batch["completion_mask"].bool()
        expected = next_token_logps(local, batch)
        tokens = expected.gather(2, batch["completion_ids"][..., None]).squeeze(2)
        torch.testing.assert_close(batch["teacher_per_token_logps"][mask], tokens[mask], rtol=0, atol=1e-5)
        rlad.train()
        assert all(log["grad_norm"] > 0 for log in rlad.state.log_history if "grad_norm" in log)

        settings = tropd_runs.settings(tmp_path / "tropd", teacher_model_server_url=url, guidance="none")
        arguments = {"train_dataset": tropd_runs.sums(), "processing_class": tiny.tokenizer()}
        tropd = TrOPDTrainer(path, args=TrOPDConfig(**settings), **arguments)
        for batch in tropd_runs.micro_batches(tropd):
            mask = batch["completion_mask"].bool()
            expected = next_token_logps(local, batch)
            tokens = expected.gather(2, batch["completion_ids"][..., None]).squeeze(2)
            torch.testing.assert_close(batch["teacher_logps"][mask], tokens[mask], rtol=0, atol=1e-5)
            top = expected.topk(8).values
            known = (top > -1e30) & batch["top_k_logps"].isfinite()
            torch.testing.assert_close(
                batch["top_k_logps"][mask][known[mask]], top[mask][known[mask]], rtol=0, atol=1e-5
            )
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


def test_the_server_samples_from_the_model_that_is_trained(tmp_path, monkeypatch):
    path, served = (engine.save_policy(tmp_path / name) for name in ("policy", "served"))

    def send_by_disk(client, metadata, parameters):
        save_file({name: p.contiguous() for name, p in parameters}, f"{served}/model.safetensors", {"format": "pt"})
        answer = requests.post(f"{client.base_url}/collective_rpc", json={"method": "reload_weights"}, timeout=60)
        answer.raise_for_status()

    client = "trl.generation.vllm_client.VLLMClient."
    monkeypatch.setattr(client + "init_communicator", lambda self, device: None)  # NCCL, which needs a GPU
    monkeypatch.setattr(client + "update_named_params", send_by_disk)
    flags = ("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")
    with engine.serve(served, *flags, VLLM_SERVER_DEV_MODE="1") as url:
        for name in ("drpo", "rlad", "tropd", "erpd"):
            server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
            trainer = make_trainer(name, path, tmp_path / name, **server)
            differences = compare_with_model(trainer)
            trainer.train()
            assert len(differences) >= 2, name
            assert max(differences) < 1e-4, name
