"""GELU, and the backward passes of the dense parts of a block (kernels/dense_parts.py), in Triton.

The compiler sums a bias's gradient in a pass of its own over what it has just written. Here a program takes the same
columns of many tokens, and adds them up on its way; the programs' shares are added up after that. No atomics: equal
inputs give equal bits. The formulas are those of kernels/dense_parts.py. GELU takes dozens of
instructions a number, about what the time of reading and writing it has room for, so they are few here: its quotient
and its exponential are one each.
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

import functools
import math

import torch
from torch import Tensor

from kernels.triton_parts import kept_by_dropout, norm_backward, reciprocal, settings, sum_of_shares, tl, triton

COLUMNS_OF_PROGRAM = 1024  # of GELU's: 8 numbers a thread and row
WARPS = 4
ROWS = 4  # tokens at a time: what a thread loads before it waits
# At BERT's widths, up to 1024, there are registers for PROGRAMS_OF_PROCESSOR at a time; with more rows, some programs
# would wait for others to end.
ROWS_OF_NORM = 2
PROGRAMS_OF_PROCESSOR = 4


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _normal_distribution(x):
    """Phi(x) and phi(x), as `dense_parts._normal_distribution`."""
    t = reciprocal(1 + 0.23164188 * tl.abs(x))
    polynomial = 0.5307027145 * t  # half of the formula's coefficients
    polynomial = (polynomial - 0.7265760135) * t
    polynomial = (polynomial + 0.7107068705) * t
    polynomial = (polynomial - 0.142248368) * t
    polynomial = (polynomial + 0.127414796) * t
    bell = tl.exp2(x * x * -0.7213475204444817)  # e^(-x²/2)
    tail = polynomial * bell
    return tl.where(x >= 0, 1 - tail, tail), bell * 0.3989422804014327


@triton.jit
def _gelu(x, bias, y, tokens, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    there = (rows < tokens)[:, None] & inside[None, :]
    exact = tl.load(x + places, mask=there, other=0.0).to(tl.float32)
    exact += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    below, _ = _normal_distribution(exact)
    tl.store(y + places, (exact * below).to(y.dtype.element_ty), mask=there)


@triton.jit
def _gelu_backward(
    grad_y,
    x,
    bias,
    grad_x,
    shares,
    tokens,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    added = tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    # Two stages: the next rows are copied while these are computed.
    for begin in tl.range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS, num_stages=2):
        rows = begin + tl.arange(0, ROWS)
        places = rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]
        there = (rows < tokens)[:, None] & inside[None, :]
        exact = tl.load(x + places, mask=there, other=0.0).to(tl.float32) + added
        grad = tl.load(grad_y + places, mask=there, other=0.0).to(tl.float32)
        below, density = _normal_distribution(exact)
        grad = grad * (below + exact * density)
        tl.store(grad_x + places, grad.to(grad_x.dtype.element_ty), mask=there)
        total += tl.sum(grad, 0)
    tl.store(shares + tl.program_id(1) * COLUMNS + columns, total, mask=inside)


@triton.jit
def _norm_backward(
    grad_out,
    grad_skip,
    total,
    mean,
    inverse_deviation,
    weight,
    seed,
    grad_y,
    grad_residual,
    shares,
    tokens,
    threshold,
    kept_scale,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    scale = tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    to_bias = tl.zeros([BLOCK], tl.float32)
    to_weight = tl.zeros([BLOCK], tl.float32)
    to_norm_bias = tl.zeros([BLOCK], tl.float32)
    for begin in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = begin + tl.arange(0, ROWS)
        exists = rows < tokens
        places = rows[:, None].to(tl.int64) * HIDDEN + columns[None, :]
        there = exists[:, None] & inside[None, :]
        grad = tl.load(grad_out + places, mask=there, other=0.0).to(tl.float32)
        if SKIP:
            grad += tl.load(grad_skip + places, mask=there, other=0.0).to(tl.float32)
        exact = tl.load(total + places, mask=there, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_deviation + rows, mask=exists, other=0.0)[:, None]
        middle = tl.load(mean + rows, mask=exists, other=0.0)[:, None]
        to_residual, normalised = norm_backward(grad, exact, middle, inverse, scale, HIDDEN)
        to_y = to_residual
        if DROPOUT:
            numbers = rows[:, None] * HIDDEN + columns[None, :]
            to_y = tl.where(kept_by_dropout(numbers, seed, threshold), to_residual * kept_scale, 0.0)
        tl.store(grad_y + places, to_y.to(grad_y.dtype.element_ty), mask=there)
        tl.store(grad_residual + places, to_residual.to(grad_residual.dtype.element_ty), mask=there)
        to_bias += tl.sum(to_y, 0)
        to_weight += tl.sum(grad * normalised, 0)
        to_norm_bias += tl.sum(grad, 0)
    share = shares + tl.program_id(0) * (3 * HIDDEN) + columns
    tl.store(share, to_bias, mask=inside)
    tl.store(share + HIDDEN, to_weight, mask=inside)
    tl.store(share + 2 * HIDDEN, to_norm_bias, mask=inside)


# ----------------------------------------------------------------------------------------------------------- operators
@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _programs(tokens: int, blocks: int, rows: int, device: torch.device) -> int:
    """For each block of columns; they take turns, `rows` tokens each, so that all are at one stretch of memory."""
    return min(max(1, PROGRAMS_OF_PROCESSOR * _processors(device) // blocks), max(1, math.ceil(tokens / rows)))


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    columns, y = x.shape[-1], x.new_empty(x.shape)
    tokens = x.numel() // columns
    programs = (max(1, math.ceil(tokens / ROWS)), math.ceil(columns / COLUMNS_OF_PROGRAM))
    with torch.cuda.device_of(x):
        _gelu[programs](x.contiguous(), bias, y, tokens, columns, COLUMNS_OF_PROGRAM, ROWS, num_warps=WARPS)
    return y


def _bias_gelu_backward(grad_y: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    tokens, blocks = x.numel() // columns, math.ceil(columns / COLUMNS_OF_PROGRAM)
    programs = _programs(tokens, blocks, ROWS, x.device)
    grad_x, shares = x.new_empty(x.shape), bias.new_empty(programs, columns)
    inputs = (grad_y.contiguous(), x.contiguous(), bias, grad_x, shares, tokens)
    with torch.cuda.device_of(x):
        _gelu_backward[blocks, programs](*inputs, columns, COLUMNS_OF_PROGRAM, ROWS, num_warps=WARPS)
    return grad_x, sum_of_shares(shares)


def _dropout_add_layer_norm_backward(
    grad_out: Tensor,
    grad_skip: Tensor | None,
    total: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    probability: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = total.shape[-1]
    tokens = total.numel() // hidden
    programs = _programs(tokens, 1, ROWS_OF_NORM, total.device)
    grad_y, grad_residual = total.new_empty(total.shape), total.new_empty(total.shape, dtype=residual_dtype)
    shares = weight.new_empty(programs, 3, hidden)
    inputs = (grad_out.contiguous(), grad_skip if grad_skip is None else grad_skip.contiguous(), total.contiguous())
    statistics = (mean.contiguous(), inverse_deviation.contiguous(), weight, seed)
    numbers = (tokens, *settings(probability))
    block = triton.next_power_of_2(hidden)
    with torch.cuda.device_of(total):
        _norm_backward[programs,](
            *(*inputs, *statistics, grad_y, grad_residual, shares, *numbers),
            *(hidden, block, ROWS_OF_NORM, grad_skip is not None, seed is not None),
            num_warps=min(16, max(1, block // 256)),
        )
    return grad_y, grad_residual, sum_of_shares(shares)


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_LIBRARY.define("bias_gelu(Tensor x, Tensor bias) -> Tensor")
_LIBRARY.define("bias_gelu_backward(Tensor grad_y, Tensor x, Tensor bias) -> (Tensor, Tensor)")
_LIBRARY.define(
    "dropout_add_layer_norm_backward(Tensor grad_out, Tensor? grad_skip, Tensor total, Tensor mean, "
    "Tensor inverse_deviation, Tensor weight, Tensor? seed, float probability, ScalarType residual_dtype) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("bias_gelu", _bias_gelu, "CompositeExplicitAutograd")
_LIBRARY.impl("bias_gelu_backward", _bias_gelu_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("dropout_add_layer_norm_backward", _dropout_add_layer_norm_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::bias_gelu")
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("slope::bias_gelu_backward")
def _(grad_y, x, bias):
    return x.new_empty(x.shape), torch.empty_like(bias)


@torch.library.register_fake("slope::dropout_add_layer_norm_backward")
def _(grad_out, grad_skip, total, mean, inverse_deviation, weight, seed, probability, residual_dtype):
    sums = weight.new_empty(3, total.shape[-1])
    return total.new_empty(total.shape), total.new_empty(total.shape, dtype=residual_dtype), sums


bias_gelu = torch.ops.slope.bias_gelu.default
bias_gelu_backward = torch.ops.slope.bias_gelu_backward.default
dropout_add_layer_norm_backward = torch.ops.slope.dropout_add_layer_norm_backward.default
