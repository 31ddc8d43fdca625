"""kernels/dense_kernels.py on a GPU: against float64, and as a CUDA graph; in compiled blocks, test_gpu_steps.py."""

import pytest
import torch

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)

if torch.cuda.is_available():  # they import Triton
    from dense_kernels_checks import (
        check_equal_bits,
        check_gelu,
        check_norm,
        check_other_layouts,
        gradients,
        norm_sample,
    )

    from kernels.dense_parts import dropout_add_layer_norm


@DTYPES
@pytest.mark.parametrize(("tokens", "columns"), [(1, 64), (129, 1100), (4097, 3072), (16384, 4096)])
def test_gelu_and_its_gradients(tokens, columns, dtype):
    check_gelu("cuda", dtype, tokens, columns)


@DTYPES
@pytest.mark.parametrize(("probability", "twice"), [(0.0, False), (0.1, True), (0.5, False)])
@pytest.mark.parametrize("shape", [(1, 96), (4097, 768), (16, 129, 1024), (33, 5120)], ids=str)
def test_gradients_of_the_end_of_half_a_block(shape, probability, twice, dtype):
    check_norm("cuda", dtype, shape, probability, twice)


def test_equal_bits_and_other_layouts():
    check_equal_bits("cuda", torch.bfloat16)
    check_other_layouts("cuda", torch.bfloat16)


def test_captured_they_read_their_inputs_anew():
    inputs, grads = norm_sample("cuda", torch.bfloat16, (1000, 1024))

    def end(*given):
        return dropout_add_layer_norm(*given, 0.0, 1e-12, True, kernels=True)

    gradients(end, inputs, grads)  # compiles
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(end(*leaves), leaves, grads)
    with torch.no_grad():
        for tensor in leaves:
            tensor.mul_(0.5)
    graph.replay()
    assert all(map(torch.equal, found, gradients(end, leaves, grads)))
