"""BERT's embeddings in Triton, forward and backward: the sum of three tables' rows, LayerNorm, dropout.

The forward pass is one kernel, which keeps no number of a token but the mean and the deviation. The backward pass takes
the sum from the tables again, so that it is exact; its first kernel undoes dropout and LayerNorm. What tokens of one id
give their row is then added up in the order of the tokens sorted by their ids:

    1. A program takes CHUNK of the sorted places. Runs of one id that end where they began, in this chunk, are rows of
       the gradient; of one that crosses a border of the chunk the program leaves its share.
    2. The program of the chunk in which such a run begins adds up the shares.

So a frequent id, as [MASK] is, keeps many programs busy, and there are no atomics: equal inputs give equal bits.
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

import functools
import math

import torch
from torch import Tensor, nn

from kernels.dense_parts import dropout_seed
from kernels.triton_parts import kept_by_dropout, norm_backward, settings, sum_of_shares, tl, triton

ROWS = 2  # tokens at a time: what a thread loads before it waits
PROGRAMS_OF_PROCESSOR = 4  # of those that take turns along the tokens
CHUNK = 32  # sorted places of a program
ROWS_OF_CHUNK = 4  # of these at a time
COLUMNS_OF_CHUNK = 1024
SHARES, COLUMNS_OF_SHARES = 32, 128  # that are added up at a time
TYPES = 2  # token types whose gradients the first kernel adds up on its way; of more, they are sorted, too


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _summed(
    words,
    positions,
    types,
    word_ids,
    position_ids,
    type_ids,
    rows,
    exists,
    columns,
    inside,
    length,
    HIDDEN: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The sum of the three tables' rows of the tokens `rows`, fp32 [ROWS, BLOCK], and their types.

    Without POSITIONS, tokens are those of sequences of `length`, one after the other.
    """
    word = tl.load(word_ids + rows, mask=exists, other=0).to(tl.int64)
    kind = tl.load(type_ids + rows, mask=exists, other=0).to(tl.int64)
    position = (rows % length).to(tl.int64)
    if POSITIONS:
        position = tl.load(position_ids + rows, mask=exists, other=0).to(tl.int64)
    there = exists[:, None] & inside[None, :]
    total = tl.load(words + word[:, None] * HIDDEN + columns[None, :], mask=there, other=0.0)
    total += tl.load(types + kind[:, None] * HIDDEN + columns[None, :], mask=there, other=0.0)
    total += tl.load(positions + position[:, None] * HIDDEN + columns[None, :], mask=there, other=0.0)
    return total, kind


