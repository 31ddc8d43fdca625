"""kernels/short_attention.py, and kernels/blockwise_attention.py from 129 tokens on, on a GPU: against float64,
compiled, as a CUDA graph, and beside flash attention.
"""

import pytest
import torch

pytestmark = pytest.mark.gpu
HALF_DTYPES = (torch.bfloat16, torch.float16)

if torch.cuda.is_available():  # they import Triton
    from attention_checks import (
        attention_of,
        boundaries_of,
        check,
        check_dropout_is_independent,
        check_equal_bits,
        check_nothing_behind_a_sequence_is_touched,
        check_other_strides,
        check_three_tensors,
        draw,
        gradients,
        lengths_for,
    )


both = pytest.mark.parametrize("longest", [128, 512])


@both
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("heads", "size"), [(16, 64), (3, 32), (2, 16)])
def test_output_and_gradients_are_the_exact_ones(heads, size, dropout_p, dtype, longest):
    check("cuda", dtype, heads, size, dropout_p, longest=longest)


@both
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_scores_that_lie_far_apart(dtype, longest):
    check("cuda", dtype, spread=6.0, longest=longest)


@both
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_equal_bits_places_and_strides(dtype, longest):
    check_other_strides("cuda", dtype, longest)
    for size in (32, 64):
        check_equal_bits("cuda", dtype, size, longest)
        check_nothing_behind_a_sequence_is_touched("cuda", dtype, size, longest)
        check_three_tensors("cuda", dtype, size, longest)


def test_the_mask_has_no_pattern():
    check_dropout_is_independent("cuda")


@both
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_at_full_size_equal_inputs_give_equal_bits(dtype, longest):
    """A race between warps would not."""
    lengths = [longest] * (2**15 // longest - 1) + [77]
    *inputs, grad = draw("cuda", dtype, heads=16, size=64, lengths=lengths)
    boundaries = boundaries_of(lengths, "cuda")
    results = []
    for _ in range(4):
        torch.manual_seed(5)
        results.append(gradients(attention_of(boundaries, 0.1, longest=longest), inputs, grad))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@both
def test_compiled_it_is_one_graph_and_the_same(longest):
    *inputs, grad = draw("cuda", torch.bfloat16, heads=16, size=64, lengths=lengths_for(longest))
    boundaries = boundaries_of(lengths_for(longest), "cuda")

    for apart in (False, True):
        plain = attention_of(boundaries, apart=apart, longest=longest)

        def attention(qkv, bias, plain=plain):
            return 2 * plain(qkv, bias)

        expected = gradients(attention, inputs, grad)
        found = gradients(torch.compile(attention, fullgraph=True), inputs, grad)
        assert all(map(torch.equal, found, expected))


@both
def test_captured_it_reads_its_inputs_anew(longest):
    qkv, bias, _ = draw("cuda", torch.bfloat16, heads=16, size=64, lengths=lengths_for(longest))
    boundaries, graph = boundaries_of(lengths_for(longest), "cuda"), torch.cuda.CUDAGraph()
    attention = attention_of(boundaries, longest=longest)
    attention(qkv, bias)  # compiles
    with torch.cuda.graph(graph):
        out = attention(qkv, bias)
    for tensor in (qkv, bias):
        tensor.mul_(0.5)
    graph.replay()
    assert torch.equal(out, attention(qkv, bias))
