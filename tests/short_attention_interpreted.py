"""kernels/short_attention.py in Triton's interpreter, which runs the kernels on CPU tensors: checks as on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/short_attention_interpreted.py    # as tests/test_short_attention.py does

In fp16: the interpreter has no products in bf16.
"""

from dataclasses import replace

import pytest
import torch
from attention_checks import (
    check,
    check_equal_bits,
    check_nothing_behind_a_sequence_is_touched,
    check_other_strides,
)
from test_compiled_parts import CONFIG, batch_of, results_of

from modeling import BertForPreTraining, compiled_parts


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("heads", "size"), [(1, 64), (3, 32), (2, 16)])
def test_output_and_gradients_are_the_exact_ones(heads, size, dropout_p):
    check("cpu", torch.float16, heads, size, dropout_p)


def test_scores_that_lie_far_apart():
    check("cpu", torch.float16, spread=6.0)


def test_equal_inputs_give_equal_bits():
    check_equal_bits("cpu", torch.float16)


def test_nothing_behind_a_sequence_is_touched():
    check_nothing_behind_a_sequence_is_touched("cpu", torch.float16)


def test_other_strides():
    check_other_strides("cpu", torch.float16)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_learns_what_it_does_with_flash_attention(compiled):
    """Losses and gradients, with query, key and value as one product; the compiler sees whole graphs."""
    torch.manual_seed(0)
    model = BertForPreTraining(replace(CONFIG, hidden_size=64, intermediate_size=128))
    batch = batch_of([8, 20, 11, 9])
    expected = results_of(model, batch, torch.float16)
    batch.packing = batch.packing._replace(short=True)
    if compiled:
        for part in compiled_parts(model):
            part.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    losses, gradients = results_of(model, batch, torch.float16)
    assert losses == pytest.approx(expected[0], rel=2e-3)
    for name, gradient in expected[1].items():
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is 0, but for rounding
            assert (gradients[name] - gradient).norm() < 0.03 * gradient.norm(), name
