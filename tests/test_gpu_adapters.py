"""The kernels of the low-rank adapters on a GPU: their gradients, against float64, and their operands.

Every result goes into memory full of NaN that must be written exactly. Skipped, with the reason, where there is no
Hopper GPU or no way to compile the kernels.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from product_checks import (
    HALF_DTYPES,
    Poisoned,
    check_adapter_operands,
    check_adapter_slices,
    make_layer,
    spread_columns,
    unavailable,
)
from product_checks import normal as normal_on
from torch import nn

from kernels import native
from kernels.backends import CutlassOperands
from kernels.ops import adapter_grads, adapter_width
from sparse_ops import OperandRefresh

pytestmark = pytest.mark.gpu
normal = partial(normal_on, "cuda")
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)


@half_dtypes
@pytest.mark.parametrize("rank", [1, 4, 16, 24, 64, 72, 128, 200])
@pytest.mark.parametrize(("out", "columns"), [(16, 16), (272, 336), (1024, 1024), (48, 4096), (4096, 48)])
@pytest.mark.parametrize("lies_apart", [False, True])
def test_gradients_of_adapters(lies_apart, out, columns, rank, dtype):
    width = adapter_width(rank)
    weight, left, right = (
        normal(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate(((out, columns), (columns, width), (out, width)))
    )
    for side in (left, right):  # what the columns up to the width hold is not looked at
        side[:, rank:] = float("nan")
    rows = [spread_columns(side).t().contiguous() for side in (left, right)]
    if lies_apart:
        wide = torch.full((2 * width, out + 24), float("nan"), dtype=dtype, device="cuda")
        rows[1] = wide[:, 8 : 8 + out].copy_(rows[1])
    found = [Poisoned("cuda", *shape, dtype=torch.float32) for shape in ((columns, rank), (rank, out))]
    native.launch_adapter_grads(weight, *rows, *(side.matrix for side in found))

    def products(weight, left, right):
        return weight.t() @ right[:, :rank], (weight @ left[:, :rank]).t() / rank

    given = [matrix.double() for matrix in (weight, left, right)]
    exact, magnitude = products(*given), products(*(matrix.abs() for matrix in given))
    for i, name in enumerate(("dL", "dR")):
        found[i].check(exact[i], magnitude[i], name)


def test_gradients_of_adapters_are_the_same_each_time():
    weight, *rows = (normal(*shape, seed=0, dtype=torch.bfloat16) for shape in ((4096, 1024), (32, 1024), (32, 4096)))
    first = adapter_grads(weight, *rows, 16)
    for _ in range(3):
        again = adapter_grads(weight, *rows, 16)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))


@pytest.mark.parametrize(("out", "columns", "rank", "width"), [(20, 64, 4, 16), (64, 20, 4, 16), (64, 64, 4, 24)])
def test_sizes_that_no_kernel_takes_are_an_error(out, columns, rank, width):
    weight, left_rows, right_rows = (
        normal(*shape, seed=0, dtype=torch.bfloat16)
        for shape in ((out, columns), (2 * width, columns), (2 * width, out))
    )
    left, right = (torch.full(shape, float("nan"), device="cuda") for shape in ((columns, rank), (rank, out)))
    with pytest.raises(RuntimeError, match="gradients of adapters of"):
        native.launch_adapter_grads(weight, left_rows, right_rows, left, right)
    assert left.isnan().all() and right.isnan().all()


@half_dtypes
def test_operands_of_many_layers_follow_their_adapters(dtype):
    """More layers than a launch holds, of several sizes and ranks, in one refresh."""
    sizes = ((272, 336), (64, 80), (1024, 512))
    model = nn.ModuleList(make_layer("cuda", rank=1 + 29 * i % 90, sizes=sizes[i % 3], seed=i) for i in range(60))
    for layer in model:
        layer.set_operands(CutlassOperands(layer, dtype))
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    OperandRefresh(model).after_step()
    for layer in model:
        check_adapter_operands(layer)


@half_dtypes
def test_operands_that_are_slices_are_written_in_their_places(dtype):
    check_adapter_slices("cuda", dtype)
