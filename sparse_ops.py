"""SLoPe: N:M double-pruned sparse linear layers with lazy low-rank adapters.

Mozaffari et al., "SLoPe: Double-Pruned Sparse Plus Lazy Low-Rank Adapter Pretraining of LLMs", ICLR 2025,
arXiv 2405.16325.

One layer, the four lines of the paper (its double-pruned backward pass and its lazy low-rank adapters):

    (1) forward           Y  = X (W^R)^T             W^R: N of every M weights along the reduction dimension, fixed mask
    (2) weight gradient   dW = mask * (dY^T X)       a dense product, kept where W^R is kept
    (3) input gradient    dX = dY W^{R,C}            W^R pruned a second time, N of every M along its other dimension
    (4) lazy adapters     Y += (X L) R / r           L [in, r], R [r, out], for the last 1% of the steps

                 values [out, in*N/M]  (the trainable parameter)        L [in, r]   R [r, out]
                        |                                                    |         |
             expand     |     expand + second N:M choice                     |         |
          W^R [out, in] +-----------------> W^{R,C} [out, in]                |         |
                 |                               |                           |         |
      X ---------*------ (1) ----> Y <-----------|-------------- (4) --------*---------*---- X
      dX <-------------------(3)-----------------*---- dY

The parameter *is* the compressed values: gradients, optimizer moments, all-reduces and checkpoints are N/M of the dense
size with any optimizer, and a pruned weight cannot come back. W^R and W^{R,C} are *operands*, rebuilt from the values
once per optimizer step (`OperandRefresh`), after `load_state_dict`, and when adapters, device or dtype change (or, W^R
of kernels/backends.py, read from the values by each product).

Nothing in this file knows BERT: `sparsify` takes any model together with the list of its blocks.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.errors import UsageError
from training.sparsity import SparsityConfig, pattern_of_blocks

N = 2  # every pattern of the suite keeps 2 of M: 2:4, 2:8, 2:16, ...


# --------------------------------------------------------------------------------------------------------------- masks
def nm_mask(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """Keep the `n` highest of every `m` neighbours along `dim`; of equals the earlier one.

    Args:
        scores: any shape, size a multiple of `m` along `dim`.

    Returns:
        A bool mask of the same shape with exactly `n` True in each group. Deterministic on every device, which
        `topk` is not where scores tie.
    """
    # A plane for each place in the group, so that every comparison of two places reads memory in order.
    dim %= scores.dim()
    planes = scores.unflatten(dim, (-1, m)).movedim(dim + 1, 0).contiguous()
    rank = torch.zeros(planes.shape, dtype=torch.int16, device=scores.device)  # how many of the group go before each
    for late in range(1, m):
        late_first = planes[late] > planes[:late]
        rank[:late] += late_first
        rank[late] += late - late_first.sum(0, dtype=torch.int16)
    return (rank < n).movedim(0, dim + 1).flatten(dim, dim + 1)


def unstructured_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the int((1 - sparsity/100) * numel) highest scores of the whole matrix; of equals the earlier one."""
    kept = int((1 - sparsity / 100) * scores.numel())
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:kept]] = True
    return mask.view(scores.shape)


def double_prune_mask(weight: Tensor, mask: Tensor, n: int, m: int, dim: int) -> Tensor:
    """The positions of W^{R,C}: of those that W^R keeps, the `n` largest of every `m` along its other dimension.

    Args:
        weight: W^R, zero where `mask` is False.
        mask: positions that W^R keeps, also where their weight happens to be 0.

    Returns:
        A bool mask, a subset of `mask`, at most `n` True in each group of `m` along `dim`.
    """
    scores = torch.where(mask, weight.abs(), -1.0)  # a kept zero goes before a pruned one
    return nm_mask(scores, n, m, dim) & mask


