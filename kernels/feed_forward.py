"""The two products of a feed-forward network on 2:4 operands with adapters, and GELU between them, as one function.

Adapters want X L of a product's input and dY R^T / r of its output's gradient. GELU's kernels, forward and back
(kernels/gelu_products.py), have the second product's X and the first one's dY in registers, so that nothing reads these
tensors, the widest of a block, once more for it. One function, as autograd hands gradients alone from node to node.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.backends import CutlassOperands
from kernels.ops import adapter_width, sparse_mm, weight_gradients
from sparse_ops import SparseLinear


class _Operands(NamedTuple):
    """What `CutlassOperands.arguments` gives of a layer."""

    kept: Tensor
    metadata: Tensor
    kept_backward: Tensor
    metadata_backward: Tensor
    mask_bits: Tensor
    m: int
    left_rows: Tensor
    right_rows: Tensor
    left_kept: Tensor
    right_kept: Tensor

    def read_backward(self) -> tuple[Tensor, ...]:
        operand = self.kept_backward, self.metadata_backward, self.mask_bits
        return *operand, self.left_rows, self.right_rows, self.left_kept


def _layer_backward(
    grad_y, narrow, x, m, rank, kept_backward, metadata_backward, mask_bits, left_rows, right_rows, left_kept
) -> tuple[Tensor, ...]:
    """Gradients of X, values, L and R; `narrow` is dY R^T / r."""
    grad_x = sparse_mm(grad_y, kept_backward, metadata_backward, None, narrow, left_kept)
    grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
    return grad_x, *weight_gradients(grad_rows, x, mask_bits, m, left_rows, right_rows, rank)


class _FeedForward(torch.autograd.Function):
    """Args of `forward`: x [..., in]; values, L and R of the first layer, its bias, fp32, values, L and R of the second
    one, all for their gradients alone, but the bias; `_Operands` of the first, and of the second.
    """

    @staticmethod
    def forward(ctx, x, first_values, first_left, first_right, bias, second_values, second_left, second_right, *both):
        half = len(_Operands._fields)
        first, second = _Operands(*both[:half]), _Operands(*both[half:])
        x_left = x.reshape(-1, x.shape[-1]) @ first.left_rows.t()
        inner = sparse_mm(x, first.kept, first.metadata, None, x_left, first.right_kept)
        activated, activated_left = torch.ops.slope.bias_gelu_narrow(inner, bias, second.left_rows)
        ctx.save_for_backward(x, inner, bias, activated, *first.read_backward(), *second.read_backward())
        ctx.first, ctx.second = (first.m, first_left.shape[1]), (second.m, second_left.shape[1])
        return sparse_mm(activated, second.kept, second.metadata, None, activated_left, second.right_kept)

    @staticmethod
    def backward(ctx, grad_y):
        x, inner, bias, activated, *both = ctx.saved_tensors
        first, second = both[: len(both) // 2], both[len(both) // 2 :]
        *_, first_right_rows, _ = first
        *_, second_right_rows, _ = second
        narrow = grad_y.reshape(-1, grad_y.shape[-1]) @ second_right_rows.t()
        grad_activated, *of_second = _layer_backward(grad_y, narrow, activated, *ctx.second, *second)
        grad_inner, narrow, grad_bias = torch.ops.slope.bias_gelu_narrow_backward(
            grad_activated, inner, bias, first_right_rows
        )
        grad_x, *of_first = _layer_backward(grad_inner, narrow, x, *ctx.first, *first)
        return grad_x, *of_first, grad_bias, *of_second, *[None] * (2 * len(_Operands._fields))


def _adapted(layer: nn.Module) -> bool:
    if not isinstance(layer, SparseLinear) or type(layer.operands) is not CutlassOperands or layer.lora_left is None:
        return False
    from kernels.gelu_products import WIDEST  # imports Triton, which CPU builds of torch lack

    return adapter_width(layer.lora_left.shape[1]) <= WIDEST and layer.bias is not None


def runs_together(first: nn.Module, second: nn.Module) -> bool:
    """Whether `feed_forward` takes these layers, of which the second reads GELU of the first."""
    return _adapted(first) and _adapted(second) and first.operands.dtype == second.operands.dtype


def feed_forward(x: Tensor, first: SparseLinear, second: SparseLinear) -> tuple[Tensor, Tensor]:
    """second(GELU(first(x))) [..., out] before its last bias, and this bias, fp32 [out].

    Args:
        first: with adapters on `CutlassOperands`, as `second`: where `runs_together`.
    """
    parameters = (first.values, first.lora_left, first.lora_right, first.bias)
    parameters = (*parameters, second.values, second.lora_left, second.lora_right)
    operands = (*first.operands.arguments(first), *second.operands.arguments(second))
    return _FeedForward.apply(x.to(first.operands.dtype), *parameters, *operands), second.bias
