"""Products of linear layers whose biases something else adds; of layers of one input, such as query, key and value,
as one product: larger kernels, and one input gradient.

Nothing changes in the layers: parameters, gradients and checkpoints are theirs. Dense weights, and the values of sparse
ones, are put side by side in each call, where they are rounded anyway. What sparse layers keep of 2:4 operands, and
those of their adapters, become slices of joint ones (`join`), which the refresh writes as it does any others; so a
layer alone can still run.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import autotune, layout
from kernels.backends import CutlassOperands
from kernels.ops import AdapterOperands, adapter_grads, adapter_width, gather, sparse_mm
from sparse_ops import SparseLinear

# Along which dimensions of a joint array each layer's slice begins where the one before ends.
PLACES = {"kept": (0,), "kept_backward": (1,), "metadata_backward": (0,), "second": (0,)}
ADAPTER_PLACES = {"left_rows": (0,), "right_rows": (0, 1), "left_kept": (1,), "right_kept": (0, 1)}


class JointOperands(nn.Module):
    """The operands of layers that read one input, as those of one layer with all their outputs.

    kernels/layout.py describes the arrays. Joined along the outputs, W^R grows by rows and W^{R,C} transposed by
    columns, and metadata have the columns' blocks outermost: all but the metadata of W^R, which never change, can be
    slices of joint arrays. Values that each product rounds (`kernels.backends.rounds_values`) are joined there.

    The layers' adapters, once all have some, are those of one layer, too: L side by side, so that X is read once for
    them, and R on a block diagonal, so that dY is.
    """

    # The zeros beside the blocks are multiplied, too. Three layers widen the forward product's reduction, 1024 columns
    # in BERT-Large, by 96 columns and not by 32 for rank 16, by 384 and not by 128 for rank 64: 6% and 22% more
    # arithmetic in this one product. By bytes and FLOPs this is less than what three products take for reading X twice
    # more and for the sum of three input gradients. The backward product has as many columns as three have together.

    def __init__(self, layers: Sequence[SparseLinear]):
        super().__init__()
        self.parts = [layer.operands for layer in layers]
        for name in (*PLACES, "metadata", *ADAPTER_PLACES):
            self.register_buffer(name, None, persistent=False)
        self.metadata = torch.cat([part.metadata for part in self.parts], 1)
        self._hold(PLACES)
        for part in self.parts:
            part.joint = self
        self.join_adapters()

    def _hold(self, places: Mapping[str, tuple[int, ...]]) -> None:
        """Let the parts' arrays of these names become slices of joint ones, with what they hold and zeros elsewhere."""
        for name, dims in places.items():
            arrays = [getattr(part, name) for part in self.parts]
            if arrays[0] is None:
                continue
            joint = torch.cat(arrays, *dims) if len(dims) == 1 else torch.block_diag(*arrays)
            setattr(self, name, joint)
            first = dict.fromkeys(dims, 0)
            for part, array in zip(self.parts, arrays, strict=True):
                piece = joint
                for dim in dims:
                    piece = piece.narrow(dim, first[dim], array.shape[dim])
                    first[dim] += array.shape[dim]
                setattr(part, name, piece)

    def join_adapters(self) -> None:
        """As soon as every part has adapters' operands, they are slices as well, and stay where they then are."""
        if all(part.left_rows is not None for part in self.parts):
            self._hold(ADAPTER_PLACES)

    def fits(self, layers: Sequence[SparseLinear]) -> bool:
        """Whether the joint arrays hold all that the layers read: they do not while only some have adapters."""
        return self.left_rows is not None or all(layer.lora_left is None for layer in layers)

    def storage_address(self) -> int:
        """Of the memory that the parts' `kept_backward` are slices of."""
        return self.kept_backward.untyped_storage().data_ptr()

    def reset(self) -> None:
        """A layer's mask is another one, and so its metadata of W^R."""
        torch.cat([part.metadata for part in self.parts], 1, out=self.metadata)

    def _forward_kept(self, layers: Sequence[SparseLinear]) -> Tensor:
        if self.kept is not None:
            return self.kept
        return _side_by_side([part.forward_kept(layer) for part, layer in zip(self.parts, layers, strict=True)])

    def forward(self, x: Tensor, layers: Sequence[SparseLinear]) -> Tensor:
        """Their outputs side by side, without biases, [..., all outputs]."""
        operands = (self._forward_kept(layers), self.metadata, self.kept_backward, self.metadata_backward)
        adapters = [getattr(self, name) for name in AdapterOperands._fields]
        names = ["mask_bits", "values"] + ([] if self.left_rows is None else ["lora_left", "lora_right"])
        of_each = [getattr(layer, name) for name in names for layer in layers]
        return JointProduct.apply(x.to(self.kept_backward.dtype), *operands, *adapters, layers[0].m, *of_each)


