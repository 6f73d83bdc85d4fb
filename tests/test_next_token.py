"""Next-token distributions in chunks against the model's own whole logits, for heads of every kind."""

import os
import socket

import pytest
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    xLSTMConfig,
)

from trl_ext import next_token
from trl_ext.next_token import HeadScaling, next_tokens, selected_logps


SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
HEADS = {
    "untied": Qwen3Config(**SIZE, tie_word_embeddings=False),
    "tied": Qwen3Config(**SIZE, tie_word_embeddings=True),
    "soft-capped": Gemma2Config(**SIZE, final_logit_softcapping=2.0),
    "scaled": CohereConfig(**SIZE, logit_scale=0.25),
    "divided": GraniteConfig(**SIZE, logits_scaling=4.0),
}


@pytest.fixture(params=[1, 50 * 4, 2**25], ids=["a row", "4 rows", "all"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(next_token, "CHUNK_ELEMENTS", request.param)


def model_and_batch(config, bias=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if bias:
        model.lm_head = torch.nn.Linear(32, 50, bias=True)
    ids, mask = torch.randint(2, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0
    mask[1, 6:] = 0
    return model, ids, mask


@pytest.mark.parametrize("bias", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_next_tokens_are_those_of_the_models_own_logits(config, bias, chunks):
    model, ids, mask = model_and_batch(config, bias)
    scores = next_tokens(model, ids, mask, logits_to_keep=4, k=5, temperature=0.7)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -5:-1]
    logps = (logits / 0.7).log_softmax(-1)
    valid = mask[:, -4:].bool()
    expected = logps.topk(5)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(scores.top_k_logps[valid], expected.values[valid], **close)
    assert torch.equal(scores.top_k_ids[valid], expected.indices[valid])
    sampled = logps.gather(2, ids[:, -4:, None]).squeeze(2)
    torch.testing.assert_close(scores.logps[valid], sampled[valid], **close)
    torch.testing.assert_close(scores.entropy[valid], -(logps.exp() * logps).sum(-1)[valid], **close)
    assert all((tensor[~valid] == 0).all() for tensor in scores)


def test_every_name_of_a_soft_cap_is_known():
    for config in (RecurrentGemmaConfig(logits_soft_cap=7.0), xLSTMConfig(output_logit_soft_cap=7.0)):
        assert HeadScaling.of(config, 1.0).softcap == 7.0


def test_a_model_without_a_part_below_its_head_is_refused():
    model, ids, mask = model_and_batch(HEADS["untied"])
    model.base_model_prefix = ""  # as Llama 4's is
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM has no part below its LM head .*: use another"):
        next_tokens(model, ids, mask, logits_to_keep=4, k=5)


def test_a_smaller_vocabulary_bounds_the_likeliest_tokens_only():
    model, ids, mask = model_and_batch(HEADS["untied"])
    scores = next_tokens(model, ids, mask, logits_to_keep=4, k=5, vocab_size=20)
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits[:, -5:-1].log_softmax(-1)  # over all 50 still
    valid = mask[:, -4:].bool()
    torch.testing.assert_close(scores.top_k_logps[valid], logps[..., :20].topk(5).values[valid], rtol=1e-4, atol=1e-5)


def test_padding_does_not_shift_absolute_positions():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    ).eval()
    ids = torch.randint(2, 50, (1, 6))
    alone = next_tokens(model, ids, torch.ones_like(ids), logits_to_keep=3, k=2)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 5).long()[None]
    torch.testing.assert_close(next_tokens(model, padded, mask, logits_to_keep=3, k=2), alone)


def head(dtype, rows=13, vocabulary=50, width=8, m=4, bias=True):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    ids = torch.randint(vocabulary, (rows, m), generator=generator)
    ids[0] = 3  # the same token more than once
    return tensor(rows, width), tensor(vocabulary, width), tensor(vocabulary) if bias else None, ids


@pytest.mark.parametrize("scaling", [(1.0, None, 1.0), (0.25, None, 0.7), (2.0, 1.5, 1.3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_selected_logps_have_the_values_and_gradients_of_whole_logits(scaling, bias, chunks):
    hidden, weight, b, ids = head(torch.float64, bias=bias)
    inputs = [x for x in (hidden, weight, b) if x is not None]
    logps, entropy = selected_logps(hidden, weight, b, ids, HeadScaling(*scaling))
    scale, softcap, temperature = scaling
    logits = torch.nn.functional.linear(hidden, weight, b) * scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    whole = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(logps, whole.gather(1, ids))
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1))
    assert not entropy.requires_grad
    weights = torch.randn(logps.shape, dtype=torch.float64)
    ours = torch.autograd.grad((logps * weights).sum(), inputs)
    theirs = torch.autograd.grad((whole.gather(1, ids) * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_is_unchunked(dtype, monkeypatch):
    hidden, weight, bias, ids = head(dtype, rows=37, vocabulary=101, width=16, m=3)
    results = []
    for elements in (2**25, 101 * 5):
        monkeypatch.setattr(next_token, "CHUNK_ELEMENTS", elements)
        logps, entropy = selected_logps(hidden, weight, bias, ids, HeadScaling(1.0, None, 0.9))
        assert logps.dtype == entropy.dtype == torch.float32
        results.append((logps, entropy, *torch.autograd.grad(logps.sum(), (hidden, weight, bias))))
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, **tolerance)


def test_bfloat16_is_close_to_float64():
    """Both sums over the vocabulary and sums over the chunks are in float32: only the products are in bfloat16."""
    arguments = head(torch.bfloat16, rows=200, vocabulary=300, width=16, m=2)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in arguments[:3]]
    grads = []
    for hidden, weight, bias in (arguments[:3], exact):
        logps, _ = selected_logps(hidden, weight, bias, arguments[3], HeadScaling(1.0, None, 1.0))
        grads.append((logps, *torch.autograd.grad(logps.sum(), (hidden, weight, bias))))
    for half, double in zip(*grads, strict=True):
        assert (half.double() - double).norm() < 0.01 * double.norm()


def test_a_frozen_head_has_no_gradient():
    hidden, weight, bias, ids = head(torch.float32)
    logps, _ = selected_logps(hidden, weight.detach(), bias.detach(), ids, HeadScaling(1.0, None, 1.0))
    largest = tiny.LargestTensor()
    with largest:
        logps.sum().backward()
    assert hidden.grad is not None
    assert largest.elements == 13 * 50


def test_no_positions():
    hidden, weight, bias, ids = head(torch.float32)
    logps, entropy = selected_logps(hidden[:0], weight, bias, ids[:0], HeadScaling(1.0, None, 1.0))
    logps.sum().backward()
    assert logps.shape == (0, 4)
    assert entropy.shape == (0,)
    assert weight.grad.abs().sum() == 0


def test_autocast_computes_products_in_its_dtype():
    hidden, weight, bias, ids = head(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = selected_logps(hidden, weight, bias, ids, HeadScaling(1.0, None, 1.0))
    half = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    expected, _ = selected_logps(*half, ids, HeadScaling(1.0, None, 1.0))
    assert torch.equal(logps, expected)
    assert torch.autograd.grad(logps.sum(), weight)[0].dtype == torch.float32


def test_the_logits_of_all_positions_never_exist(monkeypatch):
    rows, vocabulary = 64, 1000
    monkeypatch.setattr(next_token, "CHUNK_ELEMENTS", 4 * vocabulary)
    hidden, weight, bias, ids = head(torch.float32, rows=rows, vocabulary=vocabulary)
    largest = tiny.LargestTensor()
    with largest:
        selected_logps(hidden, weight, bias, ids, HeadScaling(1.0, None, 1.0))[0].sum().backward()
    assert largest.elements == weight.numel() == 8 * vocabulary  # the weight's own gradient
    assert largest.elements < rows * vocabulary


def _gradient_of_a_sharded_head(rank, port, results):
    """In one of two processes: the gradient of an FSDP2-like head for a loss that is another in each."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    mesh = init_device_mesh("cpu", (2,))
    model = tiny.policy()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    inputs = torch.full((head.weight.shape[1],), float(1 + 2 * rank))  # 1 and 3
    with next_token.gathered_head(model) as (weight, _):
        (weight @ inputs).sum().backward()
    gradient = head.weight.grad.full_tensor()
    if rank == 0:
        torch.save(gradient, results)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process in its teardown, which is not what is tested here


@pytest.mark.slow
def test_the_gradient_of_a_sharded_head_is_averaged_over_the_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_gradient_of_a_sharded_head, (port, tmp_path / "gradient"), nprocs=2)
    gradient = torch.load(tmp_path / "gradient")
    assert torch.equal(gradient, torch.full_like(gradient, 2.0))  # as FSDP2 averages, where DDP and ZeRO do
