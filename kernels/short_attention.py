"""Attention of sequences that lie end to end and have at most 128 tokens, in Triton.

A program takes one head of one sequence. All its scores fit into registers, so the softmax is the plain one, nothing is
kept for the backward pass but the inputs, and that is one kernel: it computes the probabilities again, needs no output
of the forward pass, and adds nothing up across programs, so equal inputs give equal bits.

With P the softmax of Q K^T / sqrt(D) over a sequence's keys, M the mask of dropout with probability p:

    O  = P' V,  P' = P * M / (1 - p)
    dV = P'^T dO
    dP = (dO V^T) * M / (1 - p)
    dS = P * (dP - rowsum(dP * P))
    dQ = dS K / sqrt(D)         dK = dS^T Q / sqrt(D)

The mask is that of `kernels.dense_parts.kept_by_dropout` for the shape [T, A, 128], drawn again in the backward pass.
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

import math

import torch
from torch import Tensor

from kernels.build import KernelsUnavailable
from kernels.dense_parts import dropout_seed

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise KernelsUnavailable(f"no Triton ({error}): it comes with every CUDA build of torch for Linux") from error

LONGEST = 128  # tokens of a sequence
HEAD_SIZES = (16, 32, 64, 128)
WARPS = 8  # two groups of four, each of which multiplies half of the rows


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _tokens(boundaries, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """(the first token, how many there are, the head) of this program."""
    sequence = tl.program_id(0) // HEADS
    first = tl.load(boundaries + sequence)
    return first, tl.load(boundaries + sequence + 1) - first, tl.program_id(0) % HEADS


@triton.jit
def _places(first, stride, head, SIZE: tl.constexpr, LONGEST: tl.constexpr):
    """Where the head's numbers lie in a tensor whose tokens are `stride` apart, [LONGEST, SIZE]."""
    tokens = first.to(tl.int64) + tl.arange(0, LONGEST)
    return tokens[:, None] * stride + head * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def _probabilities(q, k, length, log2_scale, LONGEST: tl.constexpr):
    """P, in fp32."""
    scores = tl.dot(q, tl.trans(k)) * log2_scale
    scores = tl.where((tl.arange(0, LONGEST) < length)[None, :], scores, float("-inf"))
    powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return powers * (1 / tl.sum(powers, 1))[:, None]


@triton.jit
def _shifted_xor(bits, BY: tl.constexpr):
    return bits ^ (bits >> BY)