def double_prune_extra_zeros(n: int, m: int) -> float:
    """Expected share of all positions that the second pruning empties of a random W^R (the paper's lemma).

    Sum over j > n kept ones in a group of m of C(m, j) s^j (1-s)^(m-j) (j-n)/m, with s = n/m.
    """
    density = n / m
    binomial = torch.distributions.Binomial(m, torch.tensor(density, dtype=torch.float64))
    kept = torch.arange(n + 1, m + 1, dtype=torch.float64)
    return float((binomial.log_prob(kept).exp() * (kept - n) / m).sum())


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask of any shape -> uint8 [ceil(numel / 8)], lowest bit first."""
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_bits`."""
    numel = torch.Size(shape).numel()
    unpacked = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return unpacked.flatten()[:numel].bool().view(tuple(shape))


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, module name) alone, so a draw is the same on every rank and device."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ------------------------------------------------------------------------------------------------------------ products
class SlopeProduct(torch.autograd.Function):
    """The three products of one layer on dense operands: the reference that every other backend is held against."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, w_forward: Tensor, w_backward: Tensor, index: Tensor, by_input: bool):
        ctx.save_for_backward(x, w_backward, index)
        ctx.by_input, ctx.values_like = by_input, (values.shape, values.dtype)
        return x @ w_forward.t()  # (1) Y = X (W^R)^T

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, w_backward, index = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ w_backward  # (3) dX = dY W^{R,C}
        if ctx.needs_input_grad[1]:
            x_tokens, grad_tokens = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad_y))
            left, right = (grad_tokens, x_tokens) if ctx.by_input else (x_tokens, grad_tokens)
            shape, dtype = ctx.values_like
            grad_weight = left.t() @ right  # (2) dW = mask * (dY^T X): gathering the kept positions is the mask
            grad_values = grad_weight.flatten()[index].view(shape).to(dtype)
        return grad_x, grad_values, None, None, None, None


class DenseOperands(nn.Module):
    """W^R and W^{R,C} as dense matrices with zeros: any device, any pattern, either reduction dimension.

    A backend is a class with this interface. All its tensors are non-persistent buffers in fixed storage, since
    captured CUDA graphs keep their addresses. kernels/backends.py has those for sparse tensor cores.
    """

    def __init__(self, layer: "SparseLinear", dtype: torch.dtype | None = None):
        super().__init__()
        dtype, device = dtype or layer.values.dtype, layer.values.device
        for name in ("w_forward", "w_backward"):
            stored = torch.zeros(layer.stored_shape, dtype=dtype, device=device)
            self.register_buffer(name, stored, persistent=False)
        self.register_buffer("index", None, persistent=False)
        self.register_buffer("second", None, persistent=False)
        self.reset(layer)

    @property
    def dtype(self) -> torch.dtype:
        return self.w_forward.dtype

    def reset(self, layer: "SparseLinear") -> None:
        """The mask is another one; `refresh` with `rechoose` follows."""
        index = layer.stored_mask().flatten().nonzero().flatten()  # row-major places of the values, int64
        self.index = index if self.index is None else self.index.copy_(index)
        self.w_forward.zero_()
        self.w_backward.zero_()

    def refresh(self, layer: "SparseLinear", rechoose: bool) -> None:
        """Rebuild in place what the products read; with `rechoose`, choose W^{R,C} anew from the values' magnitudes."""
        self.refresh_all([layer], rechoose)

    @staticmethod
    def refresh_all(layers: Sequence["SparseLinear"], rechoose: bool) -> None:
        """`refresh` of many layers whose operands are of this class."""
        if rechoose:
            for alike in _alike([layer for layer in layers if layer.double_pruned]):
                _choose_second(alike)
        for layer in layers:
            layer.operands._rebuild(layer.values.detach())

    def _rebuild(self, values: Tensor) -> None:
        self.w_forward.view(-1)[self.index] = values.flatten().to(self.dtype)
        twice = values if self.second is None else torch.where(self.second, values, 0.0)
        self.w_backward.view(-1)[self.index] = twice.flatten().to(self.dtype)

    def second_kept(self, layer: "SparseLinear") -> Tensor | None:
        """The values that W^{R,C} keeps, bool in the shape of the values; None where there is no second pruning."""
        return self.second

    def set_second_kept(self, layer: "SparseLinear", kept: Tensor) -> None:
        """An earlier choice of W^{R,C}; `refresh` without `rechoose` follows."""
        self.second = kept.clone() if self.second is None else self.second.copy_(kept)

    def forward(self, x: Tensor, layer: "SparseLinear", bias: Tensor | None) -> Tensor:
        """X [..., in] -> Y [..., out] in the operands' dtype, with the layer's adapters."""
        x = x.to(self.dtype)
        w_forward, w_backward = self.w_forward, self.w_backward
        if not layer.by_input:
            w_forward, w_backward = w_forward.t(), w_backward.t()
        y = SlopeProduct.apply(x, layer.values, w_forward, w_backward, self.index, layer.by_input)
        return layer.finish(y, x, bias)


