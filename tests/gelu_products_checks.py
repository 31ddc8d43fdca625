"""What kernels/gelu_products.py and kernels/feed_forward.py must do on any device that runs them, against float64."""

import torch
import torch.nn.functional as F
from attention_checks import poisoned_memory
from dense_kernels_checks import assert_near
from product_checks import ROUNDING, SUMMING, make_layer, normal, on_cutlass, spread_columns
from torch import Tensor, nn

from kernels.dense_parts import bias_gelu
from kernels.feed_forward import feed_forward, runs_together
from kernels.gelu_products import bias_gelu_narrow, bias_gelu_narrow_backward
from kernels.joint import without_bias
from sparse_ops import SparseLinear


# ---------------------------------------------------------------------------------------------------------- the kernels
def sample(device, dtype, tokens: int, columns: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gradient, x, its bias, and rows as `AdapterOperands` has them."""
    grad, x = (normal(device, tokens, columns, seed=seed, dtype=dtype) for seed in range(2))
    x[0] *= 8  # its tails, too
    rows = spread_columns(normal(device, columns, width, seed=2, dtype=dtype)).t().contiguous()
    return grad, x, normal(device, columns, seed=3), rows


def assert_narrow(narrow: Tensor, wide: Tensor, rows: Tensor) -> None:
    """The product of what was written, and zeros where the rows have some."""
    exact, magnitude = wide.double() @ rows.double().t(), wide.double().abs() @ rows.double().abs().t()
    assert narrow.shape == exact.shape and narrow.dtype == wide.dtype
    cut_off = narrow.dtype == torch.bfloat16 and not narrow.is_cuda  # as Triton's interpreter does with bf16
    allowed = ROUNDING[narrow.dtype] * (2 if cut_off else 1) * exact.abs() + SUMMING * magnitude
    assert ((narrow.double() - exact).abs() <= allowed).all()
    assert not narrow.unflatten(-1, (-1, 4))[..., 2:].any()


def check_kernels(device, dtype, tokens: int, columns: int, width: int) -> None:
    grad, x, bias, rows = sample(device, dtype, tokens, columns, width)
    with poisoned_memory():
        y, narrow = bias_gelu_narrow(x, bias, rows)
        grad_x, grad_narrow, grad_bias = bias_gelu_narrow_backward(grad, x, bias, rows)
    exact = [tensor.double().requires_grad_() for tensor in (x, bias)]
    expected = F.gelu(sum(exact))
    assert [tensor.dtype for tensor in (y, grad_x, grad_bias)] == [dtype, dtype, torch.float32]
    gradients = torch.autograd.grad(expected, exact, grad.double())
    assert_near([y, grad_x, grad_bias], [expected.detach(), *gradients], dtype)
    assert_narrow(narrow, y, rows)
    assert_narrow(grad_narrow, grad_x, rows)


def check_equal_bits_and_other_layouts(device, dtype) -> None:
    grad, x, bias, rows = sample(device, dtype, 300, 272, 16)
    first, laid_out = ([*bias_gelu_narrow(x, bias, rows)] for x in (x, x.t().contiguous().t()))
    first += bias_gelu_narrow_backward(grad, x, bias, rows)
    laid_out += bias_gelu_narrow_backward(*(tensor.t().contiguous().t() for tensor in (grad, x)), bias, rows)
    assert all(map(torch.equal, laid_out, first))


def check_operators(device, dtype) -> None:
    """The rules of torch.library: schema, fake kernels, tracing with dynamic shapes."""
    grad, *given = sample(device, dtype, 20, 80, 16)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(bias_gelu_narrow, given, test_utils=checks)
    torch.library.opcheck(bias_gelu_narrow_backward, (grad, *given), test_utils=checks)


# ----------------------------------------------------------------------------------------------------- the whole of it
INNER, OUTER = 272, 112


def layers_of(device, dtype, ranks=(8, 40), m: int = 4) -> nn.ModuleList:
    sizes = ((INNER, OUTER), (OUTER, INNER))
    layers = (make_layer(device, m, ranks[i], seed=i, sizes=sizes[i]) for i in range(2))
    return nn.ModuleList(on_cutlass(layer, dtype) for layer in layers)


def plain(x: Tensor, first: SparseLinear, second: SparseLinear) -> tuple[Tensor, Tensor]:
    """The path of layers that do not run together."""
    return without_bias(second, bias_gelu(*without_bias(first, x)))


def results_of(function, layers: nn.ModuleList, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    layers.zero_grad()
    x = x.detach().requires_grad_()
    y, bias = function(x, *layers)
    (y.float() + bias).backward(normal(x.device, *y.shape, seed=9))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in layers.named_parameters()}


def exact_results(layers: nn.ModuleList, dtype: torch.dtype, x: Tensor) -> dict[str, Tensor]:
    """The same in float64, with weights and adapters rounded to `dtype`, and numbers between products."""
    first, second = layers
    weights = [[layer.dense_weight(twice).to(dtype).double() for twice in (False, True)] for layer in layers]
    sides = [[side.detach().to(dtype).double() for side in (layer.lora_left, layer.lora_right)] for layer in layers]
    whole = [
        [weight + (left @ right).t() / len(right) for weight in pair]
        for pair, (left, right) in zip(weights, sides, strict=True)
    ]
    x, grad = x.double(), normal(x.device, *x.shape[:-1], OUTER, seed=9).to(dtype).double()
    inner = (x @ whole[0][0].t() + first.bias.detach().double()).requires_grad_()
    activated = F.gelu(inner)
    found = {"y": activated.detach() @ whole[1][0].t(), "1.bias": grad.flatten(0, -2).sum(0)}
    (grad_inner,) = torch.autograd.grad(activated, inner, grad @ whole[1][1])
    found |= {"x": grad_inner @ whole[0][1], "0.bias": grad_inner.flatten(0, -2).sum(0)}
    pairs = ((x, grad_inner), (activated.detach(), grad))
    for i, (layer, (given, grad_y)) in enumerate(zip(layers, pairs, strict=True)):
        (left, right), dense = sides[i], grad_y.flatten(0, -2).t() @ given.flatten(0, -2)
        found[f"{i}.values"] = dense[layer.mask()].view(layer.values.shape)
        found[f"{i}.lora_left"] = dense.t() @ right.t() / len(right)
        found[f"{i}.lora_right"] = (dense @ left).t() / len(right)
    return found


def check_feed_forward(device, dtype, shape: tuple[int, ...], ranks=(8, 40), m: int = 4, function=feed_forward) -> None:
    """As near to float64 as the plain path is."""
    layers = layers_of(device, dtype, ranks, m)
    assert runs_together(*layers)
    x = normal(device, *shape, OUTER, seed=5, dtype=dtype)
    exact = exact_results(layers, dtype, x)
    found, reference = (results_of(path, layers, x) for path in (function, plain))
    assert found.keys() == reference.keys() == exact.keys()
    for name, truth in exact.items():
        ours, theirs = found[name], reference[name]
        assert ours.shape == truth.shape and ours.dtype == theirs.dtype, name
        error, allowed = ((side.double() - truth).norm() / truth.norm() for side in (ours, theirs))
        assert error <= 1.25 * allowed + 1e-6 and allowed < 0.02, f"{name}: {error:.1e}, not {allowed:.1e}"
