"""Backends of `SparseLinear` on sparse tensor cores, and which layer runs on which.

cutlass      our 2:4 GEMM (sparse_gemm.cuh): Hopper; 2:4, 2:8, 2:16, ... along the input, bf16 or fp16
cusparselt   PyTorch's cuSPARSELt products: compute capability 8.0 and up; 2:4 along the input, bf16 or fp16
dense        sparse_ops.DenseOperands: everything else
auto         cutlass where it is measured to be faster than dense, dense otherwise: by a training step of the layer, or,
             of a frozen one, by the forward product
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import autotune, layout
from kernels.build import LIBRARIES, KernelsUnavailable
from kernels.native import call_operands, loaded, refresh_adapters, refresh_operands
from kernels.ops import AdapterOperands, SparseProduct, adapter_width
from sparse_ops import DenseOperands, N, SparseLinear, named_layers, pack_bits, unpack_bits
from training.errors import UsageError

NO_ADAPTERS = (None,) * len(AdapterOperands._fields)


def rounds_values(layer: SparseLinear) -> bool:
    """Whether each forward product rounds the values that it reads, so that no copy of them has to be kept.

    A layer that is frozen before it gets its operands keeps a rounded copy, as dense models for inference do, and so do
    longer groups than 4, whose W^R has zeros between its values.
    """
    return layer.m == 4 and layer.values.requires_grad


class CutlassOperands(nn.Module):
    """W^R and W^{R,C} as 2:4 operands of our GEMM: half the bytes of dense ones; one kernel rebuilds what is kept.

    Interface: `sparse_ops.DenseOperands`. kernels/layout.py describes the arrays. Index data of a 2:4 layer: mask_bits
    and two metadata, 0.375 byte a dense weight; 0.5 for longer groups. W^R of a 2:4 layer that trains has no `kept`
    (`rounds_values`): its values, in their order, are rounded in each product.
    """

    def __init__(self, layer: SparseLinear, dtype: torch.dtype):
        super().__init__()
        out, columns, device = layer.out_features, layer.in_features, layer.values.device
        forward, backward = layout.metadata_shape(out, columns), layout.metadata_shape(columns, out)
        for name, shape, kind in (
            ("kept", None if rounds_values(layer) else (out, columns // 2), dtype),
            ("metadata", forward, torch.int32),
            ("kept_backward", (columns, out // 2), dtype),
            ("metadata_backward", backward, torch.int32),
            ("second", backward if layer.m > 4 else None, torch.int32),
            *((name, None, dtype) for name in AdapterOperands._fields),
        ):
            empty = None if shape is None else torch.zeros(shape, dtype=kind, device=device)
            self.register_buffer(name, empty, persistent=False)
        self.joint: nn.Module | None = None  # kernels.joint.JointOperands, whose slices these then are
        self.reset(layer)

    @property
    def dtype(self) -> torch.dtype:
        return self.kept_backward.dtype

    def forward_kept(self, layer: SparseLinear) -> Tensor:
        """`kept` of W^R, [out, in/2]."""
        return layer.values.detach().to(self.dtype) if self.kept is None else self.kept

    def reset(self, layer: SparseLinear) -> None:
        call_operands("forward_metadata", layer.mask_bits, self.metadata, *self._sizes(layer))
        if self.joint is not None:
            self.joint.reset()

    def refresh(self, layer: SparseLinear, rechoose: bool) -> None:
        self._check_joint()  # here, where a move ends, and not in each step
        self.refresh_all([layer], rechoose)

    @staticmethod
    def refresh_all(layers: Sequence[SparseLinear], rechoose: bool) -> None:
        """A launch or a few for many layers, whose operands are of this class."""
        by_dtype: dict[torch.dtype, list[SparseLinear]] = {}
        for layer in layers:
            if any(p.dtype is not torch.float32 for p in (layer.values, layer.lora_left) if p is not None):
                raise RuntimeError(f"the values of 2:4 operands must be float32, not {layer.values.dtype}")
            by_dtype.setdefault(layer.operands.dtype, []).append(layer)
        for dtype, same in by_dtype.items():
            if dtype not in (torch.bfloat16, torch.float16):
                raise RuntimeError(f"2:4 operands must be bfloat16 or float16, not {dtype}")
            refresh_operands([layer.operands._entry(layer) for layer in same], dtype, rechoose)
            adapted = [layer for layer in same if layer.lora_left is not None]
            for layer in adapted:  # before any entry: the arrays of the last to have some may move the others'
                layer.operands._make_adapters(layer)
            if adapted:
                refresh_adapters([layer.operands._adapter_entry(layer) for layer in adapted], dtype)

    def _check_joint(self) -> None:
        """Joint operands would not see what is written elsewhere."""
        if self.joint is not None and self.kept_backward.untyped_storage().data_ptr() != self.joint.storage_address():
            raise RuntimeError("joint 2:4 operands were moved or converted: do that before their layers are joined")

    def _entry(self, layer: SparseLinear) -> tuple:
        operands = (self.kept, self.metadata_backward, self.second, self.kept_backward)
        return layer.values, layer.mask_bits, *operands, *self._sizes(layer)

    def _make_adapters(self, layer: SparseLinear) -> None:
        if self.left_rows is not None:
            return
        width = adapter_width(layer.lora_left.shape[1])
        for side, size in (("left", layer.in_features), ("right", layer.out_features)):
            for name, shape in ((f"{side}_rows", (2 * width, size)), (f"{side}_kept", (size, width))):
                setattr(self, name, torch.empty(shape, dtype=self.dtype, device=layer.values.device))
        if self.joint is not None:
            self.joint.join_adapters()

    def _adapter_entry(self, layer: SparseLinear) -> tuple[Tensor, ...]:
        return layer.lora_left, layer.lora_right, *self._adapters()

    def _adapters(self) -> AdapterOperands:
        return AdapterOperands(*(getattr(self, name) for name in AdapterOperands._fields))

    def second_kept(self, layer: SparseLinear) -> Tensor:
        bits = torch.empty(layer.values.numel() // 8, dtype=torch.uint8, device=layer.values.device)
        call_operands("second_bits", *self._second(layer), bits, *self._sizes(layer))
        return unpack_bits(bits, layer.values.shape)

    def set_second_kept(self, layer: SparseLinear, kept: Tensor) -> None:
        bits = pack_bits(kept.to(layer.values.device))
        call_operands("set_second", bits, layer.mask_bits, self.metadata_backward, self.second, *self._sizes(layer))

    def _second(self, layer: SparseLinear) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.metadata_backward, self.second, layer.mask_bits

    @staticmethod
    def _sizes(layer: SparseLinear) -> tuple[int, int, int]:
        return layer.out_features, layer.in_features, layer.m

    def forward(self, x: Tensor, layer: SparseLinear, bias: Tensor | None) -> Tensor:
        x = x.to(self.dtype)
        parameters = (layer.values, bias, layer.lora_left, layer.lora_right)
        backward = (self.kept_backward, self.metadata_backward)
        operands = (self.forward_kept(layer), self.metadata, *backward, layer.mask_bits, layer.m)
        adapters = NO_ADAPTERS if layer.lora_left is None else self._adapters()
        return SparseProduct.apply(x, *parameters, *operands, *adapters)


class SemiStructuredOperands(DenseOperands):
    """The forward and input-gradient products by PyTorch's cuSPARSELt calls, on top of the dense operands.

    Kept since users know it. Each call rebuilds its plan on the host (0.35 ms), so it needs CUDA graphs to be usable.
    """

    def __init__(self, layer: SparseLinear, dtype: torch.dtype):
        super().__init__(layer, dtype)
        self.register_buffer("compressed", None, persistent=False)
        self.register_buffer("compressed_backward", None, persistent=False)

    def refresh(self, layer: SparseLinear, rechoose: bool) -> None:
        super().refresh(layer, rechoose)
        for name, dense in (("compressed", self.w_forward), ("compressed_backward", self.w_backward.t().contiguous())):
            packed = torch._cslt_compress(dense)
            setattr(self, name, packed if getattr(self, name) is None else getattr(self, name).copy_(packed))

    def forward(self, x: Tensor, layer: SparseLinear, bias: Tensor | None) -> Tensor:
        x = x.to(self.dtype)
        y = _CusparseltProduct.apply(x, layer.values, self.compressed, self.compressed_backward, self.index)
        return layer.finish(y, x, bias)


class _CusparseltProduct(torch.autograd.Function):
    """As `sparse_ops.SlopeProduct`, N:M along the input."""

    @staticmethod
    def forward(ctx, x, values, compressed, compressed_backward, index):
        ctx.save_for_backward(x, compressed_backward, index)
        ctx.values_like = (values.shape, values.dtype)
        return _cslt_product(x, compressed)

    @staticmethod
    def backward(ctx, grad_y):
        x, compressed_backward, index = ctx.saved_tensors
        grad_x = _cslt_product(grad_y, compressed_backward) if ctx.needs_input_grad[0] else None
        grad_values = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.values_like
            grad_weight = grad_y.reshape(-1, grad_y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            grad_values = grad_weight.flatten()[index].view(shape).to(dtype)
        return grad_x, grad_values, None, None, None


def _cslt_product(x: Tensor, compressed: Tensor) -> Tensor:
    """X W^T as (W X^T)^T. cuSPARSELt wants multiples of 8 tokens."""
    rows = x.reshape(-1, x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % 8))
    y = torch._cslt_sparse_mm(compressed, padded.t()).t()[: rows.shape[0]]
    return y.reshape(*x.shape[:-1], y.shape[-1])


# -------------------------------------------------------------------------------------------------------------- choice
def refusal(backend: str, layer: SparseLinear, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run a layer, in a few words; None when it can."""
    capability = torch.cuda.get_device_capability(layer.values.device) if layer.values.is_cuda else None
    needed = {"cutlass": (9, 0), "cusparselt": (8, 0)}[backend]
    if capability is None:
        return "no CUDA device"
    if capability < needed or (backend == "cutlass" and capability[0] != 9):
        needs = "9.x" if backend == "cutlass" else "8.0 or higher"
        return f"compute capability {capability[0]}.{capability[1]}, not {needs}"
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    if dtype not in (torch.bfloat16, torch.float16):
        return "--precision fp32"
    if layer.m is None:
        return "an unstructured mask"
    if not layer.double_pruned:
        return "--double_prune False"
    if not layer.by_input:
        return "--reduction_dim False"
    if backend == "cusparselt" and layer.m != 4:
        return f"{N}:{layer.m}"
    multiple = 16 if backend == "cutlass" else 32
    if layer.in_features % multiple or layer.out_features % multiple:
        return f"sizes that are no multiples of {multiple}"
    return None


