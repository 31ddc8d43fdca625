"""Layers of one input, and what their joint product must give, on any device."""

import torch
from product_checks import assert_as_exact, exact_results, make_layer, normal, on_cutlass
from torch import Tensor, nn

from kernels.joint import products
from sparse_ops import SparseLinear

IN, OUTS = 128, (256, 512, 256)
DTYPE = torch.bfloat16


def sparse_layers(m: int = 4, make=on_cutlass, rank: int = 0, device="cpu") -> list[SparseLinear]:
    layers = [make_layer(device, m, rank, seed, sizes=(out, IN)) for seed, out in enumerate(OUTS)]
    return [make(layer, DTYPE) for layer in layers]


def add_random_adapters(layer: SparseLinear, rank: int, seed: int) -> None:
    layer.add_adapters(rank, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.lora_right.copy_(normal(layer.values.device, rank, layer.out_features, seed=seed))
    layer.refresh(rechoose=False)


def inputs_of(layers: list[nn.Module]) -> tuple[Tensor, Tensor]:
    """X, and dY of all outputs side by side."""
    device = layers[0].bias.device
    return normal(device, 40, IN, seed=7, dtype=DTYPE), normal(device, 40, sum(OUTS), seed=8, dtype=DTYPE)


def results_of(layers: list[nn.Module], product) -> list[Tensor]:
    """Outputs side by side, and the gradients of the input and of all parameters."""
    parameters = [p for layer in layers for p in layer.parameters()]
    x, grad = inputs_of(layers)
    x.requires_grad_()
    with torch.autocast(x.device.type, DTYPE):
        y = product(x, layers)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def exact_results_of(layers: list[SparseLinear]) -> list[Tensor]:
    """The same in float64, from operands rounded to their dtype."""
    x, grad = inputs_of(layers)
    each = [exact_results(layer, DTYPE, x, part) for layer, part in zip(layers, grad.split(OUTS, 1), strict=True)]
    of_parameters = [
        exact[name] for exact, layer in zip(each, layers, strict=True) for name, _ in layer.named_parameters()
    ]
    return [torch.cat([exact["Y"] for exact in each], 1), sum(exact["X"] for exact in each), *of_parameters]


def assert_joint_is_as_exact_as_apart(layers: list[SparseLinear]) -> None:
    """Each result of the joint product is as near to that in float64 as those of three products are."""
    found, reference = (results_of(layers, product) for product in (together, each_before_its_bias))
    as_dicts = (dict(enumerate(results)) for results in (found, reference, exact_results_of(layers)))
    assert_as_exact(*as_dicts, "joint")


def each_alone(x: Tensor, layers: list[nn.Module]) -> Tensor:
    return torch.cat([layer(x) for layer in layers], -1)


def together(x: Tensor, layers: list[nn.Module]) -> Tensor:
    return with_bias(*products(x, layers))


def each_before_its_bias(x: Tensor, layers: list[SparseLinear]) -> Tensor:
    outputs = [layer.product(x, None) for layer in layers]
    return with_bias(outputs, torch.cat([layer.bias for layer in layers]))


def with_bias(outputs: list[Tensor], bias: Tensor) -> Tensor:
    return (torch.cat(outputs, -1).float() + bias).to(outputs[0].dtype)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape and ours.dtype == right.dtype
        assert (ours.double() - right.double()).norm() < 6e-3 * right.double().norm()
