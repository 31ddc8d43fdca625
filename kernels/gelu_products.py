"""GELU and its backward pass, each with the narrow product that adapters want of what it writes.

    slope::bias_gelu_narrow(x, bias, rows) -> y, y rows^T
    slope::bias_gelu_narrow_backward(grad_y, x, bias, rows) -> grad_x, grad_x rows^T, grad_bias

A product of its own would read the widest tensors of a block once more. Here a warp loads 16 tokens' numbers as the
tensor core wants them: any order of the columns gives the same sum, so a thread takes eight neighbours, 16 bytes, and
neither shared memory nor a barrier stands between loading, GELU, storing and the product. In Gluon, since Triton's
compiler computes GELU twice for that, once as it is stored and once as it is multiplied. The warps of a program share
out columns, not tokens: sums over tokens, for the bias, then stay within a warp. No atomics: equal inputs give equal
bits.
"""
# ruff: noqa: N803, N806 - Triton's spelling of compile-time values

import torch
from torch import Tensor

from kernels.build import KernelsUnavailable
from kernels.dense_kernels import division, normal_distribution
from kernels.triton_parts import sum_of_shares, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2

    _barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7
except (ImportError, AttributeError) as error:  # Gluon's names move between Triton's versions
    raise KernelsUnavailable(f"this Triton's Gluon is another ({error})") from error

WIDEST = 64  # columns of adapters; with more, registers would not suffice
WARPS = 4
TOKENS = 16  # of a tile: the rows of the tensor core's instruction
BLOCK = 64  # columns of a warp's tile: the least that threads with eight neighbours each fill