CHOSEN_TOGETHER = 2**24
"""Weights of the layers that W^{R,C} is chosen of at a time on a GPU: some 20 bytes each are needed for it."""


def _alike(layers: Iterable["SparseLinear"]) -> Iterator[list["SparseLinear"]]:
    """Groups of layers of one shape and pattern: on a GPU, where starting each step costs time, of several layers."""
    groups: dict[tuple, list[SparseLinear]] = {}
    for layer in layers:
        groups.setdefault((layer.stored_shape, layer.m, layer.values.dtype, layer.values.device), []).append(layer)
    for (shape, *_, device), alike in groups.items():
        count = max(1, CHOSEN_TOGETHER // math.prod(shape)) if device.type == "cuda" else 1
        for first in range(0, len(alike), count):
            yield alike[first : first + count]


def _choose_second(layers: Sequence["SparseLinear"]) -> None:
    """Choose W^{R,C} anew, together: dozens of small steps for all, as many as they would be for each."""
    values = torch.stack([layer.values.detach().flatten() for layer in layers])  # [layers, values of each]
    index = torch.stack([layer.operands.index for layer in layers])
    shape = (len(layers), *layers[0].stored_shape)
    weight = values.new_zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool, device=weight.device)
    weight.flatten(1).scatter_(1, index, values)
    mask.flatten(1).scatter_(1, index, True)
    seconds = double_prune_mask(weight, mask, N, layers[0].m, dim=1).flatten(1).gather(1, index)
    for layer, second in zip(layers, seconds, strict=True):
        layer.operands.set_second_kept(layer, second.view(layer.values.shape))


