"""What kernels/dense_kernels.py must do on any device that runs it, against kernels/dense_parts.py and float64."""

import torch
import torch.nn.functional as F
from attention_checks import poisoned_memory
from torch import Tensor

import kernels.dense_kernels
from kernels.dense_parts import bias_gelu, dropout_add_layer_norm, dropout_seed, kept_by_dropout


def normal(device, *shape: int, seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def gradients(function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with poisoned_memory():
        outputs = function(*leaves)
        return list(torch.autograd.grad(outputs, leaves, grads))


def assert_near(found: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> None:
    """To the rounding of `dtype`; gradients of biases, sums over tokens in fp32, much closer.

    fp32 is what the kernels compute in, too: each of their operations rounds to it, so that it is met within two steps.
    """
    for ours, expected in zip(found, right, strict=True):
        assert ours.shape == expected.shape
        eps = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1) if ours.dtype == dtype else 2e-6
        error = (ours.double() - expected).abs()
        assert error.norm() < eps * expected.norm() + 1e-30, f"{error.norm() / expected.norm():.1e}"
        assert error.max() < 8 * eps * expected.abs().max()


def check_gelu(device, dtype, tokens: int, columns: int) -> None:
    x, grad = (normal(device, tokens, columns, seed=seed, dtype=dtype) for seed in range(2))
    x[0] *= 8  # its tails, too
    bias = normal(device, columns, seed=2)
    with poisoned_memory():
        y = kernels.dense_kernels.bias_gelu(x, bias)
    assert torch.equal(bias_gelu(x, bias, kernels=True), y)
    exact = x.double() + bias
    error = (y.double() - F.gelu(exact)).abs()
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * F.gelu(exact).abs()
    assert y.dtype == dtype and y.shape == x.shape
    assert (error <= 1e-6 * exact.abs().clamp(min=1) + rounding).all(), f"{error.max():.1e}"
    found = gradients(lambda *given: bias_gelu(*given, kernels=True), [x, bias], [grad])
    right = gradients(lambda x, bias: F.gelu(x + bias), [x.double(), bias.double()], [grad.double()])
    assert [ours.dtype for ours in found] == [dtype, torch.float32]
    assert_near(found, right, dtype)


def norm_sample(device, dtype, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """What `dropout_add_layer_norm` reads, and two gradients of its output."""
    y, residual, grad, skip = (normal(device, *shape, seed=seed, dtype=dtype) for seed in range(4))
    y_bias, weight, bias = (start + 0.1 * normal(device, shape[-1], seed=4 + start) for start in (0, 1, 2))
    return [y, y_bias, residual, weight, bias], [grad, skip]


def check_norm(device, dtype, shape: tuple[int, ...], probability: float, twice: bool) -> None:
    inputs, grads = norm_sample(device, dtype, shape)
    grads = grads if twice else grads[:1]

    def ours(*given: Tensor):
        torch.manual_seed(5)
        return dropout_add_layer_norm(*given, probability, 1e-12, twice, kernels=True)

    found = gradients(ours, inputs, grads)
    torch.manual_seed(5)
    seed = dropout_seed(inputs[0]) if probability else None
    kept = torch.ones((), device=device)
    if seed is not None:
        kept = kept_by_dropout(torch.Size(shape), seed, probability)
    summed = torch.where(kept > 0, (inputs[0].float() + inputs[1]) / (1 - probability), 0.0) + inputs[2].float()
    y, y_bias, residual, *norm = doubles = [tensor.double().requires_grad_() for tensor in inputs]
    total = (y + y_bias) * kept / (1 - probability) + residual
    total = total + (summed.to(dtype).double() - total).detach()  # what is normalised is rounded
    expected = F.layer_norm(total, shape[-1:], *norm, 1e-12)
    right = torch.autograd.grad(expected, doubles, sum(grad.double() for grad in grads))
    assert [grad.dtype for grad in found] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    assert_near(found, list(right), dtype)


def check_equal_bits(device, dtype) -> None:
    inputs, grads = norm_sample(device, dtype, (57, 96))

    def ours(*given: Tensor):
        torch.manual_seed(5)
        return dropout_add_layer_norm(*given, 0.1, 1e-12, True, kernels=True)

    first, second = (gradients(ours, inputs, grads) for _ in range(2))
    assert all(map(torch.equal, first, second))


def check_other_layouts(device, dtype) -> None:
    """Gradients that lie in memory in another order, as that of a sum does, or of a transposed product."""
    inputs, (grad, skip) = norm_sample(device, dtype, (24, 96))

    def ours(*given: Tensor):
        torch.manual_seed(5)
        return dropout_add_layer_norm(*given, 0.1, 1e-12, True, kernels=True)

    laid_out = [grad.t().contiguous().t(), skip[:1].expand(24, -1)]
    plain = [grad, skip[:1].expand(24, -1).contiguous()]
    assert all(map(torch.equal, gradients(ours, inputs, laid_out), gradients(ours, inputs, plain)))
    y, y_bias, *_ = inputs
    for gelu in (kernels.dense_kernels.bias_gelu, lambda *given: bias_gelu(*given, kernels=True)):
        assert torch.equal(gelu(y.t().contiguous().t(), y_bias), gelu(y, y_bias))
        assert torch.equal(gelu(y.view(4, 6, 96), y_bias), gelu(y, y_bias).view(4, 6, 96))
