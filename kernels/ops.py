"""The kernels as torch operators, and what a layer's operands are made with.

    slope::sparse_mm(x, kept, metadata, bias, adapter_x, adapter_kept) -> y     the 2:4 GEMM (sparse_gemm.cuh)
    slope::gather(grad, mask_bits, m) -> grad_values                            the weight gradient, compressed
    slope::adapter_grads(grad, left_rows, right_rows, rank) -> dL, dR           out of the weight gradient (adapters.cu)

They are made with the low-level `torch.library` calls, whose host time is a fifth of `custom_op`'s. They have fake
kernels, so `torch.compile(fullgraph=True)` sees one node each, for any number of tokens; none waits for the GPU, so
CUDA graphs capture them. `SparseProduct` is their autograd; kernels/layout.py describes `kept` and `metadata`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.autotune import choice_of
from kernels.native import DTYPE_CODES, call_operands, launch_adapter_grads, launch_sparse_mm

WIDTH_STEP = 16  # of the adapters' columns: what an instruction of their gradients takes


# ------------------------------------------------------------------------------------------------------------ products
def _in_rows(x: Tensor) -> Tensor:
    """[..., in] in rows that the copy engine takes, 16-byte aligned: as it is, or as a matrix [tokens, in]."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0 and x.dim() != 2:
        return x
    if x.dim() != 2:
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
    if adapter_x is not None and not (adapter_x.is_contiguous() and adapter_kept.stride(1) == 1):
        raise RuntimeError("2:4 product: adapter_x must be contiguous, and so must each row of adapter_kept")
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


def _adapter_grads(grad: Tensor, left_rows: Tensor, right_rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not (left_rows.is_contiguous() and right_rows.stride(1) == 1):
        raise RuntimeError("gradients of adapters: left_rows must be contiguous, and so must each row of right_rows")
    out, columns = grad.shape
    left, right = (grad.new_empty(shape, dtype=torch.float32) for shape in ((columns, rank), (rank, out)))
    launch_adapter_grads(grad.contiguous(), left_rows, right_rows, left, right)
    return left, right


_LIBRARY = torch.library.Library("slope", "DEF")
_LIBRARY.define(
    "sparse_mm(Tensor x, Tensor kept, Tensor metadata, Tensor? bias, Tensor? adapter_x, Tensor? adapter_kept) -> Tensor"
)
_LIBRARY.define("gather(Tensor grad, Tensor mask_bits, int m) -> Tensor")
_LIBRARY.define("adapter_grads(Tensor grad, Tensor left_rows, Tensor right_rows, int rank) -> (Tensor, Tensor)")
IMPLEMENTATIONS = {"sparse_mm": _sparse_mm, "gather": _gather, "adapter_grads": _adapter_grads}
for _name, _implementation in IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _implementation, "CUDA")


@torch.library.register_fake("slope::sparse_mm")
def _(x, kept, metadata, bias, adapter_x, adapter_kept):
    return x.new_empty(*x.shape[:-1], kept.shape[0])


@torch.library.register_fake("slope::gather")
def _(grad, mask_bits, m):
    return grad.new_empty(grad.shape[0], grad.shape[1] * 2 // m, dtype=torch.float32)


@torch.library.register_fake("slope::adapter_grads")
def _(grad, left_rows, right_rows, rank):
    out, columns = grad.shape
    return tuple(grad.new_empty(shape, dtype=torch.float32) for shape in ((columns, rank), (rank, out)))


sparse_mm = torch.ops.slope.sparse_mm.default
gather = torch.ops.slope.gather.default
adapter_grads = torch.ops.slope.adapter_grads.default


# ------------------------------------------------------------------------------------------------------------ autograd
def adapter_width(rank: int) -> int:
    """Columns of the adapters' operands: `rank` filled up with zeros to what the kernels take."""
    return -(-rank // WIDTH_STEP) * WIDTH_STEP


class AdapterOperands(NamedTuple):
    """What the products read of L [in, r] and R [r, out], in their dtype.

    Any matrix [rows, width] is a 2:4 matrix [rows, 2 width] whose groups of four keep positions 0 and 1: its column c
    then meets column c/2*4 + c%2 of the other operand. L^T and R / r stand in these rows of the first two, with zeros
    between, so X L and dY R^T / r come out where the 2:4 product reads them.

    Of layers of one input (kernels/joint.py) they are slices of joint operands, whose rows lie apart.
    """

    left_rows: Tensor
    """L^T, spread, [2 width, in]."""
    right_rows: Tensor
    """R / r, spread, [2 width, out]."""
    left_kept: Tensor
    """L, filled up with zeros, [in, width]."""
    right_kept: Tensor
    """(R / r)^T, filled up with zeros, [out, width]."""


class SparseProduct(torch.autograd.Function):
    """The products of one layer on 2:4 operands, with bias and, where there are some, adapters.

    Args of `forward`: x [..., in]; values, left and right for their gradients alone; bias fp32 [out] or None; the
        forward operand of W^R; the backward operand of W^{R,C}; mask_bits and m of the layer; `AdapterOperands`, four
        tensors or None each.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        kept: Tensor,
        metadata: Tensor,
        kept_backward: Tensor,
        metadata_backward: Tensor,
        mask_bits: Tensor,
        m: int,
        left_rows: Tensor | None,
        right_rows: Tensor | None,
        left_kept: Tensor | None,
        right_kept: Tensor | None,
    ):
        ctx.save_for_backward(x, kept_backward, metadata_backward, mask_bits, left_rows, right_rows, left_kept)
        ctx.m, ctx.rank = m, 0 if left is None else left.shape[1]
        x_left = None if left is None else x.reshape(-1, x.shape[-1]) @ left_rows.t()
        return sparse_mm(x, kept, metadata, bias, x_left, right_kept)  # (1) and (4) Y = X (W^R)^T + (X L) R / r

    @staticmethod
    def backward(ctx, grad_y):
        x, kept_backward, metadata_backward, mask_bits, left_rows, right_rows, left_kept = ctx.saved_tensors
        grad_x = grad_values = grad_bias = grad_left = grad_right = None
        needs_x, needs_values, needs_bias, *needs_adapters = ctx.needs_input_grad[:5]
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        if needs_x:
            narrow = None if left_rows is None else grad_rows @ right_rows.t()  # dY R^T / r
            grad_x = sparse_mm(grad_y, kept_backward, metadata_backward, None, narrow, left_kept)  # (3) dX = dY W^{R,C}
        if needs_values or any(needs_adapters):
            grad_weight = grad_rows.t() @ x.reshape(-1, x.shape[-1])
        if needs_values:
            grad_values = gather(grad_weight, mask_bits, ctx.m)  # (2) dW = mask * (dY^T X)
        if needs_bias:
            grad_bias = grad_rows.sum(0, dtype=torch.float32)
        if any(needs_adapters):
            grad_left, grad_right = adapter_grads(grad_weight, left_rows, right_rows, ctx.rank)
        return grad_x, grad_values, grad_bias, grad_left, grad_right, *[None] * 10