@triton.jit
def _embed(
    words,
    positions,
    types,
    weight,
    bias,
    word_ids,
    position_ids,
    type_ids,
    seed,
    out,
    statistics,
    tokens,
    length,
    eps,
    threshold,
    kept_scale,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < tokens
    total, _ = _summed(
        *(words, positions, types, word_ids, position_ids, type_ids),
        *(rows, exists, columns, inside, length, HIDDEN, POSITIONS),
    )
    mean = tl.sum(total, 1) / HIDDEN
    centred = tl.where(inside[None, :], total - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / HIDDEN + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    y = centred * inverse[:, None] * scale + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if DROPOUT:
        kept = kept_by_dropout(rows[:, None] * HIDDEN + columns[None, :], seed, threshold)
        y = tl.where(kept, y * kept_scale, 0.0)
    places = rows[:, None].to(tl.int64) * HIDDEN + columns[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), mask=exists[:, None] & inside[None, :])
    tl.store(statistics + rows, mean, mask=exists)
    tl.store(statistics + tokens + rows, inverse, mask=exists)


@triton.jit
def _embed_backward(
    grad_out,
    grad_skip,
    words,
    positions,
    types,
    weight,
    word_ids,
    position_ids,
    type_ids,
    seed,
    statistics,
    grad_total,
    shares,
    tokens,
    length,
    threshold,
    kept_scale,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SKIP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    scale = tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    to_weight = tl.zeros([BLOCK], tl.float32)
    to_bias = tl.zeros([BLOCK], tl.float32)
    to_first_type = tl.zeros([BLOCK], tl.float32)
    to_second_type = tl.zeros([BLOCK], tl.float32)
    for begin in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = begin + tl.arange(0, ROWS)
        exists = rows < tokens
        places = rows[:, None].to(tl.int64) * HIDDEN + columns[None, :]
        there = exists[:, None] & inside[None, :]
        grad = tl.load(grad_out + places, mask=there, other=0.0).to(tl.float32)
        if SKIP:
            grad += tl.load(grad_skip + places, mask=there, other=0.0).to(tl.float32)
        total, kind = _summed(
            *(words, positions, types, word_ids, position_ids, type_ids),
            *(rows, exists, columns, inside, length, HIDDEN, POSITIONS),
        )
        if DROPOUT:
            kept = kept_by_dropout(rows[:, None] * HIDDEN + columns[None, :], seed, threshold)
            grad = tl.where(kept, grad * kept_scale, 0.0)
        inverse = tl.load(statistics + tokens + rows, mask=exists, other=0.0)[:, None]
        mean = tl.load(statistics + rows, mask=exists, other=0.0)[:, None]
        to_total, normalised = norm_backward(grad, total, mean, inverse, scale, HIDDEN)
        tl.store(grad_total + places, to_total, mask=there)
        to_weight += tl.sum(grad * normalised, 0)
        to_bias += tl.sum(grad, 0)
        to_first_type += tl.sum(tl.where((kind == 0)[:, None], to_total, 0.0), 0)
        to_second_type += tl.sum(tl.where((kind == 1)[:, None], to_total, 0.0), 0)
    share = shares + tl.program_id(0) * (4 * HIDDEN) + columns
    tl.store(share, to_weight, mask=inside)
    tl.store(share + HIDDEN, to_bias, mask=inside)
    tl.store(share + 2 * HIDDEN, to_first_type, mask=inside)
    tl.store(share + 3 * HIDDEN, to_second_type, mask=inside)


@triton.jit
def _key(keys, place, tokens):
    """The id at a sorted place; -1 where there is none."""
    return tl.load(keys + place, mask=(place >= 0) & (place < tokens), other=-1).to(tl.int32)


@triton.jit
def _sum_runs(
    grad,
    keys,
    order,
    total,
    shares,
    tokens,
    padding,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`shares` [chunks, 2, HIDDEN]: of the run that began before the chunk, and of one from here that goes on.

    Tokens of the id `padding` are not read, and are zeros.
    """
    begin = tl.program_id(0) * CHUNK
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    share = shares + tl.program_id(0).to(tl.int64) * (2 * HIDDEN) + columns
    before, after = _key(keys, begin - 1, tokens), _key(keys, begin + CHUNK, tokens)
    run = _key(keys, begin, tokens)
    added = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, begin + CHUNK, ROWS):
        places = first + tl.arange(0, ROWS)
        ids = tl.load(keys + places, mask=places < tokens, other=-1).to(tl.int32)
        read = (ids >= 0) & (ids != padding)
        rows = tl.load(order + places, mask=read, other=0)
        there = read[:, None] & inside[None, :]
        tile = tl.load(grad + rows[:, None] * HIDDEN + columns[None, :], mask=there, other=0.0)
        for i in tl.static_range(ROWS):
            key = _key(keys, first + i, tokens)
            row = tl.sum(tl.where((tl.arange(0, ROWS) == i)[:, None], tile, 0.0), 0)  # all of a column in one thread
            if key != run:  # which ends here
                if run == before:
                    tl.store(share, added, mask=inside)
                elif run >= 0:
                    tl.store(total + run.to(tl.int64) * HIDDEN + columns, added, mask=inside)
            added = tl.where(key != run, row, added + row)
            run = key
    if run >= 0:
        if run == before:
            tl.store(share, added, mask=inside)
        elif run == after:
            tl.store(share + HIDDEN, added, mask=inside)
        else:
            tl.store(total + run.to(tl.int64) * HIDDEN + columns, added, mask=inside)


@triton.jit
def _join_runs(
    keys,
    total,
    shares,
    tokens,
    padding,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
):
    chunk = tl.program_id(0)
    border = (chunk + 1) * CHUNK
    run = _key(keys, border - 1, tokens)
    goes_on = (run >= 0) & (run == _key(keys, border, tokens))
    goes_on &= run != padding  # whose row is zero as it is
    if goes_on & (run != _key(keys, border - CHUNK - 1, tokens)):  # it is this program's: it begins in its chunk
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < HIDDEN
        begun = tl.load(shares + (chunk.to(tl.int64) * 2 + 1) * HIDDEN + columns, mask=inside, other=0.0)
        added = tl.zeros([SHARES, BLOCK], tl.float32)
        first = chunk + 1
        while _key(keys, first * CHUNK, tokens) == run:
            chunks = first + tl.arange(0, SHARES)
            goes_through = tl.load(keys + chunks * CHUNK, mask=chunks * CHUNK < tokens, other=-1) == run
            places = chunks[:, None].to(tl.int64) * (2 * HIDDEN) + columns[None, :]
            added += tl.load(shares + places, mask=goes_through[:, None] & inside[None, :], other=0.0)
            first += SHARES
        tl.store(total + run.to(tl.int64) * HIDDEN + columns, begun + tl.sum(added, 0), mask=inside)


# ----------------------------------------------------------------------------------------------------------- operators
@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


def _embed_tokens(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    word_ids: Tensor,
    position_ids: Tensor | None,
    type_ids: Tensor,
    seed: Tensor | None,
    probability: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tokens, hidden = word_ids.numel(), weight.numel()
    out = weight.new_empty(*word_ids.shape, hidden, dtype=dtype)
    statistics = weight.new_empty(2, tokens)
    block = triton.next_power_of_2(hidden)
    ids = (word_ids.contiguous(), position_ids if position_ids is None else position_ids.contiguous())
    with torch.cuda.device_of(words):
        _embed[triton.cdiv(tokens, ROWS),](
            *(words, positions, types, weight, bias, *ids, type_ids.contiguous(), seed, out, statistics),
            *(tokens, word_ids.shape[-1], eps, *settings(probability)),
            *(hidden, block, ROWS, position_ids is not None, seed is not None),
            num_warps=_warps(block),
        )
    return out, statistics


def sums_by_id(grad: Tensor, ids: Tensor, rows: int, padding: int = -1) -> Tensor:
    """What tokens of each id have in `grad`, fp32 [T, H], added up in a fixed order, [rows, H]; ids [T], below `rows`.

    The row of `padding` is zero, as those of ids that no token has.
    """
    total, (tokens, hidden) = grad.new_zeros(rows, grad.shape[1]), grad.shape
    keys, order = torch.sort(ids.to(torch.int16 if rows <= 2**15 else torch.int32), stable=True)  # 2 bytes: half a sort
    chunks = triton.cdiv(tokens, CHUNK)
    shares = grad.new_empty(chunks, 2, hidden)
    block = min(COLUMNS_OF_CHUNK, triton.next_power_of_2(hidden))
    with torch.cuda.device_of(grad):
        _sum_runs[chunks, triton.cdiv(hidden, block)](
            *(grad, keys, order, total, shares, tokens, padding, hidden, block, CHUNK, ROWS_OF_CHUNK),
            num_warps=_warps(block),
        )
        _join_runs[chunks, triton.cdiv(hidden, COLUMNS_OF_SHARES)](
            *(keys, total, shares, tokens, padding, hidden, COLUMNS_OF_SHARES, CHUNK, SHARES), num_warps=4
        )
    return total


def _position_sums(grad: Tensor, word_ids: Tensor, position_ids: Tensor | None, rows: int) -> Tensor:
    if position_ids is not None:
        return sums_by_id(grad, position_ids.flatten(), rows)
    length, total = word_ids.shape[-1], grad.new_zeros(rows, grad.shape[1])
    torch.sum(grad.view(-1, length, grad.shape[1]), 0, out=total[:length])
    return total


def _embed_tokens_backward(
    grad_out: Tensor,
    grad_skip: Tensor | None,
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    word_ids: Tensor,
    position_ids: Tensor | None,
    type_ids: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    probability: float,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of words and of positions, and one tensor of those of LayerNorm's weight and bias and of the types."""
    tokens, hidden = word_ids.numel(), weight.numel()
    block = triton.next_power_of_2(hidden)
    programs = min(PROGRAMS_OF_PROCESSOR * _processors(words.device), math.ceil(tokens / ROWS))
    grad_total, shares = weight.new_empty(tokens, hidden), weight.new_empty(programs, 2 + TYPES, hidden)
    grads = (grad_out.contiguous(), grad_skip if grad_skip is None else grad_skip.contiguous())
    ids = (word_ids.contiguous(), position_ids if position_ids is None else position_ids.contiguous())
    with torch.cuda.device_of(words):
        _embed_backward[programs,](
            *(*grads, words, positions, types, weight, *ids, type_ids.contiguous(), seed, statistics),
            *(grad_total, shares, tokens, word_ids.shape[-1], *settings(probability)),
            *(hidden, block, ROWS, position_ids is not None, grad_skip is not None, seed is not None),
            num_warps=_warps(block),
        )
    sums = sum_of_shares(shares)
    if len(types) > TYPES:
        sums = torch.cat([sums[:2], sums_by_id(grad_total, type_ids.flatten(), len(types))])
    grad_words = sums_by_id(grad_total, word_ids.flatten(), len(words), padding)
    return grad_words, _position_sums(grad_total, word_ids, position_ids, len(positions)), sums[: 2 + len(types)]


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_IDS = "Tensor word_ids, Tensor? position_ids, Tensor type_ids, Tensor? seed"
_LIBRARY.define(
    f"embed(Tensor words, Tensor positions, Tensor types, Tensor weight, Tensor bias, {_IDS}, float probability, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "embed_backward(Tensor grad_out, Tensor? grad_skip, Tensor words, Tensor positions, Tensor types, Tensor weight, "
    f"{_IDS}, Tensor statistics, float probability, int padding) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("embed", _embed_tokens, "CompositeExplicitAutograd")
_LIBRARY.impl("embed_backward", _embed_tokens_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("slope::embed")
def _(words, positions, types, weight, bias, word_ids, position_ids, type_ids, seed, probability, eps, dtype):
    out = weight.new_empty(*word_ids.shape, weight.numel(), dtype=dtype)
    return out, weight.new_empty(2, word_ids.numel())


@torch.library.register_fake("slope::embed_backward")
def _(grad_out, grad_skip, words, positions, types, weight, *others):
    sums = weight.new_empty(2 + len(types), weight.numel())
    return torch.empty_like(words), torch.empty_like(positions), sums


# ------------------------------------------------------------------------------------------------------------ autograd
class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, words, positions, types, weight, bias, ids, padding, seed, probability, eps, dtype, twice):
        tables = (words, positions, types, weight)
        out, statistics = torch.ops.slope.embed(*tables, bias, *ids, seed, probability, eps, dtype)
        ctx.save_for_backward(*tables, *ids, seed, statistics)
        ctx.probability, ctx.padding = probability, padding
        return (out, out.view_as(out)) if twice else out

    @staticmethod
    def backward(ctx, grad_out, grad_skip=None):
        grad_words, grad_positions, sums = torch.ops.slope.embed_backward(
            grad_out, grad_skip, *ctx.saved_tensors, ctx.probability, ctx.padding
        )
        return grad_words, grad_positions, sums[2:], sums[0], sums[1], *[None] * 7


def embed(
    words: nn.Embedding,
    positions: nn.Embedding,
    types: nn.Embedding,
    norm: nn.LayerNorm,
    word_ids: Tensor,
    position_ids: Tensor | None,
    type_ids: Tensor,
    probability: float,
    twice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(LayerNorm(sum of the three tables' rows)), [..., H], in autocast's dtype where that is on, else in fp32.

    Statistics, sums and gradients are fp32, as the tables are.

    Args:
        word_ids: [..., S], in the tables as all ids: nothing here looks whether they are.
        position_ids: as word_ids; None: each row of word_ids begins at position 0.
        probability: of dropout, whose mask is that of `kernels.dense_parts.kept_by_dropout`.
        twice: return the result twice, as `kernels.dense_parts.dropout_add_layer_norm` does.

    Raises:
        ValueError: tables that are not fp32, or sequences that are longer than the table of positions.
    """
    if any(part.weight.dtype != torch.float32 for part in (words, positions, types, norm)):
        raise ValueError("the embeddings' tables must be fp32")
    if position_ids is None and word_ids.shape[-1] > len(positions.weight):
        raise ValueError(f"sequences of {word_ids.shape[-1]} tokens: there are {len(positions.weight)} positions")
    kind = word_ids.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    padding = -1 if words.padding_idx is None else words.padding_idx
    return _Embed.apply(
        *(words.weight, positions.weight, types.weight, norm.weight, norm.bias),
        *((word_ids, position_ids, type_ids), padding, dropout_seed(word_ids) if probability else None),
        *(probability, norm.eps, dtype, twice),
    )
