"""Layers of one input, and what their joint product must give, on any device."""

import torch
from product_checks import make_layer, normal, on_cutlass
from torch import Tensor, nn

from kernels.joint import products
from sparse_ops import SparseLinear

IN, OUTS = 128, (256, 512, 256)
DTYPE = torch.bfloat16


def sparse_layers(m: int = 4, make=on_cutlass, rank: int = 0, device="cpu") -> list[SparseLinear]:
    layers = [make_layer(device, m, rank, seed, sizes=(out, IN)) for seed, out in enumerate(OUTS)]
    return [make(layer, DTYPE) for layer in layers]


def results_of(layers: list[nn.Module], product) -> list[Tensor]:
    """Outputs side by side, and the gradients of the input and of all parameters."""
    parameters = [p for layer in layers for p in layer.parameters()]
    device = parameters[0].device
    x = normal(device, 40, IN, seed=7, dtype=DTYPE).requires_grad_()
    with torch.autocast(device.type, DTYPE):
        y = product(x, layers)
    grad = normal(device, 40, sum(OUTS), seed=8, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def each_alone(x: Tensor, layers: list[nn.Module]) -> Tensor:
    return torch.cat([layer(x) for layer in layers], -1)


def together(x: Tensor, layers: list[nn.Module]) -> Tensor:
    outputs, bias = products(x, layers)
    return (torch.cat(outputs, -1).float() + bias).to(outputs[0].dtype)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape and ours.dtype == right.dtype
        assert (ours.double() - right.double()).norm() < 6e-3 * right.double().norm()
