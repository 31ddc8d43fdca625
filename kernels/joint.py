"""Products of linear layers whose biases something else adds; of layers of one input, such as query, key and value,
as one product: larger kernels, and one input gradient.

Nothing changes in the layers: parameters, gradients and checkpoints are theirs. Dense weights are put side by side in
each call, where they are rounded anyway. The 2:4 operands of sparse layers become slices of joint ones (`join`), which
the refresh writes as it does any others; so a layer alone can still run, as it does once it has adapters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import autotune, layout
from kernels.backends import CutlassOperands
from kernels.ops import gather, sparse_mm
from sparse_ops import SparseLinear


class JointOperands(nn.Module):
    """The operands of layers that read one input, as those of one layer with all their outputs.

    kernels/layout.py describes the arrays. Joined along the outputs, W^R grows by rows and W^{R,C} transposed by
    columns, and metadata have the columns' blocks outermost: all but the metadata of W^R, which never change, can be
    slices of joint arrays.
    """

    def __init__(self, layers: Sequence[SparseLinear]):
        super().__init__()
        self.parts = parts = [layer.operands for layer in layers]
        for name, dim in (("kept", 0), ("metadata", 1), ("kept_backward", 1), ("metadata_backward", 0), ("second", 0)):
            arrays = [getattr(part, name) for part in parts]
            joint = None if arrays[0] is None else torch.cat(arrays, dim)
            self.register_buffer(name, joint, persistent=False)
            first = 0
            for part, array in zip(parts, arrays, strict=True):
                if array is not None and name != "metadata":
                    setattr(part, name, joint.narrow(dim, first, array.shape[dim]))
                    first += array.shape[dim]
        for part in parts:
            part.joint = self

    def reset(self) -> None:
        """A layer's mask is another one, and so its metadata of W^R."""
        torch.cat([part.metadata for part in self.parts], 1, out=self.metadata)

    def forward(self, x: Tensor, layers: Sequence[SparseLinear]) -> Tensor:
        """Their outputs side by side, without biases, [..., all outputs]."""
        operands = (self.kept, self.metadata, self.kept_backward, self.metadata_backward)
        masks, values = [layer.mask_bits for layer in layers], [layer.values for layer in layers]
        return JointProduct.apply(x.to(self.kept.dtype), *operands, layers[0].m, *masks, *values)


class JointProduct(torch.autograd.Function):
    """As `kernels.ops.SparseProduct`, of several layers together.

    Args of `forward`: x [..., in]; the four joint operands; m; `mask_bits` of each layer, then `values` of each.
    """

    @staticmethod
    def forward(ctx, x, kept, metadata, kept_backward, metadata_backward, m, *masks_and_values):
        count = len(masks_and_values) // 2
        ctx.save_for_backward(x, kept_backward, metadata_backward, *masks_and_values[:count])
        ctx.m, ctx.sizes = m, [values.shape[0] for values in masks_and_values[count:]]
        return sparse_mm(x, kept, metadata, None, None, None)

    @staticmethod
    def backward(ctx, grad_y):
        x, kept_backward, metadata_backward, *masks = ctx.saved_tensors
        grad_x = sparse_mm(grad_y, kept_backward, metadata_backward, None, None, None)
        grad_weight = grad_y.reshape(-1, grad_y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        pieces = zip(grad_weight.split(ctx.sizes), masks, strict=True)
        return grad_x, *[None] * (5 + len(masks)), *(gather(piece, mask, ctx.m) for piece, mask in pieces)


def join(layers: Sequence[nn.Module], tokens: Sequence[int]) -> bool:
    """Let the products of these layers be one from now on, where their operands allow it; whether they do.

    Args:
        layers: of one input.
        tokens: rows of a product: what it is tuned for.
    """
    if not all(isinstance(layer, SparseLinear) and type(layer.operands) is CutlassOperands for layer in layers):
        return False
    first = layers[0]
    alike = {(layer.in_features, layer.m, layer.operands.dtype, layer.lora_left is None) for layer in layers}
    whole = all(layer.out_features % layout.ROW_PADDING == 0 for layer in layers)
    if alike != {(first.in_features, first.m, first.operands.dtype, True)} or not whole:
        return False
    kept = JointOperands(layers).kept
    sizes = len(kept), first.in_features
    for number in tokens:
        for rows, columns in (sizes, sizes[::-1]):
            autotune.tune(number, rows, columns, kept.dtype, kept.device)
    return True


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output [..., out] before its bias, and the bias, fp32 [out]."""
    return F.linear(x, layer.weight) if type(layer) is nn.Linear else layer.product(x, None), layer.bias


def products(x: Tensor, layers: Sequence[nn.Module]) -> tuple[list[Tensor], Tensor]:
    """The outputs of linear layers of one input, before their biases, and these, fp32 [all outputs].

    Returns:
        One tensor [..., all outputs], side by side, where the layers' products are one, as dense ones always are; else
        one [..., out] of each layer.
    """
    bias = torch.cat([layer.bias for layer in layers])
    if all(type(layer) is nn.Linear for layer in layers):
        return [F.linear(x, torch.cat([layer.weight for layer in layers]))], bias
    joint = getattr(getattr(layers[0], "operands", None), "joint", None)
    if joint is None or any(layer.operands.joint is not joint or layer.lora_left is not None for layer in layers):
        return [without_bias(layer, x)[0] for layer in layers], bias
    return [joint(x, layers)], bias