# ------------------------------------------------------------------------------------------------------------- kernels
@gluon.jit
def _of_tile(first, begin, TOKENS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Tokens [1, TOKENS, 1] and columns [WARPS, 1, BLOCK] of a tile in the layout LAYOUT."""
    tokens = first + gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    warps = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return tokens[None, :, None], begin + warps[:, None, None] * BLOCK + columns[None, None, :]


@gluon.jit
def _narrow_rows(
    rows,
    begin,
    COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    BLOCK: gl.constexpr,
    WARPS: gl.constexpr,
):
    """What a tile is multiplied by, [WARPS, BLOCK, PADDED]: the rows that something stands in."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    warps = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, B)))
    within = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, B)))
    columns = begin + warps[:, None, None] * BLOCK + within[None, :, None]
    number = gl.arange(0, PADDED, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    places = (number // 2 * 4 + number % 2) * COLUMNS + columns
    if COLUMNS % (WARPS * BLOCK) == 0 and WIDTH == PADDED:
        return gl.load(rows + places)
    return gl.load(rows + places, mask=(columns < COLUMNS) & (number < WIDTH), other=0.0)


@gluon.jit
def _store_narrow(
    narrow,
    summed,
    first,
    tokens,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    TOKENS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The warps' shares [WARPS, TOKENS, PADDED], added up and rounded, in pairs with two zeros after each."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    total = gl.sum(summed, 0).to(narrow.dtype.element_ty)
    token = (first + gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(0, MMA))))[:, None]
    number = gl.arange(0, PADDED, gl.SliceLayout(0, gl.SliceLayout(0, MMA)))[None, :]
    places = token.to(gl.int64) * (2 * WIDTH) + number // 2 * 4 + number % 2
    there = (token < tokens) & (number < WIDTH)
    gl.store(narrow + places, total, mask=there)
    gl.store(narrow + places + 2, gl.zeros_like(total), mask=there)


@gluon.jit
def _gelu(
    x,
    bias,
    rows,
    y,
    narrow,
    tokens,
    COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK: gl.constexpr,
    WARPS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    first = gl.program_id(0) * TOKENS
    summed = gl.zeros([WARPS, TOKENS, PADDED], gl.float32, MMA)
    for begin in range(0, COLUMNS, WARPS * BLOCK):
        token, column = _of_tile(first, begin, TOKENS, BLOCK, WARPS, A)
        there = (token < tokens) & (column < COLUMNS)
        places = token.to(gl.int64) * COLUMNS + column
        given = gl.load(x + places, mask=there, other=0.0, eviction_policy="evict_first")
        exact = given.to(gl.float32) + gl.load(bias + column, mask=column < COLUMNS, other=0.0)
        below, _ = normal_distribution(exact)
        activated = (exact * below).to(y.dtype.element_ty)
        gl.store(y + places, activated, mask=there)
        summed = mma_v2(activated, _narrow_rows(rows, begin, COLUMNS, WIDTH, PADDED, BLOCK, WARPS), summed)
    _store_narrow(narrow, summed, first, tokens, WIDTH, PADDED, TOKENS, WARPS)


@gluon.jit
def _gelu_backward(
    grad_y,
    x,
    bias,
    rows,
    grad_x,
    narrow,
    shares,
    tokens,
    tokens_of_program,
    COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A program takes several tiles of tokens, so that the shares of the bias's gradient are few."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(1, A)))[:, None]
    share_places = warp * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, :]
    share = shares + gl.program_id(0).to(gl.int64) * COLUMNS
    begin_of_program = gl.program_id(0) * tokens_of_program
    for first in range(begin_of_program, begin_of_program + tokens_of_program, TOKENS):
        summed = gl.zeros([WARPS, TOKENS, PADDED], gl.float32, MMA)
        for begin in range(0, COLUMNS, WARPS * BLOCK):
            token, column = _of_tile(first, begin, TOKENS, BLOCK, WARPS, A)
            there = (token < tokens) & (column < COLUMNS)
            places = token.to(gl.int64) * COLUMNS + column
            given = gl.load(x + places, mask=there, other=0.0, eviction_policy="evict_first")
            grad = gl.load(grad_y + places, mask=there, other=0.0, eviction_policy="evict_first").to(gl.float32)
            exact = given.to(gl.float32) + gl.load(bias + column, mask=column < COLUMNS, other=0.0)
            below, density = normal_distribution(exact)
            grad = grad * (below + exact * density)
            rounded = grad.to(grad_x.dtype.element_ty)
            gl.store(grad_x + places, rounded, mask=there)
            summed = mma_v2(rounded, _narrow_rows(rows, begin, COLUMNS, WIDTH, PADDED, BLOCK, WARPS), summed)
            inside = begin + share_places < COLUMNS
            total = gl.sum(grad, 1)
            if first > begin_of_program:
                total += gl.load(share + begin + share_places, mask=inside, other=0.0)
            gl.store(share + begin + share_places, total, mask=inside)
        _store_narrow(narrow, summed, first, tokens, WIDTH, PADDED, TOKENS, WARPS)
        _barrier()  # what a thread has added to the share, others of its warp read in the next tile


# ----------------------------------------------------------------------------------------------------------- operators
def _sizes(x: Tensor, rows: Tensor) -> tuple[int, int, dict[str, int]]:
    """Tokens, columns of the narrow product with what stands between them, and compile-time constants."""
    columns, doubled = x.shape[-1], len(rows)
    width = doubled // 2
    if width > WIDEST or width % 16 or rows.shape[1] != columns or not rows.dtype == x.dtype != torch.float32:
        raise RuntimeError(f"GELU of {tuple(x.shape)} in {x.dtype}: no narrow product with {tuple(rows.shape)}")
    constants = {"COLUMNS": columns, "WIDTH": width, "PADDED": triton.next_power_of_2(width)}
    constants |= {"TOKENS": TOKENS, "BLOCK": BLOCK, "WARPS": WARPS, "num_warps": WARPS}
    return x.numel() // columns, doubled, constants


def _bias_gelu_narrow(x: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    tokens, doubled, constants = _sizes(x, rows)
    y, narrow = x.new_empty(x.shape), x.new_empty(tokens, doubled)
    with torch.cuda.device_of(x):
        inputs = (x.contiguous(), bias, rows.contiguous())
        _gelu[max(1, triton.cdiv(tokens, TOKENS)),](*inputs, y, narrow, tokens, **constants)
    return y, narrow


def _bias_gelu_narrow_backward(grad_y: Tensor, x: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, doubled, constants = _sizes(x, rows)
    programs, each = division(tokens, 1, TOKENS, x.device)
    grad_x, narrow = x.new_empty(x.shape), x.new_empty(tokens, doubled)
    shares = bias.new_empty(programs, x.shape[-1])
    with torch.cuda.device_of(x):
        inputs = (grad_y.contiguous(), x.contiguous(), bias, rows.contiguous())
        _gelu_backward[programs,](*inputs, grad_x, narrow, shares, tokens, each, **constants)
    return grad_x, narrow, sum_of_shares(shares)


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_LIBRARY.define("bias_gelu_narrow(Tensor x, Tensor bias, Tensor rows) -> (Tensor, Tensor)")
_LIBRARY.define(
    "bias_gelu_narrow_backward(Tensor grad_y, Tensor x, Tensor bias, Tensor rows) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("bias_gelu_narrow", _bias_gelu_narrow, "CompositeExplicitAutograd")
_LIBRARY.impl("bias_gelu_narrow_backward", _bias_gelu_narrow_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::bias_gelu_narrow")
def _(x, bias, rows):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], len(rows))


@torch.library.register_fake("slope::bias_gelu_narrow_backward")
def _(grad_y, x, bias, rows):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], len(rows)), torch.empty_like(bias)


bias_gelu_narrow = torch.ops.slope.bias_gelu_narrow.default
bias_gelu_narrow_backward = torch.ops.slope.bias_gelu_narrow_backward.default
