"""What layers on 2:4 operands must compute, held against float64 and dense operands: shared by CPU and GPU tests.

On the CPU, tests/emulated_kernels.py stands in for the kernels.
"""

import torch
from sparse_reference import MaskedDense
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import build, native
from kernels.backends import CutlassOperands
from kernels.ops import adapter_grads, adapter_width, gather, sparse_mm
from sparse_ops import DenseOperands, N, OperandRefresh, SparseLinear, named_layers, nm_mask

IN, OUT = 336, 272  # multiples of 16, the least that the kernels take, and of nothing more
HALF_DTYPES = (torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why this machine cannot run the kernels."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and this machine has none"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"needs a Hopper GPU, and this is {torch.cuda.get_device_name()}"
    try:
        build.build_all()
    except build.KernelsUnavailable as reason:
        return str(reason)
    return None


def normal(device, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


# -------------------------------------------------------------------------------------------------------- one product
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # of one number, relative
SUMMING = 2**-17  # of a product's sum, relative to the sum of its terms' magnitudes: fp32, in any order


class Poisoned:
    """A matrix full of NaN, between more of the same that nothing may touch."""

    def __init__(self, device, *shape: int, dtype: torch.dtype):
        size, row = torch.Size(shape).numel() * dtype.itemsize, shape[-1] * dtype.itemsize
        before, after = 4096, 272 * row  # the largest tile has 256 rows
        memory = torch.full((before + size + after,), 0xFF, dtype=torch.uint8, device=device)
        self.matrix = memory[before : before + size].view(dtype).view(shape)
        self.guards = memory[:before], memory[before + size :]

    def check(self, exact: Tensor, magnitude: Tensor, name: str) -> None:
        """All of it is `exact` to the rounding of its dtype, after a sum in fp32 of terms of `magnitude` in all."""
        found = self.matrix
        wrong = ~((found.double() - exact).abs() <= ROUNDING[found.dtype] * exact.abs() + SUMMING * magnitude)
        places = wrong.nonzero()  # a NaN is among them
        assert not len(places), f"{name}: {len(places)} of {found.numel()} are wrong, first at {places[0].tolist()}"
        assert all((guard == 0xFF).all() for guard in self.guards), f"{name}: memory beside it was written"


def apart(device, rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Random rows with NaN between them, and after the last."""
    padded = torch.full((rows + 8, columns + 8), float("nan"), dtype=dtype, device=device)
    return padded[:rows, :columns].copy_(normal(device, rows, columns, seed=seed))


# -------------------------------------------------------------------------------------------------------------- layers
def make_layer(device, m: int = 4, rank: int = 0, seed: int = 0, bias: bool = True, sizes=(OUT, IN)) -> SparseLinear:
    """A layer of random weights, and random adapters where there is a rank, on dense operands."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(sizes[1], sizes[0], bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = SparseLinear(linear, nm_mask(linear.weight.detach().abs(), N, m), m)
    if rank:
        layer.add_adapters(rank, generator)
        with torch.no_grad():
            layer.lora_right.normal_(generator=generator)
    return layer.to(device)


def on_cutlass(layer: SparseLinear, dtype: torch.dtype = torch.bfloat16) -> SparseLinear:
    layer.set_operands(CutlassOperands(layer, dtype))
    return layer


def on_dense(layer: SparseLinear, dtype: torch.dtype = torch.bfloat16) -> SparseLinear:
    layer.set_operands(DenseOperands(layer, dtype))
    return layer


# ------------------------------------------------------------------------------------------------ products of one layer
INPUTS = {  # of `size` features
    "1d": lambda device, size: normal(device, size, seed=1),
    "2d": lambda device, size: normal(device, 150, size, seed=1),
    "3d": lambda device, size: normal(device, 3, 50, size, seed=1),
    "transposed": lambda device, size: normal(device, size, 150, seed=1).t(),
    "3d-transposed": lambda device, size: normal(device, 50, 3, size, seed=1).transpose(0, 1),
    "expanded": lambda device, size: normal(device, size, seed=1).expand(150, size),
    "rows-apart": lambda device, size: normal(device, 150, size + 8, seed=1)[:, :size],
    "columns-apart": lambda device, size: normal(device, 150, 2 * size, seed=1)[:, ::2],
    "unaligned": lambda device, size: normal(device, 150 * size + 1, seed=1)[1:].view(150, size),
    "3d-unaligned": lambda device, size: normal(device, 150 * size + 1, seed=1)[1:].view(3, 50, size),
}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, with the same strides and the same place in its memory."""
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).to(dtype)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def results(layer: SparseLinear, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Y and every gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad_y)
    return {"Y": y.detach(), "X": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def exact_results(layer: SparseLinear, dtype: torch.dtype, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """The same in float64, from operands rounded to `dtype`."""
    weights = [layer.dense_weight(twice).to(dtype).double() for twice in (False, True)]
    reference = MaskedDense(weights[0], layer.mask(), weights[1], layer.bias.detach().double())
    if layer.lora_left is not None:
        left, right = (side.detach().to(dtype).double() for side in (layer.lora_left, layer.lora_right))
        reference.left, reference.right = left, right
    x, grad_y = x.double(), grad_y.double()
    found = reference.gradients(x.reshape(-1, layer.in_features), grad_y.reshape(-1, layer.out_features))
    exact = {"Y": reference.output(x), "X": found["x"].view(x.shape), "bias": found["bias"]}
    exact["values"] = found["weight"][layer.mask()].view(layer.values.shape)
    return exact | {f"lora_{side}": found[side] for side in ("left", "right") if side in found}


def assert_as_exact(found: dict, reference: dict, exact: dict, name: str) -> None:
    """`found` is as near to `exact` as `reference` is, in the mean and at the worst."""
    assert found.keys() == reference.keys() == exact.keys()
    for key, truth in exact.items():
        assert found[key].dtype == reference[key].dtype and found[key].shape == truth.shape, f"{name}: {key}"
        errors, allowed = (side[key].double() - truth for side in (found, reference))
        floor = 1e-6 * truth.abs().max()
        mean, worst = errors.square().mean().sqrt(), errors.abs().max()
        assert mean <= 1.5 * allowed.square().mean().sqrt() + floor, f"{name}: {key} is off by {mean:g} in the mean"
        assert worst <= 2 * allowed.abs().max() + floor, f"{name}: {key} is off by {worst:g} at the worst"


def check_layer(device, m: int, rank: int, dtype: torch.dtype, sizes=(OUT, IN), kinds=INPUTS) -> None:
    """Y and every gradient, for inputs of every stride, as exact as on dense operands."""
    dense, sparse = (make_layer(device, m, rank, sizes=sizes) for _ in range(2))
    dense, sparse = on_dense(dense, dtype), on_cutlass(sparse, dtype)
    assert torch.equal(sparse.second_kept, dense.second_kept)
    for kind in kinds:
        x = rounded(INPUTS[kind](device, sizes[1]), dtype)
        grad_y = normal(device, *x.shape[:-1], sizes[0], seed=2, dtype=dtype)
        exact = exact_results(dense, dtype, x, grad_y)
        assert_as_exact(results(sparse, x, grad_y), results(dense, x, grad_y), exact, kind)


def check_strange_gradients(device) -> None:
    """Gradients that are expanded or transposed; an input in fp32, as without autocast."""
    dense, sparse = on_dense(make_layer(device, rank=8)), on_cutlass(make_layer(device, rank=8))
    x = normal(device, 3, 50, IN, seed=1)
    one = torch.ones((), dtype=torch.bfloat16, device=device)
    transposed = normal(device, 50, 3, OUT, seed=2, dtype=torch.bfloat16).transpose(0, 1)
    for name, grad_y in (("expanded", one.expand(3, 50, OUT)), ("transposed", transposed)):
        exact = exact_results(dense, torch.bfloat16, x.bfloat16(), grad_y)
        assert_as_exact(results(sparse, x, grad_y), results(dense, x, grad_y), exact, name)
        assert results(sparse, x, grad_y)["X"].dtype == torch.float32


def check_no_tokens(device, rank: int) -> None:
    layer = on_cutlass(make_layer(device, rank=rank))
    found = results(layer, *(torch.zeros(0, 5, size, dtype=torch.bfloat16, device=device) for size in (IN, OUT)))
    assert found.pop("Y").shape == (0, 5, OUT) and found.pop("X").shape == (0, 5, IN)
    assert all((gradient == 0).all() for gradient in found.values())


# ---------------------------------------------------------------------------------------------- operands, never stale
def executed(layer: SparseLinear) -> tuple[Tensor, Tensor]:
    """The matrices [out, in] that the two products read: Y of unit inputs, dX of unit gradients. Without bias."""
    device = layer.values.device
    eye_in, eye_out = (torch.eye(size, dtype=torch.bfloat16, device=device) for size in (IN, OUT))
    nothing = torch.zeros(IN, OUT, dtype=torch.bfloat16, device=device)
    return results(layer, eye_in, nothing)["Y"].t(), results(layer, nothing.t(), eye_out)["X"]


def assert_fresh(layer: SparseLinear) -> None:
    """Both operands are those of the present values, W^{R,C} as the dense reference chooses it."""
    twin = make_layer(layer.values.device, layer.m, bias=False)
    twin.load_state_dict({"values": layer.values.detach(), "mask_bits": layer.mask_bits})
    forward, backward = executed(layer)
    with torch.no_grad():
        evaluated = layer(torch.eye(IN, dtype=torch.bfloat16, device=layer.values.device)).t()
    for found in (forward, evaluated):
        assert torch.equal(found, twin.dense_weight().bfloat16())
    assert torch.equal(backward, twin.dense_weight(double_pruned=True).bfloat16())


def check_events(device, m: int, frozen: bool = False) -> None:
    """Operands are fresh after every event, and stay where they are."""
    layer = make_layer(device, m, bias=False)
    layer.values.requires_grad_(not frozen)
    on_cutlass(layer).values.requires_grad_()
    places = [buffer.data_ptr() for buffer in layer.operands.buffers()]
    assert len(places) == {(4, False): 3, (4, True): 4}.get((m, frozen), 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    OperandRefresh(layer).attach(optimizer)
    for seed in range(2):
        layer.values.grad = normal(device, *layer.values.shape, seed=seed)
        optimizer.step()
        assert_fresh(layer)
    layer.load_state_dict(make_layer(device, m, bias=False, seed=1).state_dict())  # another mask
    assert_fresh(layer)
    layer.values.data.mul_(0.5)  # past every hook, and with the same choice of W^{R,C}
    layer.add_adapters(8, torch.Generator().manual_seed(0))
    assert_fresh(layer)
    assert [buffer.data_ptr() for buffer in layer.operands.buffers()][: len(places)] == places
    places = [buffer.data_ptr() for buffer in layer.operands.buffers()]
    with torch.no_grad():
        layer.lora_right.normal_()
    layer.refresh(rechoose=True)
    assert [buffer.data_ptr() for buffer in layer.operands.buffers()] == places
    check_adapter_operands(layer)


def check_many_layers(device) -> None:
    """One refresh of layers of several sizes, patterns, ranks and dtypes leaves each as its own refresh does."""
    kinds = ((4, 0, (64, 80)), (8, 24, (272, 336)), (4, 3, (64, 80)), (16, 0, (128, 64)), (4, 80, (336, 272)))
    layers = [make_layer(device, m, rank, sizes=sizes, seed=i) for i, (m, rank, sizes) in enumerate(kinds)]
    model = nn.ModuleList(on_cutlass(layer, HALF_DTYPES[i % 2]) for i, layer in enumerate(layers))
    before = [[buffer.clone() for buffer in layer.operands.buffers()] for layer in layers]
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(normal(device, *parameter.shape, seed=i))
    OperandRefresh(model).after_step()
    together = [[buffer.clone() for buffer in layer.operands.buffers()] for layer in layers]
    for layer, old, new in zip(layers, before, together, strict=True):
        layer.refresh(rechoose=True)
        alone = dict(layer.operands.named_buffers())
        for (name, buffer), was, now in zip(alone.items(), old, new, strict=True):
            assert torch.equal(now, buffer), name
            assert name == "metadata" or not torch.equal(now, was), f"{name} must follow the values"


def kept_for_backward(run) -> list[Tensor]:
    """What autograd keeps of the call until its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return kept


def check_adapter_operands(layer: SparseLinear) -> None:
    """All four are the parameters of now."""
    operands = layer.operands._adapters()
    _check_adapters(layer.lora_left.detach(), layer.lora_right.detach(), *operands)
    assert all(operand.is_contiguous() for operand in operands)


def _check_adapters(left, right, left_rows, right_rows, left_kept, right_kept) -> None:
    """The operands of L and R, with zeros in the columns that fill up."""
    rank = left.shape[1]
    scaled = (right.t().double() / rank).float()
    for matrix, kept, rows in ((left, left_kept, left_rows), (scaled, right_kept, right_rows)):
        assert torch.equal(kept[:, :rank], matrix.to(kept.dtype)) and not kept[:, rank:].any()
        assert torch.equal(rows, spread_columns(kept).t())


def check_adapter_slices(device, dtype: torch.dtype) -> None:
    """One refresh of more layers than a launch holds writes each operand between others, and nothing else."""
    layers, around = [], []
    for seed, (columns, out, rank) in enumerate([(48, 80, 4), (336, 272, 24), (64, 64, 72), (16, 128, 64)] * 13):
        width = adapter_width(rank)
        operands = []
        for rows, size in ((2 * width, columns), (2 * width, out), (columns, width), (out, width)):
            wide = torch.full((rows + 3, size + 8 * (1 + len(operands))), float("nan"), dtype=dtype, device=device)
            operands.append(wide[2 : 2 + rows, 8 : 8 + size])
            around.append((wide, operands[-1]))
        sides = [normal(device, *shape, seed=seed) for shape in ((columns, rank), (rank, out))]
        layers.append((*sides, *operands))
    native.refresh_adapters(layers, dtype)
    for layer in layers:
        _check_adapters(*layer)
    for wide, written in around:
        written.fill_(float("nan"))
        assert wide.isnan().all(), "what lies beside an operand was written"


def check_second_choice(device, m: int) -> None:
    """A choice of the second pruning stays until it is made anew, and returns."""
    layer = on_cutlass(make_layer(device, m, bias=False))
    first = layer.second_kept
    layer.values.data.copy_(normal(device, *layer.values.shape, seed=9))
    layer.refresh(rechoose=False)
    assert torch.equal(layer.second_kept, first)
    layer.refresh(rechoose=True)
    second = layer.second_kept
    assert not torch.equal(second, first)
    layer.set_second_kept(first)
    assert torch.equal(layer.second_kept, first)
    assert torch.equal(executed(layer)[1], layer.expand(torch.where(first, layer.values.detach(), 0.0)).bfloat16())
    layer.set_second_kept(second)
    assert_fresh(layer)


# ---------------------------------------------------------------------------------- compiled, captured, computed again
def make_stack(device) -> nn.Sequential:
    """Two layers on cutlass, the first with adapters."""
    first, last = make_layer(device, rank=16, sizes=(512, 256)), make_layer(device, seed=1, sizes=(256, 512))
    return nn.Sequential(on_cutlass(first), nn.ReLU(), on_cutlass(last))


def stack_sample(device) -> tuple[Tensor, Tensor]:
    """X and dY of a stack."""
    x, grad_y = (normal(device, 2, 70, 256, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    return x.requires_grad_(), grad_y


def stack_results(model, parameters, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *parameters], grad_y)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 2**-8) -> None:
    """As near as two orders of the same dense products are."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = ours.detach().float(), theirs.detach().float()
        error = float((ours - theirs).norm() / theirs.norm())
        assert error <= tolerance, f"result {i} is off by {error:g} of its norm"


def new_values(model: nn.Module) -> None:
    for seed, (_, layer) in enumerate(named_layers(model)):
        layer.values.data.copy_(normal(layer.values.device, *layer.values.shape, seed=20 + seed))
        layer.refresh(rechoose=True)


def check_compiled(device, backend: str) -> None:
    """One graph, compiled once, that reads refreshed operands."""
    torch._dynamo.reset()
    model = make_stack(device)
    compiled, parameters = torch.compile(model, fullgraph=True, backend=backend), list(model.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            sample = stack_sample(device)
            assert_near(stack_results(compiled, parameters, *sample), stack_results(model, parameters, *sample))
            new_values(model)


def check_compiled_for_any_tokens(device, backend: str) -> None:
    """One graph for every number of tokens, of rows and of sequences: compiled once, forward and backward."""
    model = make_stack(device)
    parameters = list(model.parameters())
    for shapes in (((384,), (130,), (7296,), (129,)), ((2, 70), (3, 70), (5, 33))):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for i, shape in enumerate(shapes):
            x = normal(device, *shape, 256, seed=1, dtype=torch.bfloat16).requires_grad_()
            grad_y = normal(device, *shape, 256, seed=2, dtype=torch.bfloat16)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                found = stack_results(compiled, parameters, x, grad_y)
            assert_near(found, stack_results(model, parameters, x, grad_y))


def check_checkpointed(device) -> None:
    model, sample = make_stack(device), stack_sample(device)
    parameters = list(model.parameters())

    def again(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    plain, repeated = (stack_results(each, parameters, *sample) for each in (model, again))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(repeated, plain, strict=True))


def check_operators(device) -> None:
    """The rules of torch.library: schema, fake kernels, tracing with dynamic shapes."""
    layer = on_cutlass(make_layer(device, rank=8))
    operands, x = layer.operands, normal(device, 6, IN, seed=1, dtype=torch.bfloat16)
    adapters = (x @ operands.left_rows.t(), operands.right_kept)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    of_weight = (operands.forward_kept(layer), operands.metadata)
    for arguments in ((layer.bias.detach(), None, None), (None, *adapters)):
        torch.library.opcheck(sparse_mm, (x, *of_weight, *arguments), test_utils=checks)
    gradient = normal(device, OUT, IN, seed=2, dtype=torch.bfloat16)
    torch.library.opcheck(gather, (gradient, layer.mask_bits, layer.m), test_utils=checks)
    torch.library.opcheck(adapter_grads, (gradient, operands.left_rows, operands.right_rows, 8), test_utils=checks)


def spread_columns(matrix: Tensor) -> Tensor:
    """[rows, columns] -> [rows, 2 columns]: column c at c/2*4 + c%2, zeros elsewhere; columns even."""
    pairs = matrix.unflatten(-1, (-1, 2))
    return torch.cat((pairs, torch.zeros_like(pairs)), -1).flatten(-2)
