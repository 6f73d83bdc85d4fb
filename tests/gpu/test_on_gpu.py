"""What only a GPU can show. Run by `python benchmarks/gpu_report.py`, or with `pytest -m gpu tests`."""

import pytest
import tiny
import torch
from loss_table import LOSSES, random_inputs
from torch.nn.functional import cross_entropy
from trl import GRPOConfig, GRPOTrainer

from trl_ext import DRPOConfig, DRPOTrainer
from trl_ext.next_token import HeadScaling, likeliest_tokens, selected_logps


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCABULARY, WIDTH, K = 151_936, 1024, 64
SCALING = HeadScaling(1.0, None, 1.0)


def head(positions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5
    ids = torch.randint(VOCABULARY, (positions, 1 + K), device="cuda")
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def allocated_by(work) -> int:
    """Bytes at the highest point of `work` above what was allocated before."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def test_the_fused_head_in_bfloat16_is_near_float64():
    hidden, weight, ids = head(256)
    logps, entropy = selected_logps(hidden, weight, None, ids, SCALING)
    ours = torch.autograd.grad(logps.mean(), (hidden, weight))
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = (exact_hidden @ exact_weight.T).log_softmax(-1)
    theirs = torch.autograd.grad(exact.gather(1, ids).mean(), (exact_hidden, exact_weight))
    # A product in bfloat16 is 2^-9 of itself off: 0.02 nats for logits of up to 5
    torch.testing.assert_close(logps.double(), exact.gather(1, ids), rtol=0, atol=0.05)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=0.01)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.double() - their).norm() < 0.01 * their.norm()


def test_the_fused_head_needs_a_fraction_of_the_memory_of_whole_logits():
    hidden, weight, ids = head(8192)

    def fused():
        likeliest_tokens(hidden, weight, None, ids[:, 0], K, SCALING)
        selected_logps(hidden, weight, None, ids, SCALING)[0].mean().backward()

    def whole():
        cross_entropy((hidden @ weight.T).float(), ids[:, 0]).backward()

    measured = []
    for work in (fused, whole):
        hidden.grad = weight.grad = None
        measured.append(allocated_by(work))
    logits = 8192 * VOCABULARY * 4
    assert measured[0] < 0.25 * logits < logits < measured[1]


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_gpu(name):
    inputs = random_inputs(vocabulary=50).to(torch.float32)
    for field, value in vars(inputs).items():
        setattr(inputs, field, value.detach().cuda().requires_grad_(value.requires_grad))
    LOSSES[name](inputs).loss.sum().backward()  # what is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        LOSSES[name](inputs).loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_drpo_needs_the_memory_of_grpo(tmp_path):
    """With 4 layers of width 512 and a vocabulary of 32,768, where logits and activations outweigh the weights."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 32_768}
    memory = {}
    for name, trainer_class, config in (("grpo", GRPOTrainer, GRPOConfig), ("drpo", DRPOTrainer, DRPOConfig)):
        settings = tiny.grpo_settings(tmp_path / name, max_steps=2, max_completion_length=512, bf16=True)
        del settings["use_cpu"]
        trainer = trainer_class(
            tiny.save_policy(tmp_path / f"{name}-policy", **shape),
            tiny.digits_reward,
            config(**settings),
            tiny.prompts(),
            rollout_func=long_rollout,
        )
        memory[name] = allocated_by(trainer.train)
        del trainer
    assert memory["drpo"] < 1.05 * memory["grpo"]


def long_rollout(prompts, trainer):
    completion = torch.arange(512).remainder(40).add(3).tolist()
    return {
        "prompt_ids": [[3, 4, 5] for _ in prompts],
        "completion_ids": [completion for _ in prompts],
        "logprobs": [[-3.0] * len(completion) for _ in prompts],
    }
