"""kernels/short_attention.py, and kernels/blockwise_attention.py from 129 tokens on, in Triton's interpreter, which
runs the kernels on CPU tensors: checks as on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/short_attention_interpreted.py    # as tests/test_block_kernels.py does

In fp16: the interpreter has no products in bf16.
"""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from attention_checks import (
    check,
    check_dropout_is_independent,
    check_equal_bits,
    check_nothing_behind_a_sequence_is_touched,
    check_other_strides,
    check_three_tensors,
)
from test_compiled_parts import CONFIG, LENGTHS, batch_of, check_results, results_of

from modeling import BertForPreTraining, compiled_parts

both = pytest.mark.parametrize("longest", [128, 250])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("heads", "size", "longest"), [(1, 64, 128), (3, 32, 128), (2, 16, 128), (2, 32, 250)])
def test_output_and_gradients_are_the_exact_ones(heads, size, longest, dropout_p):
    check("cpu", torch.float16, heads, size, dropout_p, longest=longest)


@both
def test_scores_that_lie_far_apart(longest):
    check("cpu", torch.float16, spread=6.0, longest=longest)


@both
def test_equal_inputs_give_equal_bits(longest):
    check_equal_bits("cpu", torch.float16, longest=longest)


@both
def test_nothing_behind_a_sequence_is_touched(longest):
    check_nothing_behind_a_sequence_is_touched("cpu", torch.float16, longest=longest)


@both
def test_other_strides(longest):
    check_other_strides("cpu", torch.float16, longest)
    check_three_tensors("cpu", torch.float16, longest=longest)


def test_the_mask_has_no_pattern():
    check_dropout_is_independent("cpu")


@pytest.mark.parametrize(("compiled", "longest"), [(False, 32), (True, 32), (True, 250)])
def test_a_model_learns_what_it_does_in_fp32(compiled, longest):
    """Losses and gradients, with query, key and value as one product; whole graphs, one for all numbers of tokens."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = BertForPreTraining(replace(CONFIG, hidden_size=64, intermediate_size=128))
    batches = [batch_of(lengths) for lengths in LENGTHS]
    right = [results_of(model, batch, torch.float32) for batch in batches]
    if compiled:
        for part in compiled_parts(model):
            part.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    for batch in batches:
        batch.packing = batch.packing._replace(short=True, longest=longest)
    graphs = check_results(model, batches, right, torch.float16)
    assert len(set(graphs)) == 1 and (graphs[0] > 0) == compiled
