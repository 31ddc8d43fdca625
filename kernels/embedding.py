"""Lookups of rows whose gradients are equal bits for equal inputs, on a GPU, too.

Those of embeddings are added up in a fixed order. torch adds up those of tables with few rows by atomics
(embedding_dense_backward on CUDA, from some thousand tokens on).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # whose sums are a product with zeros and ones: by rows, torch would add up thousands one after the other


@contextmanager
def _fixed_order() -> Iterator[None]:
    """torch's own way of adding up in a fixed order, for the operations inside; its settings stay as they are."""
    import torch._inductor.config  # a second, which only backward passes are to take

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, compiler = torch.utils.deterministic.fill_uninitialized_memory, torch._inductor.config.deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch._inductor.config.deterministic = compiler


def _embedding_gradient(grad: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    if rows <= FEW_ROWS and padding < 0:
        chosen = ids.flatten() == torch.arange(rows, device=ids.device)[:, None]
        return chosen.to(grad.dtype) @ grad.reshape(-1, grad.shape[-1])
    with _fixed_order():
        return torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)


_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_LIBRARY.define("embedding_gradient(Tensor grad, Tensor ids, int rows, int padding) -> Tensor")
_LIBRARY.impl("embedding_gradient", _embedding_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("slope::embedding_gradient")(
    lambda grad, ids, rows, padding: grad.new_empty(rows, grad.shape[-1])
)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, padding):
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = len(weight), padding
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.slope.embedding_gradient(grad, *ctx.saved_tensors, ctx.rows, ctx.padding), None, None


def lookup(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """The rows of `ids` [...], [..., H]; those of the padding index give no gradient."""
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx
    return _Lookup.apply(embedding.weight, ids, padding)


# ------------------------------------------------------------------------------------------------- rows of activations
# Its own operator, so that the compiler does not make atomic additions in 16 bits of it, one for each number.
_LIBRARY.define("spread_rows(Tensor grad, Tensor places, Tensor rows) -> Tensor")


def _spread_rows(grad: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    spread = grad.new_zeros(*rows.shape[:-1], grad.shape[-1])
    spread.view(-1, grad.shape[-1]).index_add_(0, places, grad)
    return spread


_LIBRARY.impl("spread_rows", _spread_rows, "CompositeExplicitAutograd")
torch.library.register_fake("slope::spread_rows")(
    lambda grad, places, rows: grad.new_empty(*rows.shape[:-1], grad.shape[-1])
)


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, places):
        rows = x.new_empty(*x.shape[:-1], 0)  # nothing but a shape: kept as numbers, the compiler takes it for constant
        ctx.save_for_backward(places, rows)
        return x.flatten(0, -2).index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.slope.spread_rows(grad, *ctx.saved_tensors), None


def rows_of(x: Tensor, places: Tensor) -> Tensor:
    """The rows of x [..., H] at `places` [R] among all of them, [R, H].

    The gradients of a place that comes up more than once are added up in no fixed order. That changes nothing where
    all of them but one, or two, are zero, as those of masked tokens' unused places are: their labels are ignored.
    """
    return _RowsOf.apply(x, places)
