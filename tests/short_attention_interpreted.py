"""kernels/short_attention.py in Triton's interpreter, which runs the kernels on CPU tensors: checks as on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/short_attention_interpreted.py    # as tests/test_short_attention.py does

In fp16: the interpreter has no products in bf16.
"""

import pytest
import torch
from attention_checks import check, check_a_sequence_does_not_see_the_others, check_equal_bits


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("heads", "size"), [(1, 64), (3, 32), (2, 128)])
def test_output_and_gradients_are_the_exact_ones(heads, size, dropout_p):
    check("cpu", torch.float16, heads, size, dropout_p)


def test_scores_that_lie_far_apart():
    check("cpu", torch.float16, spread=6.0)


def test_equal_inputs_give_equal_bits():
    check_equal_bits("cpu", torch.float16)


def test_a_sequence_does_not_see_the_others():
    check_a_sequence_does_not_see_the_others("cpu", torch.float16)