# -------------------------------------------------------------------------------------------------------------- layers
class AdaptedLinear(nn.Module):
    """What every pruned linear layer shares: its sizes and its optional low-rank adapters."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("lora_left", None)
        self.register_parameter("lora_right", None)

    def add_adapters(self, rank: int, generator: torch.Generator) -> None:
        """L ~ N(0, 1) and R = 0, so that the output does not change at the step at which they join."""
        left = torch.randn(self.in_features, rank, generator=generator)
        like = self.bias if self.bias is not None else next(self.parameters())
        self.lora_left = nn.Parameter(left.to(device=like.device, dtype=like.dtype))
        self.lora_right = nn.Parameter(torch.zeros(rank, self.out_features, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] -> Y [..., out], in the products' dtype."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or without one, where something else adds it."""
        raise NotImplementedError

    def finish(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Bias and adapters onto the product `y` [..., out] of the input `x` [..., in] in the same dtype."""
        if self.lora_left is not None:
            low_rank = (x @ self.lora_left.to(x.dtype)) @ self.lora_right.to(x.dtype)
            y = y + low_rank / self.lora_left.shape[1]  # (4) Y += (X L) R / r
        return y if bias is None else y + bias.to(y.dtype)

    def adapter_weight(self) -> Tensor | float:
        """The adapters as one matrix [out, in], to be added to the weight; 0 without adapters."""
        if self.lora_left is None:
            return 0.0
        return (self.lora_left @ self.lora_right).t() / self.lora_left.shape[1]

    def extra_repr(self) -> str:
        rank = 0 if self.lora_left is None else self.lora_left.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, lora_rank={rank}"


class SparseLinear(AdaptedLinear):
    """A linear layer whose trainable parameter is the kept weights of a fixed mask.

    Attributes:
        values: [out, in*N/M] for N:M along the input, N a group in position order; [in, out*N/M] on the transpose for
            N:M along the output; [nnz] in row-major order for an unstructured mask.
        bias: [out] or None.
        mask_bits: the kept positions, one bit a dense weight, row-major over the stored matrix; a persistent buffer.

    Args:
        linear: the dense layer to prune.
        mask: bool [out, in], the weights to keep.
        m: group size of the N:M pattern; None for an unstructured mask, which is not pruned a second time.
        reduction_dim: True when the groups of `mask` run along the input dimension.
        double_prune: False when the input gradient is to read W^R itself.
        with_operands: False where `set_operands` follows before anything is computed: dense ones take more time and
            memory than all the rest of the layer.
    """

    def __init__(
        self,
        linear: nn.Linear,
        mask: Tensor,
        m: int | None,
        reduction_dim: bool = True,
        double_prune: bool = True,
        with_operands: bool = True,
    ):
        super().__init__(linear.in_features, linear.out_features)
        self.m, self.by_input, self.double_pruned = m, reduction_dim or m is None, double_prune and m is not None
        weight, mask = linear.weight.detach(), mask.to(linear.weight.device)
        stored, stored_mask = (weight, mask) if self.by_input else (weight.t(), mask.t())
        self.stored_shape = tuple(stored.shape)
        self.values = nn.Parameter(stored[stored_mask].view(self._values_shape(stored_mask)).clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.register_buffer("mask_bits", pack_bits(stored_mask))
        self.register_load_state_dict_post_hook(SparseLinear._after_load)
        self.register_module("operands", None)
        if with_operands:
            self.set_operands(DenseOperands(self))

    def _values_shape(self, stored_mask: Tensor) -> tuple[int, ...]:
        rows, columns = self.stored_shape
        return (int(stored_mask.sum()),) if self.m is None else (rows, columns * N // self.m)

    def stored_mask(self) -> Tensor:
        """The kept positions of the stored matrix: [out, in], or its transpose for N:M along the output."""
        return unpack_bits(self.mask_bits, self.stored_shape)

    def mask(self) -> Tensor:
        """The kept positions, bool [out, in]."""
        return self.stored_mask() if self.by_input else self.stored_mask().t()

    def expand(self, values: Tensor) -> Tensor:
        """Values in their places of the stored matrix, zeros elsewhere."""
        stored = torch.zeros(self.stored_shape, dtype=values.dtype, device=values.device)
        return stored.masked_scatter_(self.stored_mask(), values)

    @property
    def second_kept(self) -> Tensor | None:
        """The values that W^{R,C} keeps, bool in the shape of the values; None where there is no second pruning."""
        return self.operands.second_kept(self)

    def dense_weight(self, double_pruned: bool = False) -> Tensor:
        """W^R, or W^{R,C}, as a dense matrix [out, in]."""
        values, kept = self.values.detach(), self.second_kept if double_pruned else None
        stored = self.expand(values if kept is None else torch.where(kept, values, 0.0))
        return stored if self.by_input else stored.t()

    def set_operands(self, operands: nn.Module) -> None:
        """Let another backend run the products; W^{R,C} is chosen anew."""
        self.operands = operands
        self.refresh(rechoose=True)

    @torch.no_grad()
    def refresh(self, rechoose: bool) -> None:
        """Rebuild the operands from the values; with `rechoose`, choose W^{R,C} anew from their magnitudes."""
        if self.operands is not None:
            self.operands.refresh(self, rechoose)

    @torch.no_grad()
    def set_second_kept(self, kept: Tensor) -> None:
        """Go on with an earlier choice of W^{R,C}, bool in the shape of the values."""
        self.operands.set_second_kept(self, kept)
        self.refresh(rechoose=False)

    @staticmethod
    def _after_load(layer: "SparseLinear", incompatible_keys) -> None:
        kept = int(layer.stored_mask().sum())
        if kept != layer.values.numel():
            raise UsageError(f"the checkpoint's mask keeps {kept} weights of a layer that holds {layer.values.numel()}")
        if layer.operands is not None:
            layer.operands.reset(layer)
        layer.refresh(rechoose=True)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.operands(x, self, bias)

    def add_adapters(self, rank: int, generator: torch.Generator) -> None:
        super().add_adapters(rank, generator)
        self.refresh(rechoose=False)

    def _apply(self, fn, recurse: bool = True) -> "SparseLinear":
        super()._apply(fn, recurse)  # .to(), .half(), .cuda(), ...: operands of a narrower dtype cannot be widened
        self.refresh(rechoose=False)
        return self

    def set_operand_dtype(self, dtype: torch.dtype) -> None:
        """Let the products run in `dtype`; the values stay as they are."""
        self.operands.to(dtype)
        self.refresh(rechoose=False)

    def extra_repr(self) -> str:
        pattern = "unstructured" if self.m is None else f"{N}:{self.m} along {'in' if self.by_input else 'out'}"
        return f"{super().extra_repr()}, {pattern}"


# -------------------------------------------------------------------------------------------------------- whole models
def sparsify(
    model: nn.Module,
    config: SparsityConfig,
    blocks: Sequence[tuple[str, nn.Module]],
    keep_dense: Collection[str] = (),
    seed: int = 0,
    mask_init: str = "magnitude",
    with_operands: bool = True,
) -> list[str]:
    """Replace the linear layers inside the blocks of `model` by pruned ones, in place.

    Args:
        blocks: (name, module) of each transformer block, first to last; linear layers outside them stay dense.
        keep_dense: full names of linear layers that stay dense, such as those that read the embeddings.
        mask_init: `magnitude` keeps the largest weights, `random` draws from (seed, module name).
        with_operands: see `SparseLinear`.

    Returns:
        The full names of the replaced layers.

    Raises:
        UsageError: when M does not divide both dimensions of a layer, `sparsity_increment` does not fit the model, or
            nothing is left to prune.
    """
    if not config.sparse:
        return []
    patterns = pattern_of_blocks(config.sparsity_increment, len(blocks))
    last = len(blocks) - 1
    replaced = []
    for position, (block_name, block) in enumerate(blocks):
        if (config.skip_first_block and position == 0) or (config.skip_last_block and position == last):
            continue
        for parent, child_name, full_name in list(_linear_layers(block, block_name)):
            if full_name in keep_dense or (config.skip_attention and "attention" in full_name.split(".")):
                continue
            linear, m = getattr(parent, child_name), patterns[position]
            layer = _pruned_layer(linear, full_name, config, m, seed, mask_init, with_operands)
            setattr(parent, child_name, layer)
            replaced.append(full_name)
    if not replaced:
        raise UsageError(
            f"--pruned_matrix {config.pruned_matrix}: no layer of the model's {len(blocks)} blocks is left to prune; "
            "leave out some of --skip_first_block, --skip_last_block and --skip_attention"
        )
    return replaced


def _linear_layers(block: nn.Module, block_name: str) -> Iterator[tuple[nn.Module, str, str]]:
    for module_name, module in block.named_modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.Linear):
                yield module, child_name, ".".join(part for part in (block_name, module_name, child_name) if part)


def _pruned_layer(
    linear: nn.Linear, name: str, config: SparsityConfig, m: int, seed: int, mask_init: str, with_operands: bool
) -> nn.Module:
    generator = seeded_generator(seed, f"mask/{name}")
    if not config.unstructured_masking and (linear.in_features % m or linear.out_features % m):
        raise UsageError(
            f"--pruned_matrix {config.pruned_matrix}: {name} is {linear.out_features} x {linear.in_features}, but "
            f"{N}:{m} needs multiples of {m}; change the model's sizes or --sparsity_increment"
        )
    if config.pruned_matrix != "static-weight":
        from ablations import AblationLinear  # here, since that file builds on this one

        return AblationLinear(linear, config.pruned_matrix, m, config.reduction_dim, generator)
    weight = linear.weight.detach()
    scores = weight.abs() if mask_init == "magnitude" else torch.rand(weight.shape, generator=generator)
    if config.unstructured_masking:
        mask = unstructured_mask(scores, config.unstructured_mask_sparsity)
        return SparseLinear(linear, mask, m=None, with_operands=with_operands)
    mask = nm_mask(scores, N, m, dim=1 if config.reduction_dim else 0)
    return SparseLinear(linear, mask, m, config.reduction_dim, config.double_prune, with_operands)


def add_adapters(model: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Add adapters of `rank` to every pruned layer and return them; no output changes, since R starts at 0."""
    new = []
    for name, layer in named_layers(model, AdaptedLinear):
        layer.add_adapters(rank, seeded_generator(seed, f"adapter/{name}"))
        new += [layer.lora_left, layer.lora_right]
    return new


def check_adapter_rank(model: nn.Module, rank: int) -> None:
    """Whether adapters of `rank` would be of a lower rank than each layer that they are to join.

    Raises:
        UsageError: naming the layer that is too small.
    """
    for name, layer in named_layers(model, AdaptedLinear):
        smaller = min(layer.in_features, layer.out_features)
        if rank >= smaller:
            raise UsageError(
                f"--lora_rank {rank}: must be below {smaller}, the smaller side of {name} "
                f"({layer.out_features} x {layer.in_features})"
            )


def named_layers(model: nn.Module, kind: type = SparseLinear) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the dense model that computes the same outputs: W^R with zeros, adapters merged.

    Raises:
        UsageError: when layers prune their inputs, which no dense model does.
    """
    layers = dict(named_layers(model, AdaptedLinear))
    state = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            state[name] = tensor
    for name, layer in layers.items():
        state[f"{name}.weight"] = (layer.dense_weight() + layer.adapter_weight()).detach().contiguous()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state


@dataclass(frozen=True)
class SparsityReport:
    """Counted, not computed from the pattern."""

    layers: int
    dense_weights: int
    """Positions of all pruned matrices together."""
    forward_density: float
    """Share of them that W^R keeps."""
    backward_density: float
    """Share of them that W^{R,C} keeps."""


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Count the kept positions of every `SparseLinear`."""
    layers = [layer for _, layer in named_layers(model)]
    total = sum(layer.in_features * layer.out_features for layer in layers)
    kept = sum(layer.values.numel() for layer in layers)
    twice = sum(int(layer.second_kept.sum()) if layer.double_pruned else layer.values.numel() for layer in layers)
    return SparsityReport(len(layers), total, kept / max(total, 1), twice / max(total, 1))


class OperandRefresh:
    """Rebuilds every layer's operands after each optimizer step, and re-chooses W^{R,C} every `interval` steps.

    Args:
        interval: optimizer steps between two choices of W^{R,C}; 1 re-chooses at every step, 0 never.
    """

    def __init__(self, model: nn.Module, interval: int = 1):
        self.model, self.interval, self.steps = model, interval, 0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        rechoose = self.interval > 0 and self.steps % self.interval == 0
        kinds: dict[type, list[SparseLinear]] = {}
        for _, layer in named_layers(self.model):
            kinds.setdefault(type(layer.operands), []).append(layer)
        for kind, layers in kinds.items():
            kind.refresh_all(layers, rechoose)

    def state_dict(self) -> dict:
        """Step count, and the present choice of W^{R,C} where the next steps would not make it anew."""
        masks = {}
        if self.interval != 1:
            masks = {name: pack_bits(x.second_kept) for name, x in named_layers(self.model) if x.double_pruned}
        return {"steps": self.steps, "second_masks": masks}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, layer in named_layers(self.model):
            if name in state["second_masks"]:
                bits = state["second_masks"][name].to(layer.mask_bits.device)
                layer.set_second_kept(unpack_bits(bits, layer.values.shape))
