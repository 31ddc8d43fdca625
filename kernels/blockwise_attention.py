"""Attention of sequences that lie end to end and have at most 512 tokens, in Triton, block by block.

A program takes one head of one sequence and a block of its queries, or of its keys, and goes over the blocks of the
others, as FlashAttention-2 does (Dao, 2023): the softmax is made as blocks come, and the logarithm of its sum is kept
for the backward pass. That is two kernels, one over blocks of queries, for their gradients, one over blocks of keys.
Both compute the probabilities again; nothing is added up across programs, so equal inputs give equal bits.

The interface, the formulas and the mask of dropout are those of kernels/short_attention.py. The biases of the
projections cost no pass over query, key and value:

    query   added where it is read, rounded, and written so for the backward pass over keys
    key     changes no probability, as it adds one number to all scores of a query: it is left out, its gradient is 0
    value   P' (V + 1 b^T) = P' V + rowsum(P') b^T, and over queries dO (V + 1 b^T)^T = dO V^T + (dO b) 1^T; over keys,
            where a program reads its values once, added and rounded
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dense_parts import dropout_seed
from kernels.short_attention import apart, folded, settings
from kernels.triton_parts import sum_of_shares, tl, triton

LONGEST = 512  # tokens of a sequence
HEAD_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: what a program takes at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, at most: so that more programs fit on a multiprocessor."""

    def constants(self) -> dict[str, int | None]:
        shape = {"QUERIES": self.queries, "KEYS": self.keys, "num_warps": self.warps, "num_stages": self.stages}
        return shape | ({} if self.registers is None else {"maxnreg": self.registers})


