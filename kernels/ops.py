"""The kernels as torch operators, and what a layer's operands are made with.

    slope::sparse_mm(x, kept, metadata, bias, adapter_x, adapter_kept) -> y     the 2:4 GEMM (sparse_gemm.cuh)
    slope::gather(grad, mask_bits, m) -> grad_values                            the weight gradient, compressed

Both are made with the low-level `torch.library` calls, whose host time is a fifth of `custom_op`'s. They have fake
kernels, so `torch.compile(fullgraph=True)` sees one node each; neither waits for the GPU, so CUDA graphs capture them.
`SparseProduct` is their autograd; kernels/layout.py describes `kept` and `metadata`.
"""

import torch
from torch import Tensor

from kernels.autotune import choice_of
from kernels.native import DTYPE_CODES, call_operands, launch_sparse_mm


# ------------------------------------------------------------------------------------------------------------ products
def _in_rows(x: Tensor) -> Tensor:
    """[..., in] in rows that the copy engine takes, 16-byte aligned: as it is, or as a matrix [tokens, in]."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0 and x.dim() != 2:
        return x
    x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _sparse_mm(
    x: Tensor,
    kept: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    adapter_x: Tensor | None,
    adapter_kept: Tensor | None,
) -> Tensor:
    if x.dtype != kept.dtype or x.dtype is torch.float32:
        raise RuntimeError(f"2:4 product of {x.dtype} with {kept.dtype}: must be both bfloat16 or both float16")
    if adapter_x is not None and not (adapter_x.is_contiguous() and adapter_kept.is_contiguous()):
        raise RuntimeError("2:4 product: adapter_x and adapter_kept must be contiguous")
    y = x.new_empty(*x.shape[:-1], kept.shape[0])
    if y.numel():
        out, half = kept.shape
        choice = choice_of(y.numel() // out, out, half, x.dtype)
        launch_sparse_mm(choice.variant, choice.group, _in_rows(x), kept, metadata, bias, adapter_x, adapter_kept, y)
    return y


def _gather(grad: Tensor, mask_bits: Tensor, m: int) -> Tensor:
    out, columns = grad.shape
    values = grad.new_empty(out, columns * 2 // m, dtype=torch.float32)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dtype = DTYPE_CODES[grad.dtype]
    call_operands("gather", grad, grad.stride(0), mask_bits, values, out, columns, m, dtype, 0)
    return values


_LIBRARY = torch.library.Library("slope", "DEF")
_LIBRARY.define(
    "sparse_mm(Tensor x, Tensor kept, Tensor metadata, Tensor? bias, Tensor? adapter_x, Tensor? adapter_kept) -> Tensor"
)
_LIBRARY.define("gather(Tensor grad, Tensor mask_bits, int m) -> Tensor")
_LIBRARY.impl("sparse_mm", _sparse_mm, "CUDA")
_LIBRARY.impl("gather", _gather, "CUDA")


@torch.library.register_fake("slope::sparse_mm")
def _(x, kept, metadata, bias, adapter_x, adapter_kept):
    return x.new_empty(*x.shape[:-1], kept.shape[0])


@torch.library.register_fake("slope::gather")
def _(grad, mask_bits, m):
    return grad.new_empty(grad.shape[0], grad.shape[1] * 2 // m, dtype=torch.float32)


sparse_mm = torch.ops.slope.sparse_mm.default
gather = torch.ops.slope.gather.default


# ------------------------------------------------------------------------------------------------------------ autograd
class SparseProduct(torch.autograd.Function):
    """The three products of one layer on 2:4 operands, with bias; the fourth line of the paper is `AdaptedProduct`.

    Args of `forward`: x [..., in]; values (for its gradient alone); bias fp32 [out] or None; the forward operand of
        W^R; the backward operand of W^{R,C}; mask_bits and m of the layer.
    """

    @staticmethod
    def forward(ctx, x, values, bias, kept, metadata, kept_backward, metadata_backward, mask_bits, m):
        ctx.save_for_backward(x, kept_backward, metadata_backward, mask_bits)
        ctx.m = m
        return sparse_mm(x, kept, metadata, bias, None, None)  # (1) Y = X (W^R)^T

    @staticmethod
    def backward(ctx, grad_y):
        x, kept_backward, metadata_backward, mask_bits = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = sparse_mm(grad_y, kept_backward, metadata_backward, None, None, None)  # (3) dX = dY W^{R,C}
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows.t() @ x.reshape(-1, x.shape[-1])
            grad_values = gather(grad_weight, mask_bits, ctx.m)  # (2) dW = mask * (dY^T X)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0, dtype=torch.float32)
        return grad_x, grad_values, grad_bias, None, None, None, None, None, None


class AdaptedProduct(torch.autograd.Function):
    """`SparseProduct` with adapters in the same GEMM: Y = X (W^R)^T + (X L) R / r, the reduction widened by 2r columns.

    `left_spread` is L [in, 2r'] and `right_spread` is (R / r)^T [out, 2r'], each column c of theirs at c/2*4 + c%2
    with zeros between, so that X L comes out where the 2:4 product reads it; r' is r rounded up to a multiple of 8.
    `left_kept` [in, r'] and `right_kept` [out, r'] are the same without the zeros.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        kept: Tensor,
        metadata: Tensor,
        kept_backward: Tensor,
        metadata_backward: Tensor,
        left_spread: Tensor,
        left_kept: Tensor,
        right_spread: Tensor,
        right_kept: Tensor,
        mask_bits: Tensor,
        m: int,
    ):
        x_left = x.reshape(-1, x.shape[-1]) @ left_spread
        ctx.save_for_backward(x, x_left, kept_backward, metadata_backward, left_kept, right_spread, mask_bits)
        ctx.m, ctx.rank = m, left.shape[1]
        return sparse_mm(x, kept, metadata, bias, x_left, right_kept)  # (1) and (4)

    @staticmethod
    def backward(ctx, grad_y):
        x, x_left, kept_backward, metadata_backward, left_kept, right_spread, mask_bits = ctx.saved_tensors
        grad_x = grad_values = grad_bias = grad_left = grad_right = None
        x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        grad_right_in = grad_rows @ right_spread  # dY R^T / r, spread
        if ctx.needs_input_grad[0]:
            grad_x = sparse_mm(grad_y, kept_backward, metadata_backward, None, grad_right_in, left_kept)
        if ctx.needs_input_grad[1]:
            grad_values = gather(grad_rows.t() @ x_rows, mask_bits, ctx.m)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0, dtype=torch.float32)
        if ctx.needs_input_grad[3]:
            grad_left = gathered_columns(x_rows.t() @ grad_right_in, ctx.rank)
        if ctx.needs_input_grad[4]:
            grad_right = gathered_columns(grad_rows.t() @ x_left, ctx.rank).t() / ctx.rank
        return grad_x, grad_values, grad_bias, grad_left, grad_right, *[None] * 10


def read_columns(spread: Tensor) -> Tensor:
    """A view of what the 2:4 product reads of adapters' columns [rows, 2w]: column c at c/2*4 + c%2, [rows, w/2, 2]."""
    return spread.unflatten(-1, (-1, 4))[..., :2]


def gathered_columns(spread: Tensor, rank: int) -> Tensor:
    """The first `rank` of these columns, packed, in fp32."""
    return read_columns(spread).flatten(-2)[..., :rank].float()
