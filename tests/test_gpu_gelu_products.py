"""kernels/gelu_products.py and kernels/feed_forward.py on a GPU: against float64, compiled, as a CUDA graph; in whole
models, tests/test_gpu_steps.py."""

import pytest
import torch
from product_checks import HALF_DTYPES, normal, unavailable

pytestmark = pytest.mark.gpu
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda dtype: str(dtype)[6:])

if torch.cuda.is_available():  # they import Triton
    from gelu_products_checks import (
        OUTER,
        check_equal_bits_and_other_layouts,
        check_feed_forward,
        check_kernels,
        check_operators,
        layers_of,
        results_of,
    )

    from kernels.feed_forward import feed_forward


@pytest.fixture(autouse=True, scope="module")
def kernels():
    reason = unavailable()
    if reason:
        pytest.skip(reason)


@half_dtypes
@pytest.mark.parametrize("width", [16, 32, 48, 64])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 64), (7, 272), (129, 1040), (4097, 3072), (32768, 4096)])
def test_gelu_its_gradients_and_narrow_products(tokens, columns, width, dtype):
    check_kernels("cuda", dtype, tokens, columns, width)


@half_dtypes
def test_equal_bits_and_other_layouts(dtype):
    check_equal_bits_and_other_layouts("cuda", dtype)
    check_operators("cuda", dtype)


@half_dtypes
@pytest.mark.parametrize(("shape", "ranks", "m"), [((1,), (8, 40), 4), ((3, 129), (16, 64), 4), ((4097,), (1, 16), 8)])
def test_a_feed_forward_network_is_as_exact_as_its_layers(shape, ranks, m, dtype):
    check_feed_forward("cuda", dtype, shape, ranks, m)


def test_compiled_it_is_as_exact():
    torch.compiler.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, dynamic=True)
    for tokens in (384, 130):
        check_feed_forward("cuda", torch.bfloat16, (tokens,), function=compiled)


def test_captured_it_reads_its_inputs_anew():
    layers, x = layers_of("cuda", torch.bfloat16), normal("cuda", 1000, OUTER, seed=5, dtype=torch.bfloat16)
    results_of(feed_forward, layers, x)  # compiles
    inputs, grad = [x.clone().requires_grad_(), *layers.parameters()], torch.ones_like(x)
    inputs = [tensor for tensor in inputs if tensor is not layers[1].bias]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(feed_forward(inputs[0], *layers)[0], inputs, grad)
    with torch.no_grad():
        inputs[0].mul_(0.5)
    graph.replay()
    again = torch.autograd.grad(feed_forward(inputs[0], *layers)[0], inputs, grad)
    assert all(map(torch.equal, found, again))