FORWARD = Launch(64, 64, 4, 3)
OVER_QUERIES = Launch(64, 32, 4, 5, 128)
OVER_KEYS = Launch(32, 64, 4, 3, 168)


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _program(boundaries, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """(the sequence, its first token, how many it has, the head, the block) of this program."""
    number = tl.program_id(0) // BLOCKS
    sequence = number // HEADS
    first = tl.load(boundaries + sequence)
    return sequence, first, tl.load(boundaries + sequence + 1) - first, number % HEADS, tl.program_id(0) % BLOCKS


@triton.jit
def _rows(base, start, numbers, length, STRIDE: tl.constexpr, SIZE: tl.constexpr, TAIL: tl.constexpr):
    """Of the tokens from `start` on, [tokens, SIZE]; in a tail zeros behind the sequence's end."""
    places = base + start * STRIDE + numbers[:, None] * STRIDE + tl.arange(0, SIZE)[None, :]
    if TAIL:
        return tl.load(places, mask=(start + numbers < length)[:, None], other=0.0)
    return tl.load(places)


@triton.jit
def _stream(first, head, seed, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """What the numbers of a head's scores begin with, and the seed's second word."""
    return (first * HEADS + head) * LONGEST + tl.load(seed), tl.load(seed + 1).to(tl.uint32, bitcast=True)


@triton.jit
def _kept(stream, word, queries, keys, begin_query, begin_key, threshold, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """What dropout keeps of the scores of a block, one of `queries` and `keys` a column and the other a row.

    These count from the block's beginning, a multiple of 16: so the compiler knows their bits in each register.
    """
    begin = stream + begin_query * (HEADS * LONGEST) + begin_key
    numbers = begin + (queries & -9) * (HEADS * LONGEST) + (keys & -9)
    bits = folded(numbers.to(tl.uint32, bitcast=True), 0xED5AD4BB)
    bits = folded(bits ^ word, 0xAC4C1B51)
    bits = tl.where((queries & 8) != 0, folded(bits, 0xC2B2AE3D), bits)
    return (bits << ((keys & 8) * 2).to(tl.uint32)) >= (threshold.to(tl.uint32) << 16)


@triton.jit
def _more_context(
    start,
    greatest,
    total,
    kept_total,
    context,
    q,
    key,
    value,
    length,
    log2_scale,
    stream,
    word,
    begin_query,
    threshold,
    TAIL: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The forward pass's sums with a block of keys more; `TAIL`: it reaches behind the sequence's end."""
    numbers = tl.arange(0, KEYS)
    scores = tl.dot(q, tl.trans(_rows(key, start, numbers, length, STRIDE, SIZE, TAIL)))
    if TAIL:
        scores = tl.where((start + numbers < length)[None, :], scores, float("-inf"))
    before, greatest = greatest, tl.maximum(greatest, tl.max(scores, 1) * log2_scale)
    powers = tl.exp2(scores * log2_scale - greatest[:, None])
    shrunk = tl.exp2(before - greatest)
    total = total * shrunk + tl.sum(powers, 1)
    if DROPOUT:
        queries = tl.arange(0, QUERIES)[:, None]
        kept = _kept(stream, word, queries, numbers[None, :], begin_query, start, threshold, HEADS, LONGEST)
        powers = tl.where(kept, powers, 0.0)
        kept_total = kept_total * shrunk + tl.sum(powers, 1)
    v = _rows(value, start, numbers, length, STRIDE, SIZE, TAIL)
    context = tl.dot(powers.to(v.dtype), v, context * shrunk[:, None])
    return greatest, total, kept_total, context


@triton.jit(do_not_specialize=["threshold"])
def _blockwise_forward(
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    out,
    log_sums,
    tokens,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    _, first, length, head, block = _program(boundaries, HEADS, BLOCKS)
    begin_query, queries = block * QUERIES, tl.arange(0, QUERIES)
    if begin_query >= length:
        return
    size = tl.arange(0, SIZE)
    begin = first.to(tl.int64) * STRIDE + head * SIZE
    q = _rows(query + begin, begin_query, queries, length, STRIDE, SIZE, True)
    q = (q.to(tl.float32) + tl.load(bias + head * SIZE + size)[None, :]).to(q.dtype)
    stream, word = 0, threshold
    if DROPOUT:
        stream, word = _stream(first, head, seed, HEADS, LONGEST)
    greatest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    kept_total = tl.zeros([QUERIES], tl.float32)
    context = tl.zeros([QUERIES, SIZE], tl.float32)
    full = length // KEYS * KEYS
    for start in range(0, full, KEYS):
        greatest, total, kept_total, context = _more_context(
            start, greatest, total, kept_total, context, q, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, False, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    if full < length:
        greatest, total, kept_total, context = _more_context(
            full, greatest, total, kept_total, context, q, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, True, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    queries += begin_query
    if not DROPOUT:
        kept_total = total
    context += kept_total[:, None] * tl.load(bias + (2 * HEADS + head) * SIZE + size)[None, :]
    context *= (kept_scale / total)[:, None]
    places = (first + queries[:, None]).to(tl.int64) * (HEADS * SIZE) + head * SIZE + size[None, :]
    tl.store(out + places, context.to(out.dtype.element_ty), mask=(queries < length)[:, None])
    sums = greatest + tl.log2(total)
    tl.store(log_sums + head * tokens + first + queries, sums, mask=queries < length)


@triton.jit
def _store_gradient(
    grad,
    tokens,
    grad_qkv,
    grad_bias,
    sequence,
    first,
    length,
    head,
    block,
    PART: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Of query, key or value; and the block's share of that of its bias: none of key's, which is 0."""
    size = tl.arange(0, SIZE)
    places = (first + tokens[:, None]).to(tl.int64) * (3 * HEADS * SIZE) + (PART * HEADS + head) * SIZE + size[None, :]
    tl.store(grad_qkv + places, grad.to(grad_qkv.dtype.element_ty), mask=(tokens < length)[:, None])
    if PART != 1:
        share = tl.sum(tl.where((tokens < length)[:, None], grad, 0.0), 0)
        tl.store(grad_bias + (((sequence * SHARES + block) * 3 + PART) * HEADS + head) * SIZE + size, share)


@triton.jit
def _more_of_queries(
    start,
    grad_q,
    q,
    grad,
    sums,
    kept_rest,
    rest,
    key,
    value,
    length,
    log2_scale,
    stream,
    word,
    begin_query,
    threshold,
    TAIL: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    numbers = tl.arange(0, KEYS)
    k = _rows(key, start, numbers, length, STRIDE, SIZE, TAIL)
    powers = tl.exp2(tl.dot(q, tl.trans(k)) * log2_scale - sums[:, None])
    if TAIL:
        powers = tl.where((start + numbers < length)[None, :], powers, 0.0)
    grad_p = tl.dot(grad, tl.trans(_rows(value, start, numbers, length, STRIDE, SIZE, TAIL))) + kept_rest[:, None]
    if DROPOUT:
        queries = tl.arange(0, QUERIES)[:, None]
        kept = _kept(stream, word, queries, numbers[None, :], begin_query, start, threshold, HEADS, LONGEST)
        grad_p = tl.where(kept, grad_p, rest[:, None])
    return tl.dot((powers * grad_p).to(k.dtype), k, grad_q)


@triton.jit
def _joined(sums, products):
    """Of each query the logarithm of its softmax's sum and rowsum(dO * O), as one number of 64 bits to load."""
    low = sums.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (products.to(tl.uint32, bitcast=True).to(tl.uint64) << 32 | low).to(tl.int64, bitcast=True)


@triton.jit
def _halves(both):
    low, high = both.to(tl.uint32), (both.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _more_of_keys(
    start,
    grad_k,
    grad_v,
    k,
    v,
    grad_out,
    biased,
    sums_products,
    length,
    log2_scale,
    stream,
    word,
    begin_key,
    threshold,
    TAIL: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    numbers = tl.arange(0, QUERIES)
    if TAIL:  # powers are 1 behind the end, and all that they are multiplied with is 0
        sums, product = _halves(tl.load(sums_products + start + numbers, mask=start + numbers < length, other=0))
    else:
        sums, product = _halves(tl.load(sums_products + start + numbers))
    q = _rows(biased, start, numbers, length, HEADS * SIZE, SIZE, TAIL)
    powers = tl.exp2(tl.dot(k, tl.trans(q)) * log2_scale - sums[None, :])
    grad = _rows(grad_out, start, numbers, length, HEADS * SIZE, SIZE, TAIL)
    grad_p = tl.dot(v, tl.trans(grad))
    dropped = powers
    if DROPOUT:
        keys = tl.arange(0, KEYS)[:, None]
        kept = _kept(stream, word, numbers[None, :], keys, start, begin_key, threshold, HEADS, LONGEST)
        dropped = tl.where(kept, powers, 0.0)
    grad_v = tl.dot(dropped.to(grad.dtype), grad, grad_v)
    grad_scores = dropped * grad_p - powers * product[None, :]
    return tl.dot(grad_scores.to(q.dtype), q, grad_k), grad_v


@triton.jit(do_not_specialize=["threshold"])
def _blockwise_over_queries(
    grad_out,
    out,
    log_sums,
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    biased,
    sums_products,
    grad_qkv,
    grad_bias,
    tokens,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The queries' gradients; `biased` queries, and `sums_products` for the kernel over keys."""
    sequence, first, length, head, block = _program(boundaries, HEADS, BLOCKS)
    begin_query, queries = block * QUERIES, tl.arange(0, QUERIES)
    if begin_query >= length:
        return
    size = tl.arange(0, SIZE)
    begin = first.to(tl.int64) * STRIDE + head * SIZE
    begin_out = first.to(tl.int64) * (HEADS * SIZE) + head * SIZE
    q = _rows(query + begin, begin_query, queries, length, STRIDE, SIZE, True)
    q = (q.to(tl.float32) + tl.load(bias + head * SIZE + size)[None, :]).to(q.dtype)
    stream, word = 0, threshold
    if DROPOUT:
        stream, word = _stream(first, head, seed, HEADS, LONGEST)
    grad = _rows(grad_out + begin_out, begin_query, queries, length, HEADS * SIZE, SIZE, True)
    given_out = _rows(out + begin_out, begin_query, queries, length, HEADS * SIZE, SIZE, True)
    product = tl.sum(grad.to(tl.float32) * given_out.to(tl.float32), 1)
    of_bias = tl.sum(grad.to(tl.float32) * tl.load(bias + (2 * HEADS + head) * SIZE + size)[None, :], 1)
    inside = begin_query + queries < length
    places = begin_query + queries
    tl.store(biased + begin_out + places[:, None] * (HEADS * SIZE) + size[None, :], q, mask=inside[:, None])
    sums = tl.load(log_sums + head * tokens + first + places, mask=inside, other=float("inf"))
    product /= kept_scale  # what is kept gets its factor at the end
    tl.store(sums_products + head * tokens + first + places, _joined(sums, product), mask=inside)
    rest, kept_rest = -product, of_bias - product
    grad_q = tl.zeros([QUERIES, SIZE], tl.float32)
    full = length // KEYS * KEYS
    for start in range(0, full, KEYS):
        grad_q = _more_of_queries(
            start, grad_q, q, grad, sums, kept_rest, rest, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, False, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    if full < length:
        grad_q = _more_of_queries(
            full, grad_q, q, grad, sums, kept_rest, rest, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, True, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    grad_q *= scale * kept_scale
    _store_gradient(grad_q, places, grad_qkv, grad_bias, sequence, first, length, head, block, 0, HEADS, SIZE, SHARES)


@triton.jit(do_not_specialize=["threshold"])
def _blockwise_over_keys(
    grad_out,
    biased,
    sums_products,
    key,
    value,
    bias,
    boundaries,
    seed,
    grad_qkv,
    grad_bias,
    tokens,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of keys and values; all scores are transposed, [KEYS, QUERIES]."""
    sequence, first, length, head, block = _program(boundaries, HEADS, BLOCKS)
    begin_key, keys = block * KEYS, tl.arange(0, KEYS)
    if begin_key >= length:
        return
    size = tl.arange(0, SIZE)
    begin = first.to(tl.int64) * STRIDE + head * SIZE
    begin_out = first.to(tl.int64) * (HEADS * SIZE) + head * SIZE
    begin_row = head * tokens + first
    k = _rows(key + begin, begin_key, keys, length, STRIDE, SIZE, True)
    v = _rows(value + begin, begin_key, keys, length, STRIDE, SIZE, True)
    v = (v.to(tl.float32) + tl.load(bias + (2 * HEADS + head) * SIZE + size)[None, :]).to(v.dtype)
    stream, word = 0, threshold
    if DROPOUT:
        stream, word = _stream(first, head, seed, HEADS, LONGEST)
    grad_k = tl.zeros([KEYS, SIZE], tl.float32)
    grad_v = tl.zeros([KEYS, SIZE], tl.float32)
    full = length // QUERIES * QUERIES
    for start in range(0, full, QUERIES):
        grad_k, grad_v = _more_of_keys(
            start, grad_k, grad_v, k, v, grad_out + begin_out, biased + begin_out, sums_products + begin_row,
            length, log2_scale, stream, word, begin_key, threshold, False, HEADS,
            SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    if full < length:
        grad_k, grad_v = _more_of_keys(
            full, grad_k, grad_v, k, v, grad_out + begin_out, biased + begin_out, sums_products + begin_row,
            length, log2_scale, stream, word, begin_key, threshold, True, HEADS,
            SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    keys += begin_key
    grad_v *= kept_scale
    grad_k *= scale * kept_scale
    _store_gradient(grad_v, keys, grad_qkv, grad_bias, sequence, first, length, head, block, 2, HEADS, SIZE, SHARES)
    _store_gradient(grad_k, keys, grad_qkv, grad_bias, sequence, first, length, head, block, 1, HEADS, SIZE, SHARES)


# ----------------------------------------------------------------------------------------------------------- operators
def _attend(query, key, value, bias, boundaries, seed, longest: int, dropout_p: float) -> tuple[Tensor, Tensor]:
    heads, (_, numbers, shape) = settings((query, key, value), boundaries, dropout_p)
    tokens, count, _ = query.shape
    out, log_sums = query.new_empty(query.shape), query.new_empty(count, tokens, dtype=torch.float32)
    blocks = -(-longest // FORWARD.queries)
    constants = shape | {"LONGEST": LONGEST, "BLOCKS": blocks} | FORWARD.constants()
    grid = ((len(boundaries) - 1) * count * blocks,)
    with torch.cuda.device_of(query):
        _blockwise_forward[grid](*heads, bias, boundaries, seed, out, log_sums, tokens, *numbers[1:], **constants)
    return out, log_sums


def _attend_backward(
    grad, out, log_sums, query, key, value, bias, boundaries, seed, longest: int, dropout_p: float
) -> tuple[Tensor, Tensor]:
    heads, (_, numbers, shape) = settings((query, key, value), boundaries, dropout_p)
    (tokens, count, size), sequences = query.shape, len(boundaries) - 1
    blocks = -(-longest // OVER_QUERIES.queries), -(-longest // OVER_KEYS.keys)
    constants = shape | {"LONGEST": LONGEST, "SHARES": max(blocks)}
    grad_qkv = query.new_empty(tokens, 3, count, size)
    biased, sums_products = query.new_empty(query.shape), torch.empty_like(log_sums, dtype=torch.int64)
    shares = bias.new_zeros(sequences * max(blocks), len(bias))  # zeros, where a sequence has no such block
    grad, known, found = grad.contiguous(), (bias, boundaries, seed), (grad_qkv, shares, tokens, *numbers)
    with torch.cuda.device_of(query):
        _blockwise_over_queries[(sequences * count * blocks[0],)](
            *(grad, out, log_sums, *heads, *known, biased, sums_products, *found),
            **constants,
            **OVER_QUERIES.constants(),
            BLOCKS=blocks[0],
        )
        _blockwise_over_keys[(sequences * count * blocks[1],)](
            *(grad, biased, sums_products, *heads[1:], *known, *found),
            **constants,
            **OVER_KEYS.constants(),
            BLOCKS=blocks[1],
        )
    return grad_qkv, sum_of_shares(shares)


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor bias, Tensor boundaries, Tensor? seed, SymInt longest, "
    "float dropout_p"
)
_LIBRARY.define(f"blockwise_attention({_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"blockwise_attention_backward(Tensor grad, Tensor out, Tensor log_sums, {_INPUTS}) -> (Tensor, Tensor)"
)
_LIBRARY.impl("blockwise_attention", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("blockwise_attention_backward", _attend_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::blockwise_attention")
def _(query, key, value, bias, boundaries, seed, longest, dropout_p):
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.register_fake("slope::blockwise_attention_backward")
def _(grad, out, log_sums, query, key, value, bias, boundaries, seed, longest, dropout_p):
    tokens, count, size = query.shape
    return query.new_empty(tokens, 3, count, size), torch.empty_like(bias)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias, boundaries, seed, longest, dropout_p, *heads):
        inputs = (bias, boundaries, seed, longest, dropout_p)
        out, log_sums = torch.ops.slope.blockwise_attention(*apart(heads), *inputs)
        ctx.save_for_backward(out, log_sums, bias, boundaries, seed, *heads)
        ctx.longest, ctx.dropout_p = longest, dropout_p
        return out

    @staticmethod
    def backward(ctx, grad):
        out, log_sums, bias, boundaries, seed, *heads = ctx.saved_tensors
        grad_qkv, grad_bias = torch.ops.slope.blockwise_attention_backward(
            grad, out, log_sums, *apart(heads), bias, boundaries, seed, ctx.longest, ctx.dropout_p
        )
        grads = (grad_qkv,) if len(heads) == 1 else grad_qkv.unbind(1)
        return grad_bias, None, None, None, None, *grads


def blockwise_attention(
    heads: Sequence[Tensor], bias: Tensor, boundaries: Tensor, longest: int, dropout_p: float
) -> Tensor:
    """Softmax attention of every token to those of its own sequence.

    Args:
        heads, bias, boundaries, dropout_p: as `kernels.short_attention.short_attention` takes them.
        longest: no sequence has more tokens, which is not checked; at most `LONGEST`.

    Returns:
        [T, A, D].
    """
    seed = dropout_seed(heads[0]) if dropout_p else None
    return _BlockwiseAttention.apply(bias, boundaries, seed, longest, dropout_p, *heads)