def select_backends(
    model: nn.Module,
    backend: str,
    dtype: torch.dtype,
    tokens: int,
    report: Callable[[str], None],
    other_tokens: Sequence[int] = (),
) -> None:
    """Give every `SparseLinear` of `model`, which is on its device, the operands that run it from now on.

    Args:
        backend: one of `training.sparsity.SPARSE_BACKENDS`.
        tokens: rows of a product, those of a micro-batch: what the kernels are tuned for, and `auto` decides by.
        report: takes a line about each kind of layer.
        other_tokens: what they are tuned for too, where micro-batches or layers differ; any other number of rows takes
            the tile of the nearest one.

    Raises:
        UsageError: when `backend` is asked for by name and cannot run a layer.
    """
    kinds: dict[tuple, list[tuple[str, SparseLinear]]] = {}
    for name, layer in named_layers(model):
        kinds.setdefault((layer.out_features, layer.in_features, layer.m, layer.by_input), []).append((name, layer))
    if backend in ("cutlass", "cusparselt") and not kinds:
        raise UsageError(
            f"--sparse_backend {backend}: no layer of this model is pruned by --pruned_matrix static-weight"
        )
    for layers in kinds.values():
        name, first = layers[0]
        make, remark = _choose(backend, name, first, dtype, [tokens, *other_tokens])
        for _, layer in layers:
            if make is DenseOperands and type(layer.operands) is DenseOperands:
                layer.set_operand_dtype(dtype)
            else:
                layer.set_operands(make(layer, dtype))
        pattern = "unstructured" if first.m is None else f"{N}:{first.m}"
        report(f"{len(layers)} sparse layers {first.in_features} -> {first.out_features}, {pattern}: {remark}")


