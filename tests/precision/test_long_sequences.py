"""Next-token functions on 32,768 positions: never the (position, vocabulary) tensor, near float64."""

import tiny
import torch

from trl_ext import next_token
from trl_ext.next_token import HeadScaling, likeliest_tokens, selected_logps


POSITIONS, VOCABULARY, WIDTH, K = 32_768, 2_000, 8, 4
SCALING = HeadScaling(1.0, None, 1.0)


def head(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (POSITIONS, 1 + K), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


def test_32768_positions_are_scored_in_chunks_of_bounded_size():
    hidden, weight, ids = head(torch.float32)
    largest = tiny.LargestTensor()
    with largest:
        scores = likeliest_tokens(hidden, weight, None, ids[:, 0], K, SCALING)
        logps, entropy = selected_logps(hidden, weight, None, ids, SCALING)
        gradients = torch.autograd.grad(logps.mean(), (hidden, weight))
    assert largest.elements <= next_token.CHUNK_ELEMENTS < POSITIONS * VOCABULARY / 3
    torch.testing.assert_close(scores.logps, logps[:, 0].detach())
    torch.testing.assert_close(scores.entropy, entropy)

    rows = torch.arange(0, POSITIONS, 1_000)  # of all chunks
    exact_hidden, exact_weight, _ = head(torch.float64)
    exact = (exact_hidden[rows] @ exact_weight.T).log_softmax(-1)
    error = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logps[rows].double(), exact.gather(1, ids[rows]), **error)
    torch.testing.assert_close(entropy[rows].double(), -(exact.exp() * exact).sum(-1), **error)
    torch.testing.assert_close(scores.top_k_logps[rows].double(), exact.topk(K).values, **error)
    expected = torch.autograd.grad(exact.gather(1, ids[rows]).sum(), exact_hidden)[0][rows]
    torch.testing.assert_close(gradients[0][rows].double() * logps.numel(), expected, **error)


def test_the_gradient_of_the_head_is_summed_over_32768_positions_without_losing_precision():
    exact_hidden, exact_weight, ids = head(torch.float64, vocabulary=100)
    exact = torch.autograd.grad(
        selected_logps(exact_hidden, exact_weight, None, ids, SCALING)[0].mean(), exact_weight
    )[0]
    for dtype, error in ((torch.float32, 5e-5), (torch.bfloat16, 1e-2)):
        hidden, weight, _ = head(dtype, vocabulary=100)
        gradient = torch.autograd.grad(selected_logps(hidden, weight, None, ids, SCALING)[0].mean(), weight)[0]
        assert (gradient.double() - exact).norm() < error * exact.norm()
