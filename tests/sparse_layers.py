"""Sparse layers of every pattern, and what the tests ask of them."""

import pytest
import torch
from sparse_reference import MaskedDense, kept_of_every_group, kept_twice, stored_values
from torch import nn

from sparse_ops import SparseLinear

IN, OUT = 48, 32
NM = [(m, by_input) for m in (4, 8, 16) for by_input in (True, False)]
CASES = [*NM, *[(percent, None) for percent in (0, 37.5, 60, 90)]]


def name_of(case):
    number, by_input = case
    return f"unstructured{number}" if by_input is None else f"2:{number}-{'in' if by_input else 'out'}"


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)
every_nm = pytest.mark.parametrize("case", NM, ids=name_of)
some_cases = pytest.mark.parametrize("case", [(4, True), (8, False), (60, None)], ids=name_of)


def mask_of(weight, case):
    number, by_input = case
    if by_input is not None:
        return kept_of_every_group(weight.abs(), 2, number, 1 if by_input else 0)
    magnitudes = weight.abs().flatten().tolist()
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[: int((1 - number / 100) * len(order))]] = True
    return mask.view(weight.shape)


def twice_pruned(weight, mask, case):
    number, by_input = case
    return weight if by_input is None else weight * kept_twice(weight, mask, 2, number, 0 if by_input else 1)


def make_layer(case, seed=0, bias=True, dtype=torch.float64, sizes=(OUT, IN)):
    """A layer, its mask, and W^R, with a corner of zeros, so that groups without a single weight are there too."""
    out_features, in_features = sizes
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        linear.weight[:16, :16] = 0
    mask = mask_of(linear.weight.detach(), case)
    number, by_input = case
    layer = SparseLinear(linear, mask, None if by_input is None else number, by_input is not False)
    return layer, mask, linear.weight.detach() * mask


def reference_of(case, layer, mask, weight):
    reference = MaskedDense(weight, mask, twice_pruned(weight, mask, case))
    for mine, theirs in (("bias", "bias"), ("left", "lora_left"), ("right", "lora_right")):
        parameter = getattr(layer, theirs)
        setattr(reference, mine, None if parameter is None else parameter.detach())
    return reference


def with_adapters(layer, rank):
    layer.add_adapters(rank, torch.Generator().manual_seed(rank))
    with torch.no_grad():
        layer.lora_right.normal_(generator=torch.Generator().manual_seed(rank + 1))


def weights_of(layer, mask):
    """The dense matrix that `values` stand for, from the mask and the documented order alone."""
    by_rows = mask if layer.by_input else mask.t()
    stored = torch.zeros(by_rows.shape, dtype=layer.values.dtype)
    stored[by_rows] = layer.values.detach().flatten()
    return stored if layer.by_input else stored.t()


def executed(layer):
    """The matrices [out, in] that the two products read, seen from outside: Y of unit inputs, dX of unit gradients."""
    dtype = layer.operands.dtype
    no_input = torch.zeros(layer.out_features, layer.in_features, dtype=dtype, requires_grad=True)
    (backward,) = torch.autograd.grad(layer(no_input), no_input, torch.eye(layer.out_features, dtype=dtype))
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=dtype)).t(), backward


def assert_fresh(layer, mask, case):
    """Both operands are those of the present values, W^{R,C} chosen from them. For layers without bias."""
    weight = weights_of(layer, mask)
    forward, backward = executed(layer)
    assert torch.equal(forward, weight.to(forward.dtype))
    assert torch.equal(backward, twice_pruned(weight, mask, case).to(backward.dtype))


def random_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def sample(kind, features, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return {
        "1d": lambda: normal(features),
        "2d": lambda: normal(6, features),
        "3d": lambda: normal(3, 2, features),
        "4d": lambda: normal(1, 3, 2, features),
        "empty": lambda: normal(0, features),
        "2d-transposed": lambda: normal(features, 6).t(),
        "3d-transposed": lambda: normal(2, 3, features).transpose(0, 1),
        "strided": lambda: normal(6, 2 * features)[:, ::2],
        "expanded": lambda: normal(features).expand(6, features),
    }[kind]()


def check_products(layer, reference, x, grad_y, **tolerance):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad_y.to(y.dtype))

    def close(actual, expected):
        torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance)

    expected = reference.gradients(x.detach().reshape(-1, IN), grad_y.reshape(-1, OUT))
    close(y, reference.output(x.detach()))
    close(x.grad, expected["x"].view(x.shape))
    values_grad = stored_values(expected["weight"], reference.mask, layer.by_input)
    close(layer.values.grad, torch.tensor(values_grad if layer.m else sum(values_grad, []), dtype=torch.float64))
    for name, parameter in (("bias", layer.bias), ("left", layer.lora_left), ("right", layer.lora_right)):
        if parameter is not None:
            close(parameter.grad, expected[name])
