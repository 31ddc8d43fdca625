"""kernels/embedding.py on a GPU: equal bits, which torch's atomics do not give; and kernels/embedding_kernels.py."""

import pytest
import torch
from torch import nn

from kernels.embedding import lookup, rows_of

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():  # they import Triton
    import embedding_kernels_checks as checks


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


# ----------------------------------------------------------------------------------------------------------- kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
LARGE = {"words": 30528, "positions": 512}


@DTYPES
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("shape", "hidden"), [((256, 128), 1024), ((3, 37), 768), ((1, 1), 96)], ids=str)
def test_the_kernels_give_embeddings_and_their_gradients(shape, hidden, packed, probability, dtype):
    shape = (shape[0] * shape[1],) if packed else shape
    checks.check_embedding("cuda", dtype, shape, hidden, packed, probability, **LARGE)


@pytest.mark.parametrize(("types", "count"), [(1, 1), (2, 1), (5, 2)])
def test_other_numbers_of_types_and_of_gradients(types, count):
    checks.check_embedding("cuda", torch.bfloat16, (1000,), 1024, count=count, types=types)


def test_sums_by_id_whatever_chunks_the_ids_lie_in():
    for lengths in (*([1 + i % 70] for i in range(140)), [32768], [3900, 1, 1, 28000, 866], *checks.RUNS.values()):
        checks.check_runs("cuda", lengths)
    checks.check_padding("cuda")
    checks.check_more_ids_than_16_bits_hold("cuda")
    checks.check_gradients_in_other_layouts("cuda")


def test_captured_they_read_ids_and_tables_anew():
    parts = checks.Parts("cuda", 1024, **LARGE)
    ids, grads = parts.ids((32768,), True), parts.grads((32768,), torch.bfloat16, 2)
    parts.run(ids, 0.0, torch.bfloat16, grads)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.autocast("cuda", torch.bfloat16), torch.cuda.graph(graph):
        outputs = checks.embed(*parts.tables, parts.norm, *ids, 0.0, twice=True)
        captured = torch.autograd.grad(outputs, parts.weights, grads)
    for _ in range(2):
        with torch.no_grad():
            ids[0].copy_(ids[0].flip(0) // 2)
            parts.tables[0].weight.mul_(0.5)
        graph.replay()
        y, found = parts.run(ids, 0.0, torch.bfloat16, grads)
        assert torch.equal(outputs[0], y) and all(map(torch.equal, captured, found))


def test_captured_dropout_draws_anew_in_each_replay_and_the_same_in_both_passes():
    parts = checks.Parts("cuda", 1024, **LARGE)
    ids, grads = parts.ids((4096,), True), parts.grads((4096,), torch.float32, 1)
    parts.run(ids, 0.1, torch.float32, grads)
    with torch.no_grad():
        parts.norm.bias.fill_(100.0)  # no output is 0 but what dropout leaves out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = checks.embed(*parts.tables, parts.norm, *ids, 0.1)
        to_bias = torch.autograd.grad(y, parts.norm.bias, grads)[0]
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append((y != 0).double())
        exact = (masks[-1] / 0.9 * grads[0].double()).sum(0)
        assert (to_bias - exact).norm() < 1e-6 * exact.norm()
    assert 0.89 < masks[0].mean() < 0.91 and not torch.equal(*masks)
