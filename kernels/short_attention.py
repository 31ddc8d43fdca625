"""Attention of sequences that lie end to end and have at most 128 tokens, in Triton; on a Hopper GPU the backward pass
of heads of size 64 in Gluon (kernels/hopper_attention.py). Longer ones: kernels/blockwise_attention.py.

A program takes one head of one sequence. All its scores fit into registers, so the softmax is the plain one, nothing is
kept for the backward pass but the inputs, and that is one kernel: it computes the probabilities again, needs no output
of the forward pass, and adds nothing up across programs, so equal inputs give equal bits.

Query, key and value come as one matrix, as a joint projection gives it, or as three; their gradients go as one. The
projections' biases are added here. With P the softmax of Q K^T / sqrt(D) over a sequence's keys, M the mask of dropout
with probability p:

    O  = P' V,  P' = P * M / (1 - p)
    dV = P'^T dO
    dP = (dO V^T) * M / (1 - p)
    dS = P * (dP - rowsum(dP * P))
    dQ = dS K / sqrt(D)         dK = dS^T Q / sqrt(D)

The mask is a function of a seed, and drawn again in the backward pass: 16 bits of a hash for each score. Four scores,
those of queries q and q + 8 with keys k and k + 8, share their three multiplications: in the layout that tensor cores
want, these lie in one thread, and the compiler finds that it would compute the same four times.
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dense_parts import dropout_seed
from kernels.triton_parts import sum_of_shares, tl, triton

LONGEST = 128  # tokens of a sequence
HEAD_SIZES = (16, 32, 64)  # with 128 the backward pass wants 128 KiB of shared memory, which not all GPUs have
WARPS = 8  # two groups of four, each of which multiplies half of the rows


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _tokens(boundaries, HEADS: tl.constexpr):
    """(the first token, how many there are, the head) of this program."""
    sequence = tl.program_id(0) // HEADS
    first = tl.load(boundaries + sequence)
    return first, tl.load(boundaries + sequence + 1) - first, tl.program_id(0) % HEADS


@triton.jit
def _places(first, head, STRIDE: tl.constexpr, SIZE: tl.constexpr, LONGEST: tl.constexpr):
    """Where the head's numbers lie, [LONGEST, SIZE], with rows STRIDE apart."""
    tokens = first.to(tl.int64) + tl.arange(0, LONGEST)
    return tokens[:, None] * STRIDE + head * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def _with_bias(given, bias, places, inside, head, PART: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Query, key or value, by PART, rounded to the dtype that they came in."""
    numbers = tl.load(given + places, mask=inside, other=0.0)
    added = tl.load(bias + (PART * HEADS + head) * SIZE + tl.arange(0, SIZE))
    return (numbers.to(tl.float32) + added[None, :]).to(numbers.dtype)


@triton.jit
def _inputs(
    query,
    key,
    value,
    bias,
    first,
    length,
    head,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """Which rows have a token, and query, key and value."""
    inside = (tl.arange(0, LONGEST) < length)[:, None]
    places = _places(first, head, STRIDE, SIZE, LONGEST)
    q = _with_bias(query, bias, places, inside, head, 0, HEADS, SIZE)
    k = _with_bias(key, bias, places, inside, head, 1, HEADS, SIZE)
    v = _with_bias(value, bias, places, inside, head, 2, HEADS, SIZE)
    return inside, q, k, v


@triton.jit
def _store_gradient(
    grad,
    grad_qkv,
    grad_bias,
    first,
    inside,
    head,
    PART: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """Of query, key or value; and the sequence's share of that of its bias."""
    places = _places(first, head, 3 * HEADS * SIZE, SIZE, LONGEST) + PART * HEADS * SIZE
    tl.store(grad_qkv + places, grad.to(grad_qkv.dtype.element_ty), mask=inside)
    sequence = tl.program_id(0) // HEADS
    tl.store(grad_bias + ((sequence * 3 + PART) * HEADS + head) * SIZE + tl.arange(0, SIZE), tl.sum(grad, 0))


@triton.jit
def _powers(q, k, length, log2_scale, LONGEST: tl.constexpr):
    """P in fp32, its rows not yet divided by their sums."""
    scores = tl.dot(q, tl.trans(k))
    if length < LONGEST:
        scores = tl.where((tl.arange(0, LONGEST) < length)[None, :], scores, float("-inf"))
    return tl.exp2(scores * log2_scale - (tl.max(scores, 1) * log2_scale)[:, None])


@triton.jit
def folded(bits, BY: tl.constexpr):
    """Both halves of a product, one over the other."""
    product = bits.to(tl.uint64) * BY
    return (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)


@triton.jit
def _kept(first, head, seed, threshold, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """What dropout keeps of the scores; kernels/hopper_attention.py has the same."""
    queries, keys = tl.arange(0, LONGEST)[:, None], tl.arange(0, LONGEST)[None, :]
    numbers = ((first + (queries & 0x77)) * HEADS + head) * LONGEST + (keys & 0x77)
    bits = folded((numbers + tl.load(seed)).to(tl.uint32, bitcast=True), 0xED5AD4BB)
    bits = folded(bits ^ tl.load(seed + 1).to(tl.uint32, bitcast=True), 0xAC4C1B51)
    bits = tl.where((queries & 8) != 0, folded(bits, 0xC2B2AE3D), bits)
    return (bits << ((keys & 8) * 2).to(tl.uint32)) >= (threshold.to(tl.uint32) << 16)


@triton.jit(do_not_specialize=["threshold"])
def _attention_forward(
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    out,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length, head = _tokens(boundaries, HEADS)
    if length == 0:
        return
    inside, q, k, v = _inputs(query, key, value, bias, first, length, head, STRIDE, HEADS, SIZE, LONGEST)
    powers = _powers(q, k, length, log2_scale, LONGEST)
    factor = 1 / tl.sum(powers, 1)
    if DROPOUT:
        powers = tl.where(_kept(first, head, seed, threshold, HEADS, LONGEST), powers, 0.0)
        factor = factor * kept_scale
    context = (tl.dot(powers.to(v.dtype), v) * factor[:, None]).to(v.dtype)
    tl.store(out + _places(first, head, HEADS * SIZE, SIZE, LONGEST), context, mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _attention_backward(
    grad_out,
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    grad_qkv,
    grad_bias,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length, head = _tokens(boundaries, HEADS)
    if length == 0:
        return
    inside, q, k, v = _inputs(query, key, value, bias, first, length, head, STRIDE, HEADS, SIZE, LONGEST)
    grad = tl.load(grad_out + _places(first, head, HEADS * SIZE, SIZE, LONGEST), mask=inside, other=0.0)
    powers = _powers(q, k, length, log2_scale, LONGEST)
    p = powers * (1 / tl.sum(powers, 1))[:, None]
    grad_p = tl.dot(grad, tl.trans(v))
    dropped = p
    if DROPOUT:  # what is kept gets its factor at the end
        kept = _kept(first, head, seed, threshold, HEADS, LONGEST)
        dropped = tl.where(kept, p, 0.0)
        grad_p = tl.where(kept, grad_p, 0.0)
        scale = scale * kept_scale
    grad_v = tl.dot(tl.trans(dropped.to(v.dtype)), grad) * kept_scale
    _store_gradient(grad_v, grad_qkv, grad_bias, first, inside, head, 2, HEADS, SIZE, LONGEST)
    grad_scores = (p * (grad_p - tl.sum(grad_p * p, 1)[:, None])).to(v.dtype)
    grad_q = tl.dot(grad_scores, k) * scale
    _store_gradient(grad_q, grad_qkv, grad_bias, first, inside, head, 0, HEADS, SIZE, LONGEST)
    grad_k = tl.dot(tl.trans(grad_scores), q) * scale
    _store_gradient(grad_k, grad_qkv, grad_bias, first, inside, head, 1, HEADS, SIZE, LONGEST)


# ----------------------------------------------------------------------------------------------------------- operators
class Settings(NamedTuple):
    """How both kernels are launched."""

    grid: tuple[int]
    numbers: tuple[float, ...]
    """1 / sqrt(D), the same for powers of 2, what 16 bits of dropout must reach, what is kept is multiplied by."""
    shape: dict[str, int | bool]
    """Compile-time constants."""


def share_dropped(dropout_p: float) -> float:
    """The probability itself, in 16 bits; never 1."""
    return min(round(dropout_p * 2**16), 2**16 - 1) / 2**16


def settings(heads: Sequence[Tensor], boundaries: Tensor, dropout_p: float) -> tuple[list[Tensor], Settings]:
    """Query, key and value [T, A, D] with rows equally far apart; how the kernels take them."""
    _, count, size = heads[0].shape
    strides = heads[0].stride()
    if strides[1:] != (size, 1) or any(part.stride() != strides for part in heads):
        heads = [part.contiguous() for part in heads]
        strides = heads[0].stride()
    scale, dropped = 1 / math.sqrt(size), share_dropped(dropout_p)
    numbers = (scale, scale / math.log(2), round(dropped * 2**16), 1 / (1 - dropped))
    shape = {"STRIDE": strides[0], "HEADS": count, "SIZE": size, "LONGEST": LONGEST, "DROPOUT": dropped > 0}
    return list(heads), Settings(((len(boundaries) - 1) * count,), numbers, shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, boundaries: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    heads, (grid, (_, *numbers), shape) = settings((query, key, value), boundaries, dropout_p)
    out = query.new_empty(query.shape)
    with torch.cuda.device_of(query):
        _attention_forward[grid](*heads, bias, boundaries, seed, out, *numbers, **shape, num_warps=WARPS)
    return out


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    boundaries: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    heads, (grid, numbers, shape) = settings((query, key, value), boundaries, dropout_p)
    tokens, count, size = query.shape
    grad_qkv = query.new_empty(tokens, 3, count, size)
    shares = bias.new_zeros(len(boundaries) - 1, len(bias))  # zeros, for sequences without tokens
    kernel, warps = _attention_backward, WARPS
    if runs_on_hopper(query.device, size):
        from kernels import hopper_attention

        kernel, warps = hopper_attention.attention_backward, hopper_attention.WARPS
    inputs = (grad.contiguous(), *heads, bias, boundaries, seed)
    with torch.cuda.device_of(query):
        kernel[grid](*inputs, grad_qkv, shares, *numbers, **shape, num_warps=warps)
    return grad_qkv, sum_of_shares(shares)


def runs_on_hopper(device: torch.device, size: int) -> bool:
    """Whether the backward pass of heads of this size is kernels/hopper_attention.py's."""
    return size == 64 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor bias, Tensor boundaries, Tensor? seed, float dropout_p"
_LIBRARY.define(f"short_attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"short_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.impl("short_attention", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("short_attention_backward", _attend_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::short_attention")
def _(query, key, value, bias, boundaries, seed, dropout_p):
    return query.new_empty(query.shape)


@torch.library.register_fake("slope::short_attention_backward")
def _(grad, query, key, value, bias, boundaries, seed, dropout_p):
    tokens, count, size = query.shape
    return query.new_empty(tokens, 3, count, size), torch.empty_like(bias)


class _ShortAttention(torch.autograd.Function):
    """`heads`: query, key and value as one tensor or as three; their gradients are views of one in either case."""

    @staticmethod
    def forward(ctx, bias, boundaries, seed, dropout_p, *heads):
        ctx.save_for_backward(bias, boundaries, seed, *heads)
        ctx.dropout_p = dropout_p
        return torch.ops.slope.short_attention(*apart(heads), bias, boundaries, seed, dropout_p)

    @staticmethod
    def backward(ctx, grad):
        bias, boundaries, seed, *heads = ctx.saved_tensors
        grad_qkv, grad_bias = torch.ops.slope.short_attention_backward(
            grad, *apart(heads), bias, boundaries, seed, ctx.dropout_p
        )
        grads = (grad_qkv,) if len(heads) == 1 else grad_qkv.unbind(1)
        return grad_bias, None, None, None, *grads


def apart(heads: Sequence[Tensor]) -> Sequence[Tensor]:
    return heads[0].unbind(1) if len(heads) == 1 else heads


def short_attention(
    heads: Sequence[Tensor], bias: Tensor, boundaries: Tensor, dropout_p: float, longest: int = LONGEST
) -> Tensor:
    """Softmax attention of every token to those of its own sequence.

    Args:
        heads: query, key and value without their biases, bf16 or fp16: together, one tensor [T, 3, A, D], or three
            [T, A, D]; D in `HEAD_SIZES`.
        bias: fp32 [3 A D]; added here, since so its gradient costs no pass over theirs.
        boundaries: where each sequence begins, and where the last one ends, int32: 0, ..., T. One may be empty.
        dropout_p: share of the probabilities that are dropped, to 16 bits; its seed comes from torch's generator.
        longest: no sequence is longer, which is not checked; above `LONGEST` kernels/blockwise_attention.py runs all.

    Returns:
        [T, A, D].
    """
    if longest > LONGEST:
        from kernels.blockwise_attention import blockwise_attention  # which has parts of this module

        return blockwise_attention(heads, bias, boundaries, longest, dropout_p)
    seed = dropout_seed(heads[0]) if dropout_p else None
    return _ShortAttention.apply(bias, boundaries, seed, dropout_p, *heads)
