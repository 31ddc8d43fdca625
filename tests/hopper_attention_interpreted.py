"""kernels/hopper_attention.py's arithmetic in Triton's interpreter, with stand-ins for Gluon; run as
tests/short_attention_interpreted.py is. Layouts, fences and barriers want a GPU (tests/test_gpu_attention.py)."""

import pytest
import torch
from attention_checks import (
    check,
    check_equal_bits,
    check_nothing_behind_a_sequence_is_touched,
    check_three_tensors,
)
from gluon_stand_ins import stand_ins

from kernels import short_attention

with stand_ins():
    import kernels.hopper_attention  # noqa: F401 - what the backward pass imports


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    taken = []
    monkeypatch.setattr(short_attention, "runs_on_hopper", lambda device, size: taken.append(size) or size == 64)
    yield
    assert 64 in taken


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
def test_output_and_gradients_are_the_exact_ones(dropout_p):
    check("cpu", torch.float16, 2, 64, dropout_p)


def test_scores_that_lie_far_apart():
    check("cpu", torch.float16, spread=6.0)


def test_equal_bits_places_and_three_tensors():
    check_equal_bits("cpu", torch.float16, 64)
    check_nothing_behind_a_sequence_is_touched("cpu", torch.float16, 64)
    check_three_tensors("cpu", torch.float16, 64)