def _choose(backend: str, name: str, layer: SparseLinear, dtype: torch.dtype, tokens: Sequence[int]):
    """The class of a layer's operands, and what the log says of it."""
    if backend == "dense":
        return DenseOperands, "dense products"
    wanted = "cutlass" if backend == "auto" else backend
    reason = refusal(wanted, layer, dtype)
    try:
        if reason is None and wanted == "cutlass":
            for library in LIBRARIES:  # all of them now: adapters may join in the middle of a run
                loaded(library)
            ratios = [_product_ratios(layer, dtype, number) for number in tokens][0]
    except KernelsUnavailable as error:
        reason = str(error)
    if reason is not None:
        if backend != "auto":
            raise UsageError(f"--sparse_backend {backend} cannot run {name}: {reason}")
        return DenseOperands, f"dense products ({reason})"
    if wanted == "cusparselt":
        return SemiStructuredOperands, "cuSPARSELt"
    measured, faster = f"x{ratios[0]:.2f} forward, x{ratios[1]:.2f} input gradient", ratios[0] > 1
    if backend == "auto" and layer.values.requires_grad:
        step = _step_ratio(layer, dtype, tokens[0])
        measured, faster = f"{measured}, x{step:.2f} a step of the layer", step > 1
    measured = f"{measured}, against dense at {tokens[0]} tokens"
    if backend == "auto" and not faster:
        return DenseOperands, f"dense products (cutlass {measured})"
    return CutlassOperands, f"cutlass ({measured})"


