"""kernels/embedding.py on a GPU: equal bits, which torch's atomics do not give."""

import pytest
import torch
from torch import nn

from kernels.embedding import lookup

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
