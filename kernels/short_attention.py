"""Attention of sequences that lie end to end and have at most 128 tokens, in Triton.

A program takes one head of one sequence. All its scores fit into registers, so the softmax is the plain one, nothing is
kept for the backward pass but the inputs, and that is one kernel: it computes the probabilities again, needs no output
of the forward pass, and adds nothing up across programs, so equal inputs give equal bits.

Query, key and value come and their gradients go as one matrix, as a joint projection gives it and wants it; the
projection's bias is added here. With P the softmax of Q K^T / sqrt(D) over a sequence's keys, M the mask of dropout
with probability p:

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

from kernels.dense_parts import dropout_seed
from kernels.dropout import kept_by_dropout, settings, tl, triton

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
def _places(first, head, PARTS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, LONGEST: tl.constexpr):
    """Where the head's numbers lie in [T, PARTS, HEADS, SIZE], those of the first part, [LONGEST, SIZE]."""
    tokens = first.to(tl.int64) + tl.arange(0, LONGEST)
    return tokens[:, None] * (PARTS * HEADS * SIZE) + head * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def _with_bias(qkv, bias, places, inside, head, PART: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Query, key or value, by PART, rounded to the dtype that they came in."""
    given = tl.load(qkv + places + PART * HEADS * SIZE, mask=inside, other=0.0)
    added = tl.load(bias + (PART * HEADS + head) * SIZE + tl.arange(0, SIZE))
    return (given.to(tl.float32) + added[None, :]).to(given.dtype)


@triton.jit
def _inputs(qkv, bias, first, length, head, HEADS: tl.constexpr, SIZE: tl.constexpr, LONGEST: tl.constexpr):
    """Which rows have a token, where the head's numbers lie in `qkv`, and query, key and value."""
    inside = (tl.arange(0, LONGEST) < length)[:, None]
    places = _places(first, head, 3, HEADS, SIZE, LONGEST)
    q = _with_bias(qkv, bias, places, inside, head, 0, HEADS, SIZE)
    k = _with_bias(qkv, bias, places, inside, head, 1, HEADS, SIZE)
    v = _with_bias(qkv, bias, places, inside, head, 2, HEADS, SIZE)
    return inside, places, q, k, v


@triton.jit
def _store_gradient(
    grad, grad_qkv, grad_bias, places, inside, head, PART: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr
):
    """Of query, key or value; and the sequence's share of that of its bias."""
    tl.store(grad_qkv + places + PART * HEADS * SIZE, grad.to(grad_qkv.dtype.element_ty), mask=inside)
    sequence = tl.program_id(0) // HEADS
    tl.store(grad_bias + ((sequence * 3 + PART) * HEADS + head) * SIZE + tl.arange(0, SIZE), tl.sum(grad, 0))


@triton.jit
def _probabilities(q, k, length, log2_scale, LONGEST: tl.constexpr):
    """P, in fp32."""
    scores = tl.dot(q, tl.trans(k)) * log2_scale
    scores = tl.where((tl.arange(0, LONGEST) < length)[None, :], scores, float("-inf"))
    powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return powers * (1 / tl.sum(powers, 1))[:, None]


@triton.jit
def _kept(first, head, seed, threshold, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """What dropout keeps of the scores."""
    rows = ((first + tl.arange(0, LONGEST)) * HEADS + head) * LONGEST
    return kept_by_dropout(rows[:, None] + tl.arange(0, LONGEST)[None, :], seed, threshold)


@triton.jit
def _attention_forward(
    qkv,
    bias,
    boundaries,
    seed,
    out,
    log2_scale,
    threshold,
    kept_scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length, head = _tokens(boundaries, HEADS)
    if length == 0:
        return
    inside, _, q, k, v = _inputs(qkv, bias, first, length, head, HEADS, SIZE, LONGEST)
    p = _probabilities(q, k, length, log2_scale, LONGEST)
    if DROPOUT:
        p = tl.where(_kept(first, head, seed, threshold, HEADS, LONGEST), p * kept_scale, 0.0)
    context = tl.dot(p.to(v.dtype), v).to(v.dtype)
    tl.store(out + _places(first, head, 1, HEADS, SIZE, LONGEST), context, mask=inside)


@triton.jit
def _attention_backward(
    grad_out,
    qkv,
    bias,
    boundaries,
    seed,
    grad_qkv,
    grad_bias,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length, head = _tokens(boundaries, HEADS)
    if length == 0:
        return
    inside, places, q, k, v = _inputs(qkv, bias, first, length, head, HEADS, SIZE, LONGEST)
    grad = tl.load(grad_out + _places(first, head, 1, HEADS, SIZE, LONGEST), mask=inside, other=0.0)
    p = _probabilities(q, k, length, log2_scale, LONGEST)
    grad_p = tl.dot(grad, tl.trans(v))
    dropped = p
    if DROPOUT:
        kept = _kept(first, head, seed, threshold, HEADS, LONGEST)
        dropped = tl.where(kept, p * kept_scale, 0.0)
        grad_p = tl.where(kept, grad_p * kept_scale, 0.0)
    grad_v = tl.dot(tl.trans(dropped.to(v.dtype)), grad)
    _store_gradient(grad_v, grad_qkv, grad_bias, places, inside, head, 2, HEADS, SIZE)
    grad_scores = (p * (grad_p - tl.sum(grad_p * p, 1)[:, None])).to(v.dtype)
    grad_q = tl.dot(grad_scores, k) * scale
    _store_gradient(grad_q, grad_qkv, grad_bias, places, inside, head, 0, HEADS, SIZE)
    grad_k = tl.dot(tl.trans(grad_scores), q) * scale
    _store_gradient(grad_k, grad_qkv, grad_bias, places, inside, head, 1, HEADS, SIZE)


# ----------------------------------------------------------------------------------------------------------- operators
def _settings(qkv: Tensor, boundaries: Tensor, dropout_p: float) -> tuple[tuple[int], list[float], dict]:
    """The grid; 1/sqrt(D), the same for powers of 2, what dropout's bits must reach, 1 / (1 - p); compile-time ones."""
    *_, heads, size = qkv.shape
    scale = 1 / math.sqrt(size)
    numbers = [scale, scale / math.log(2), *settings(dropout_p)]
    shape = {"HEADS": heads, "SIZE": size, "LONGEST": LONGEST, "DROPOUT": dropout_p > 0, "num_warps": WARPS}
    return ((len(boundaries) - 1) * heads,), numbers, shape


def _attend(qkv: Tensor, bias: Tensor, boundaries: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    tokens, _, heads, size = qkv.shape
    out = qkv.new_empty(tokens, heads, size)
    grid, (_, *numbers), shape = _settings(qkv, boundaries, dropout_p)
    with torch.cuda.device_of(qkv):
        _attention_forward[grid](qkv.contiguous(), bias, boundaries, seed, out, *numbers, **shape)
    return out


def _attend_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, boundaries: Tensor, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    grad_qkv = qkv.new_empty(qkv.shape)
    shares = bias.new_zeros(len(boundaries) - 1, len(bias))  # zeros, for sequences without tokens
    grid, numbers, shape = _settings(qkv, boundaries, dropout_p)
    inputs = (grad.contiguous(), qkv.contiguous(), bias, boundaries, seed)
    with torch.cuda.device_of(qkv):
        _attention_backward[grid](*inputs, grad_qkv, shares, *numbers, **shape)
    return grad_qkv, shares.sum(0)


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_INPUTS = "Tensor qkv, Tensor bias, Tensor boundaries, Tensor? seed, float dropout_p"
_LIBRARY.define(f"short_attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"short_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.impl("short_attention", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("short_attention_backward", _attend_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::short_attention")
def _(qkv, bias, boundaries, seed, dropout_p):
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads, size)


@torch.library.register_fake("slope::short_attention_backward")
def _(grad, qkv, bias, boundaries, seed, dropout_p):
    return qkv.new_empty(qkv.shape), torch.empty_like(bias)


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    grads = torch.ops.slope.short_attention_backward(grad, *ctx.saved_tensors, ctx.dropout_p)
    return *grads, None, None, None


torch.library.register_autograd("slope::short_attention", _gradients, setup_context=_keep_inputs, lib=_LIBRARY)


def short_attention(qkv: Tensor, bias: Tensor, boundaries: Tensor, dropout_p: float) -> Tensor:
    """Softmax attention of every token to those of its own sequence.

    Args:
        qkv: query, key and value without their biases, [T, 3, A, D], bf16 or fp16, D in `HEAD_SIZES`.
        bias: fp32 [3 A D]; added here, since so its gradient costs no pass over that of `qkv`.
        boundaries: where each sequence begins, and where the last one ends, int32: 0, ..., T. No sequence is longer
            than `LONGEST`; one may be empty.
        dropout_p: share of the probabilities that are dropped; its seed comes from torch's generator.

    Returns:
        [T, A, D].
    """
    seed = dropout_seed(qkv) if dropout_p else None
    return torch.ops.slope.short_attention(qkv, bias, boundaries, seed, dropout_p)
