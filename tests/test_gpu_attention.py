"""kernels/short_attention.py on a GPU: against float64, compiled, as a CUDA graph, and beside flash attention."""

import pytest
import torch

pytestmark = pytest.mark.gpu
HALF_DTYPES = (torch.bfloat16, torch.float16)

if torch.cuda.is_available():  # they import Triton
    from attention_checks import (
        LENGTHS,
        boundaries_of,
        check,
        check_equal_bits,
        check_nothing_behind_a_sequence_is_touched,
        check_other_strides,
        draw,
        gradients,
    )

    from kernels.short_attention import short_attention


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("heads", "size"), [(16, 64), (3, 32), (2, 16)])
def test_output_and_gradients_are_the_exact_ones(heads, size, dropout_p, dtype):
    check("cuda", dtype, heads, size, dropout_p)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_scores_that_lie_far_apart(dtype):
    check("cuda", dtype, spread=6.0)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_equal_bits_places_and_strides(dtype):
    check_equal_bits("cuda", dtype)
    check_nothing_behind_a_sequence_is_touched("cuda", dtype)
    check_other_strides("cuda", dtype)


def test_compiled_it_is_one_graph_and_the_same():
    *inputs, grad = draw("cuda", torch.bfloat16, heads=16, size=64)
    boundaries = boundaries_of(LENGTHS, "cuda")

    def attention(qkv, bias):
        return 2 * short_attention(qkv, bias, boundaries, 0.0)

    expected = gradients(attention, inputs, grad)
    found = gradients(torch.compile(attention, fullgraph=True), inputs, grad)
    assert all(map(torch.equal, found, expected))


def test_captured_it_reads_its_inputs_anew():
    qkv, bias, _ = draw("cuda", torch.bfloat16, heads=16, size=64)
    boundaries, graph = boundaries_of(LENGTHS, "cuda"), torch.cuda.CUDAGraph()
    short_attention(qkv, bias, boundaries, 0.0)  # compiles
    with torch.cuda.graph(graph):
        out = short_attention(qkv, bias, boundaries, 0.0)
    for tensor in (qkv, bias):
        tensor.mul_(0.5)
    graph.replay()
    assert torch.equal(out, short_attention(qkv, bias, boundaries, 0.0))
