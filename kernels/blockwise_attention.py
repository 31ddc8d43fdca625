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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.blockwise_kernels import blockwise_forward, blockwise_over_keys, blockwise_over_queries
from kernels.dense_parts import dropout_seed
from kernels.short_attention import apart, settings
from kernels.triton_parts import sum_of_shares

LONGEST = 512  # tokens of a sequence


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


def _attend(query, key, value, bias, boundaries, seed, longest: int, dropout_p: float) -> tuple[Tensor, Tensor]:
    heads, (_, numbers, shape) = settings((query, key, value), boundaries, dropout_p)
    tokens, count, _ = query.shape
    out, log_sums = query.new_empty(query.shape), query.new_empty(count, tokens, dtype=torch.float32)
    blocks = -(-longest // FORWARD.queries)
    constants = shape | {"LONGEST": LONGEST, "BLOCKS": blocks} | FORWARD.constants()
    grid = ((len(boundaries) - 1) * count * blocks,)
    with torch.cuda.device_of(query):
        blockwise_forward[grid](*heads, bias, boundaries, seed, out, log_sums, tokens, *numbers[1:], **constants)
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
        blockwise_over_queries[(sequences * count * blocks[0],)](
            *(grad, out, log_sums, *heads, *known, biased, sums_products, *found),
            **constants,
            **OVER_QUERIES.constants(),
            BLOCKS=blocks[0],
        )
        blockwise_over_keys[(sequences * count * blocks[1],)](
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
