"""Dense products whose weights' gradients come in fp32 straight from the product, on any device that runs them."""

import torch
from torch import nn

from kernels.joint import products, without_bias

SHAPES = ((40, 64, (48,)), (3 * 40, 64, (32, 48, 16)))  # tokens, in, out of each layer


def check_dense_product(
    device: str, dtype: torch.dtype, tokens: int, columns: int, outs: tuple[int, ...], exact_input: bool = False
) -> float:
    """Outputs and gradients are those of autocast, in one tensor; the weights' gradients' error in roundings to fp32.

    Args:
        exact_input: in fp32, as what the embeddings make.

    Returns:
        The greatest error of a gradient's element, of the sum of its products' magnitudes, over fp32's epsilon.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(columns, out, device=device) for out in outs]
    x = torch.randn(tokens, columns, device=device).to(dtype)
    x = (x.float() if exact_input else x).requires_grad_()
    grad = torch.randn(tokens, sum(outs), device=device).to(dtype)
    with torch.autocast(device, dtype):
        right = torch.cat([nn.functional.linear(x, layer.weight) for layer in layers], -1)
        found = without_bias(layers[0], x)[0] if len(layers) == 1 else products(x, layers)[0][0]
    assert type(found.grad_fn).__name__ == "_DenseProductBackward"
    weights = [layer.weight for layer in layers]
    expected = torch.autograd.grad(right, [x, *weights], grad)
    grads = torch.autograd.grad(found, [x, *weights], grad)
    rounded = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, right, **rounded)
    for one, other in zip(grads, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rounded["rtol"], atol=rounded["atol"] * tokens**0.5)
    errors = []
    for part, one in zip(grad.double().split(outs, 1), grads[1:], strict=True):
        exact, magnitude = part.t() @ x.detach().double(), part.t().abs() @ x.detach().double().abs()
        errors.append(((one - exact).abs() / magnitude).max().item())
    return max(errors) / torch.finfo(torch.float32).eps