@triton.jit
def _kept(first, head, seed, threshold, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """What dropout keeps: `kept_by_dropout`, number by number."""
    rows = ((first + tl.arange(0, LONGEST)) * HEADS + head) * LONGEST
    numbers = rows[:, None] + tl.arange(0, LONGEST)[None, :] + tl.load(seed)
    bits = _shifted_xor(numbers.to(tl.uint32, bitcast=True), 17) * 0xED5AD4BB
    bits = bits ^ tl.load(seed + 1).to(tl.uint32, bitcast=True)
    bits = _shifted_xor(bits, 11) * 0xAC4C1B51
    bits = _shifted_xor(bits, 15) * 0x31848BAB
    return (_shifted_xor(bits, 14) & 0xFFFFFF) >= threshold


@triton.jit
def _attention_forward(
    q_at,
    k_at,
    v_at,
    out_at,
    boundaries,
    seed,
    q_stride,
    k_stride,
    v_stride,
    log2_scale,
    threshold,
    kept_scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length, head = _tokens(boundaries, HEADS, LONGEST)
    if length == 0:
        return
    inside = (tl.arange(0, LONGEST) < length)[:, None]
    q = tl.load(q_at + _places(first, q_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    k = tl.load(k_at + _places(first, k_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    v = tl.load(v_at + _places(first, v_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    p = _probabilities(q, k, length, log2_scale, LONGEST)
    if DROPOUT:
        p = tl.where(_kept(first, head, seed, threshold, HEADS, LONGEST), p * kept_scale, 0.0)
    out = tl.dot(p.to(v.dtype), v)
    tl.store(out_at + _places(first, HEADS * SIZE, head, SIZE, LONGEST), out.to(v.dtype), mask=inside)


@triton.jit
def _attention_backward(
    grad_at,
    q_at,
    k_at,
    v_at,
    grad_q_at,
    grad_k_at,
    grad_v_at,
    boundaries,
    seed,
    grad_stride,
    q_stride,
    k_stride,
    v_stride,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length, head = _tokens(boundaries, HEADS, LONGEST)
    if length == 0:
        return
    inside = (tl.arange(0, LONGEST) < length)[:, None]
    q = tl.load(q_at + _places(first, q_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    k = tl.load(k_at + _places(first, k_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    v = tl.load(v_at + _places(first, v_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    grad = tl.load(grad_at + _places(first, grad_stride, head, SIZE, LONGEST), mask=inside, other=0.0)
    grad_places = _places(first, HEADS * SIZE, head, SIZE, LONGEST)
    p = _probabilities(q, k, length, log2_scale, LONGEST)
    grad_p = tl.dot(grad, tl.trans(v))
    dropped = p
    if DROPOUT:
        kept = _kept(first, head, seed, threshold, HEADS, LONGEST)
        dropped = tl.where(kept, p * kept_scale, 0.0)
        grad_p = tl.where(kept, grad_p * kept_scale, 0.0)
    grad_v = tl.dot(tl.trans(dropped.to(v.dtype)), grad)
    tl.store(grad_v_at + grad_places, grad_v.to(v.dtype), mask=inside)
    grad_scores = (p * (grad_p - tl.sum(grad_p * p, 1)[:, None])).to(v.dtype)
    grad_q = tl.dot(grad_scores, k) * scale
    tl.store(grad_q_at + grad_places, grad_q.to(v.dtype), mask=inside)
    grad_k = tl.dot(tl.trans(grad_scores), q) * scale
    tl.store(grad_k_at + grad_places, grad_k.to(v.dtype), mask=inside)


# ----------------------------------------------------------------------------------------------------------- operators
def _settings(query: Tensor, boundaries: Tensor, dropout_p: float) -> tuple[tuple[int], list[float], dict]:
    """The grid; 1/sqrt(D), the same for powers of 2, what dropout's bits must reach, 1 / (1 - p); compile-time ones."""
    _, heads, size = query.shape
    scale = 1 / math.sqrt(size)
    numbers = [scale, scale / math.log(2), round(dropout_p * 2**24), 1 / (1 - dropout_p)]
    shape = {"HEADS": heads, "SIZE": size, "LONGEST": LONGEST, "DROPOUT": dropout_p > 0, "num_warps": WARPS}
    return ((len(boundaries) - 1) * heads,), numbers, shape


def _in_rows(tensor: Tensor) -> Tensor:
    """With the numbers of a token side by side, as they are in a projection's output."""
    whole = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    return tensor if whole else tensor.contiguous()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    rows = [_in_rows(tensor) for tensor in (query, key, value)]
    out = query.new_empty(query.shape)
    grid, (_, log2_scale, threshold, kept_scale), shape = _settings(query, boundaries, dropout_p)
    strides = [tensor.stride(0) for tensor in rows]
    _attention_forward[grid](*rows, out, boundaries, seed, *strides, log2_scale, threshold, kept_scale, **shape)
    return out


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [_in_rows(tensor) for tensor in (grad, query, key, value)]
    grads = [query.new_empty(query.shape) for _ in range(3)]
    grid, numbers, shape = _settings(query, boundaries, dropout_p)
    _attention_backward[grid](
        *rows, *grads, boundaries, seed, *(tensor.stride(0) for tensor in rows), *numbers, **shape
    )
    return tuple(grads)


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor boundaries, Tensor? seed, float dropout_p"
_LIBRARY.define(f"short_attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"short_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("short_attention", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("short_attention_backward", _attend_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::short_attention")
def _(query, key, value, boundaries, seed, dropout_p):
    return query.new_empty(query.shape)


@torch.library.register_fake("slope::short_attention_backward")
def _(grad, query, key, value, boundaries, seed, dropout_p):
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    grads = torch.ops.slope.short_attention_backward(grad, *ctx.saved_tensors, ctx.dropout_p)
    return *grads, None, None, None


torch.library.register_autograd("slope::short_attention", _gradients, setup_context=_keep_inputs, lib=_LIBRARY)


def short_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, dropout_p: float) -> Tensor:
    """Softmax attention of every token to those of its own sequence.

    Args:
        query, key, value: [T, A, D], all bf16 or all fp16, D in `HEAD_SIZES`.
        boundaries: where each sequence begins, and where the last one ends, int32: 0, ..., T. No sequence is longer
            than `LONGEST`; one may be empty.
        dropout_p: share of the probabilities that are dropped; its seed comes from torch's generator.

    Returns:
        [T, A, D].
    """
    seed = dropout_seed(query) if dropout_p else None
    return torch.ops.slope.short_attention(query, key, value, boundaries, seed, dropout_p)
