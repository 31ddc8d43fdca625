"""The dense parts between a block's products, in the form that the compiler makes the fewest and fastest kernels of.

Both are plain torch operations with the backward pass written out, so that what is kept between the passes, and in
which dtype, is decided here: what bounds these parts is memory. They are for compiled code; outside it, each of these
operations would be a kernel.
"""

import math

import torch
from torch import Tensor

# erf by Abramowitz and Stegun, 7.1.26: within 1.5e-7, in fewer instructions than CUDA's own, and the exponential in it
# is the one that the derivative needs.
_P = 0.3275911
_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _normal_distribution(x: Tensor) -> tuple[Tensor, Tensor]:
    """Phi(x) and phi(x) of the standard normal distribution, in fp32; in its lower tail without cancellation."""
    t = 1 / (1 + _P / math.sqrt(2) * x.abs())
    polynomial = torch.zeros_like(t)
    for coefficient in _COEFFICIENTS:
        polynomial = (polynomial + coefficient) * t
    bell = torch.exp(-0.5 * x * x)
    tail = 0.5 * polynomial * bell
    return torch.where(x >= 0, 1 - tail, tail), bell / math.sqrt(2 * math.pi)


def _output(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, for what a Function's forward returns.

    Not by `.to` alone: in torch 2.11, where that has nothing to convert, a compiled Function's gradients come out as
    zeros.
    """
    return exact if exact.dtype == dtype else exact.to(dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, kernels):
        ctx.save_for_backward(x, bias)
        ctx.kernels = kernels
        if kernels:
            return torch.ops.slope.bias_gelu(x, bias)
        exact = x.float() + bias
        return _output(exact * _normal_distribution(exact)[0], x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, bias = ctx.saved_tensors
        if ctx.kernels:
            return *torch.ops.slope.bias_gelu_backward(grad_y, x, bias), None
        exact = x.float() + bias
        below, density = _normal_distribution(exact)
        grad_x = (grad_y.float() * (below + exact * density)).to(x.dtype)
        return grad_x, _over_tokens(grad_x), None


def _over_tokens(grad: Tensor) -> Tensor:
    """A gradient [..., H], as it was written, summed to that of a bias [H]."""
    return grad.float().sum(tuple(range(grad.dim() - 1)))


def bias_gelu(x: Tensor, bias: Tensor, kernels: bool = False) -> Tensor:
    """(x + bias) Phi(x + bias), elementwise over [..., H], computed in fp32.

    Args:
        bias: fp32 [H]; added here and not in the product before, so that its gradient needs no pass of its own.
        kernels: run it, and its backward pass, by kernels/dense_kernels.py, which the caller has imported.

    Returns:
        Within 1e-6 max(1, |x + bias|) of `F.gelu(x + bias)` before it is rounded to x's dtype.
    """
    return _BiasGelu.apply(x, bias, kernels)


# ------------------------------------------------------------------------------------------------------------- dropout
# Its own operator, so that the compiler draws the two numbers once, and not in each element of what reads them.
_LIBRARY = torch.library.Library("slope", "FRAGMENT")
_LIBRARY.define("dropout_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _dropout_seed(like: Tensor) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=like.device)


_LIBRARY.impl("dropout_seed", _dropout_seed, "CompositeExplicitAutograd")
torch.library.register_fake("slope::dropout_seed")(lambda like: like.new_empty(2, dtype=torch.int32))
dropout_seed = torch.ops.slope.dropout_seed.default


def kept_by_dropout(shape: torch.Size, seed: Tensor, probability: float) -> Tensor:
    """Which elements dropout keeps: a function of the seed, int32 [2], and of the element's number alone.

    So the mask is computed again in the backward pass, and never stored. The number is mixed by three multiplications
    (Wellons' triple32, with a word of the seed before each of the first two): fewer instructions than those of Philox,
    torch's generator.
    """
    device, columns = seed.device, shape[-1]
    rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int32, device=device).view(*shape[:-1], 1)
    mixed = rows * columns + torch.arange(columns, dtype=torch.int32, device=device) + seed[0]
    mixed = (mixed ^ _shifted(mixed, 17)) * (0xED5AD4BB - 2**32) ^ seed[1]
    mixed = (mixed ^ _shifted(mixed, 11)) * (0xAC4C1B51 - 2**32)
    mixed = (mixed ^ _shifted(mixed, 15)) * 0x31848BAB
    mixed = mixed ^ _shifted(mixed, 14)
    return (mixed & 0xFFFFFF) >= round(probability * 2**24)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (bits >> by) & (2 ** (32 - by) - 1)


# ------------------------------------------------------------------------------------------------ end of half a block
class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, y_bias, residual, weight, bias, seed, probability, eps, twice, kernels):
        dropped = y.float() + y_bias
        if seed is not None:
            dropped = torch.where(kept_by_dropout(y.shape, seed, probability), dropped / (1 - probability), 0.0)
        total = (dropped + residual.float()).to(y.dtype)
        exact = total.float()
        mean = exact.mean(-1, keepdim=True)
        inverse_deviation = torch.rsqrt((exact - mean).square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(total, mean, inverse_deviation, weight, seed)
        ctx.probability, ctx.residual_dtype, ctx.kernels = probability, residual.dtype, kernels
        out = _output((exact - mean) * inverse_deviation * weight + bias, y.dtype)
        return (out, out.view_as(out)) if twice else out

    @staticmethod
    def backward(ctx, grad_out, grad_skip=None):
        total, mean, inverse_deviation, weight, seed = ctx.saved_tensors
        if ctx.kernels:
            grad_y, grad_residual, sums = torch.ops.slope.dropout_add_layer_norm_backward(
                *(grad_out, grad_skip, total, mean, inverse_deviation, weight, seed, ctx.probability),
                ctx.residual_dtype,
            )
            grad_bias, grad_weight, grad_norm_bias = sums.unbind()
            return grad_y, grad_bias, grad_residual, grad_weight, grad_norm_bias, *[None] * 5
        normalised = (total.float() - mean) * inverse_deviation
        grad = grad_out.float() if grad_skip is None else grad_out.float() + grad_skip.float()
        scaled = grad * weight
        projected = normalised * (scaled * normalised).mean(-1, keepdim=True)
        grad_total = (scaled - scaled.mean(-1, keepdim=True) - projected) * inverse_deviation
        grad_y = grad_total
        if seed is not None:
            kept = kept_by_dropout(total.shape, seed, ctx.probability)
            grad_y = torch.where(kept, grad_total / (1 - ctx.probability), 0.0)
        grad_y = grad_y.to(total.dtype)
        grad_residual = grad_total.to(ctx.residual_dtype)
        grad_weight, grad_norm_bias = _over_tokens(grad * normalised), _over_tokens(grad)
        return grad_y, _over_tokens(grad_y), grad_residual, grad_weight, grad_norm_bias, *[None] * 5


def dropout_add_layer_norm(
    y: Tensor,
    y_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    probability: float,
    eps: float,
    twice: bool = False,
    kernels: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(y + y_bias)) over the last dimension, [..., H], in y's dtype.

    The sum is rounded to y's dtype before it is normalised, as in NVIDIA's half-precision BERT: the backward pass then
    keeps 16 bits of it. Statistics and gradients of the biases and of `weight` [H], all fp32, are fp32.

    Args:
        twice: return the result twice, for a product and a residual sum that both read it: their gradients then come
            apart, and the backward pass adds them up as it reads them.
        kernels: run the backward pass by kernels/dense_kernels.py.
    """
    seed = dropout_seed(y) if probability else None
    return _DropoutAddLayerNorm.apply(y, y_bias, residual, weight, bias, seed, probability, eps, twice, kernels)
