"""kernels/dense_kernels.py in Triton's interpreter, which runs the kernels on CPU tensors: checks as on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/dense_kernels_interpreted.py    # as tests/test_block_kernels.py does
"""

from dataclasses import replace

import pytest
import torch
from dense_kernels_checks import check_equal_bits, check_gelu, check_norm, check_other_layouts
from test_compiled_parts import CONFIG, LENGTHS, additions_of, batch_of, check_results, results_of

from modeling import BertForPreTraining, compiled_parts, use_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(("tokens", "columns"), [(1, 64), (7, 1024), (53, 3072), (24, 1100)])
def test_gelu_and_its_gradients(tokens, columns, dtype):
    check_gelu("cpu", dtype, tokens, columns)


@DTYPES
@pytest.mark.parametrize(("probability", "twice"), [(0.0, False), (0.1, True), (0.5, False)])
@pytest.mark.parametrize("shape", [(1, 96), (53, 768), (3, 9, 1024)], ids=str)
def test_gradients_of_the_end_of_half_a_block(shape, probability, twice, dtype):
    check_norm("cpu", dtype, shape, probability, twice)


@pytest.mark.parametrize("shape", [(1, 5), (256, 3, 40), (300, 3, 40), (528, 64)], ids=str)
def test_all_shares_are_added_up(shape):
    from kernels.triton_parts import sum_of_shares

    shares = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(sum_of_shares(shares), shares.sum(0))  # whole numbers: in any order


def test_equal_inputs_give_equal_bits():
    check_equal_bits("cpu", torch.float16)


def test_other_layouts():
    check_other_layouts("cpu", torch.float16)


def plain_model() -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(replace(CONFIG, hidden_size=64, intermediate_size=128))


def compiled_model() -> BertForPreTraining:
    torch.compiler.reset()
    model = plain_model()
    use_kernels(model)
    for part in compiled_parts(model):
        part.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    return model


def test_a_compiled_model_learns_what_it_does_without_kernels():
    """Losses and gradients; whole graphs, one for all numbers of tokens."""
    batches = [batch_of(lengths) for lengths in LENGTHS]
    right = [results_of(plain_model(), batch, torch.float16) for batch in batches]
    graphs = check_results(compiled_model(), batches, right, torch.float16)
    assert len(set(graphs)) == 1 and graphs[0] > 0


def test_no_pass_adds_gradients_where_all_our_kernels_run():
    batch = batch_of(LENGTHS[0])
    batch.packing = batch.packing._replace(short=True)  # query, key and value are one product
    assert additions_of(compiled_model(), batch, torch.float16) == 0