def _product_ratios(layer: SparseLinear, dtype: torch.dtype, tokens: int) -> list[float]:
    """Speed of the forward and of the input-gradient product against dense ones, all of rounded weights."""
    sizes = (layer.out_features, layer.in_features)
    device = layer.values.device
    return [autotune.tune(tokens, rows, columns, dtype, device).ratio for rows, columns in (sizes, sizes[::-1])]


def _step_ratio(layer: SparseLinear, dtype: torch.dtype, tokens: int) -> float:
    """Speed of a layer's part in a training step against the same on dense operands.

    The products alone would not tell: operands are rebuilt and gradients gathered, too, by other kernels on either.
    """
    rank = 0 if layer.lora_left is None else layer.lora_left.shape[1]
    sizes = f"{tokens}x{layer.out_features}x{layer.in_features} {N}:{layer.m} rank {rank}"

    def measure() -> dict[str, float]:
        steps = (_training_step(layer, kind(layer, dtype), tokens) for kind in (DenseOperands, CutlassOperands))
        return {"ratio": autotune.compared(*steps)}

    name = f"step {sizes} {autotune.name_of(dtype)}"
    return autotune.measured_once(name, layer.values.device, ["ratio"], measure)["ratio"]


def _training_step(layer: SparseLinear, operands: nn.Module, tokens: int) -> Callable[[], None]:
    """Operands from the values, W^{R,C} chosen anew, and both passes of one micro-step."""
    device = layer.values.device
    like = {"dtype": operands.dtype, "device": device, "generator": torch.Generator(device).manual_seed(0)}
    x = torch.randn(tokens, layer.in_features, **like, requires_grad=True)
    grad_y = torch.randn(tokens, layer.out_features, **like)

    def step() -> None:
        before, layer.operands = layer.operands, operands
        with torch.no_grad():
            operands.refresh_all([layer], rechoose=True)
        torch.autograd.grad(layer.product(x, None), (x, layer.values), grad_y)
        layer.operands = before

    return step
