"""kernels/embedding.py on a GPU: equal bits, which torch's atomics do not give."""

import pytest
import torch
from torch import nn

from kernels.embedding import lookup, rows_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [2, 128, 512, 30528])
def test_equal_inputs_give_equal_bits_also_in_a_graph(rows):
    generator = torch.Generator("cuda").manual_seed(0)
    embedding = nn.Embedding(rows, 1024, device="cuda")
    ids = torch.randint(rows, (32768,), generator=generator, device="cuda")
    grad = torch.randn(32768, 1024, generator=generator, device="cuda")

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(lookup(embedding, ids), embedding.weight, grad)[0]

    first = gradient()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    for _ in range(5):
        graph.replay()
        assert torch.equal(gradient(), first) and torch.equal(captured, first)
    exact = torch.zeros(rows, 1024, dtype=torch.float64, device="cuda").index_add_(0, ids, grad.double())
    assert (first - exact).norm() < 1e-6 * exact.norm()


def test_rows_that_come_up_again_give_equal_bits_where_all_gradients_but_two_are_zero():
    """As those of unused places of masked tokens are: in bf16, and in a graph."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(32768, 1024, generator=generator, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    firsts = torch.arange(0, 32768, 128, device="cuda")
    used = torch.randperm(32768, generator=generator, device="cuda")[:4000]
    assert (used % 128 == 0).any()  # a first token that is also predicted
    places = torch.cat([used, firsts.repeat_interleave(4), firsts])
    grad = torch.randn(len(places), 1024, generator=generator, device="cuda", dtype=torch.bfloat16)
    grad[len(used) : -len(firsts)] = 0

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(rows_of(x, places), x, grad)[0]

    graph = torch.cuda.CUDAGraph()
    gradient()
    with torch.cuda.graph(graph):
        captured = gradient()
    graph.replay()
    expected = torch.zeros_like(x, requires_grad=False)
    expected[used] = grad[: len(used)]
    expected[firsts] = expected[firsts] + grad[-len(firsts) :]
    assert torch.equal(gradient(), expected) and torch.equal(captured, expected)