class JointProduct(torch.autograd.Function):
    """As `kernels.ops.SparseProduct`, of several layers together.

    Args of `forward`: x [..., in]; the four joint operands; the four joint ones of adapters or None each; m;
        `mask_bits` of each layer, then `values` of each, then, where there are adapters, `lora_left` of each and
        `lora_right` of each.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        kept: Tensor,
        metadata: Tensor,
        kept_backward: Tensor,
        metadata_backward: Tensor,
        left_rows: Tensor | None,
        right_rows: Tensor | None,
        left_kept: Tensor | None,
        right_kept: Tensor | None,
        m: int,
        *of_each: Tensor,
    ):
        count = len(of_each) // (2 if left_rows is None else 4)
        masks, values, lefts = of_each[:count], of_each[count : 2 * count], of_each[2 * count : 3 * count]
        ctx.save_for_backward(x, kept_backward, metadata_backward, left_rows, right_rows, left_kept, *masks)
        ctx.m, ctx.sizes, ctx.ranks = m, [each.shape[0] for each in values], [left.shape[1] for left in lefts]
        x_left = None if left_rows is None else x.reshape(-1, x.shape[-1]) @ left_rows.t()
        return sparse_mm(x, kept, metadata, None, x_left, right_kept)

    @staticmethod
    def backward(ctx, grad_y):
        x, kept_backward, metadata_backward, left_rows, right_rows, left_kept, *masks = ctx.saved_tensors
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        narrow = None if left_rows is None else grad_rows @ right_rows.t()
        grad_x = sparse_mm(grad_y, kept_backward, metadata_backward, None, narrow, left_kept)
        pieces = (grad_rows.t() @ x.reshape(-1, x.shape[-1])).split(ctx.sizes)
        grads = [gather(piece, mask, ctx.m) for piece, mask in zip(pieces, masks, strict=True)]
        if left_rows is not None:
            spread = [2 * adapter_width(rank) for rank in ctx.ranks]
            blocks = [rows.split(ctx.sizes, 1)[i] for i, rows in enumerate(right_rows.split(spread))]
            sides = zip(pieces, left_rows.split(spread), blocks, ctx.ranks, strict=True)
            lefts, rights = zip(*(adapter_grads(*side) for side in sides), strict=True)
            grads += [*lefts, *rights]
        return grad_x, *[None] * (9 + len(masks)), *grads


def join(layers: Sequence[nn.Module], tokens: Sequence[int]) -> bool:
    """Let the products of these layers be one from now on, where their operands allow it; whether they do.

    Args:
        layers: of one input.
        tokens: rows of a product: what it is tuned for.
    """
    if not all(isinstance(layer, SparseLinear) and type(layer.operands) is CutlassOperands for layer in layers):
        return False
    first = layers[0]
    alike = {
        (layer.in_features, layer.m, layer.operands.dtype, layer.operands.kept is None, layer.lora_left is None)
        for layer in layers
    }
    whole = all(layer.out_features % layout.ROW_PADDING == 0 for layer in layers)
    if len(alike) != 1 or not whole:
        return False
    JointOperands(layers)  # which the layers' operands remember
    sizes = sum(layer.out_features for layer in layers), first.in_features
    for number in tokens:
        for rows, columns in (sizes, sizes[::-1]):
            autotune.tune(number, rows, columns, first.operands.dtype, first.values.device)
    return True


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """One alone is not copied."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)


class _DenseProduct(torch.autograd.Function):
    """x [..., in] in 16 bits times fp32 weights [out, in], rounded, side by side.

    Autograd of a cast would round the weights' gradients to 16 bits, and convert them in a pass of its own. On a GPU
    they are what the product has added up in fp32.
    """

    @staticmethod
    def forward(ctx, x, *weights):
        weight = _side_by_side([each.to(x.dtype) for each in weights])
        ctx.save_for_backward(x, weight)
        ctx.sizes = [len(each) for each in weights]
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        rows, inputs = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad_y @ weight, *_weight_gradient(rows, inputs).split(ctx.sizes)


def _weight_gradient(grad_rows: Tensor, inputs: Tensor) -> Tensor:
    if grad_rows.is_cuda:
        return torch.mm(grad_rows.t(), inputs, out_dtype=torch.float32)
    return (grad_rows.t() @ inputs).float()  # torch has the other on a GPU alone


def _dense_product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """In autocast's dtype, where that is on."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype == torch.float32 or any(weight.dtype != torch.float32 for weight in weights):
        return F.linear(x, _side_by_side(weights))
    return _DenseProduct.apply(x, *weights)


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output [..., out] before its bias, and the bias, fp32 [out]."""
    return _dense_product(x, [layer.weight]) if type(layer) is nn.Linear else layer.product(x, None), layer.bias


def _joint_of(layer: nn.Module) -> JointOperands | None:
    return getattr(getattr(layer, "operands", None), "joint", None)


def products(x: Tensor, layers: Sequence[nn.Module]) -> tuple[list[Tensor], Tensor]:
    """The outputs of linear layers of one input, before their biases, and these, fp32 [all outputs].

    Returns:
        One tensor [..., all outputs], side by side, where the layers' products are one, as dense ones always are; else
        one [..., out] of each layer.
    """
    bias = torch.cat([layer.bias for layer in layers])
    if all(type(layer) is nn.Linear for layer in layers):
        return [_dense_product(x, [layer.weight for layer in layers])], bias
    joint = _joint_of(layers[0])
    if joint is None or any(_joint_of(layer) is not joint for layer in layers) or not joint.fits(layers):
        return [without_bias(layer, x)[0] for layer in layers], bias
    return [joint(x, layers)], bias
