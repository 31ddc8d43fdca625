"""What short_attention must do on any device that runs its kernels, against softmax attention in float64."""

from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.dense_parts import dropout_seed, kept_by_dropout
from kernels.short_attention import LONGEST, short_attention

LENGTHS = (LONGEST, 0, 1, 71, 64, 17, LONGEST, 0)


@contextmanager
def poisoned_memory():
    """What is allocated is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def boundaries_of(lengths, device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def exact(qkv: Tensor, bias: Tensor, boundaries: Tensor, kept: Tensor | None, dropout_p: float):
    """In float64, sequence by sequence; `kept` [T, A, LONGEST] is dropout's mask."""
    outputs = []
    biased = qkv + bias.view(qkv.shape[1:])
    for begin, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = biased[begin:end].permute(1, 2, 0, 3)
        p = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        if kept is not None:
            p = p * kept[begin:end, :, : end - begin].transpose(0, 1) / (1 - dropout_p)
        outputs.append((p @ v).transpose(0, 1))
    return torch.cat(outputs)


def draw(device, dtype, heads: int, size: int, lengths=LENGTHS, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Query, key and value together, their bias, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    qkv = (spread * normal(sum(lengths), 3, heads, size)).to(dtype)
    bias = 0.5 * normal(3 * heads * size)
    return [qkv, bias, normal(sum(lengths), heads, size).to(dtype)]


def gradients(attention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with poisoned_memory():
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(device, dtype, heads: int = 2, size: int = 64, dropout_p: float = 0.0, spread: float = 1.0) -> None:
    """Output and gradients, to the rounding of `dtype`, with scores that are spread by `spread` squared."""
    *inputs, grad = draw(device, dtype, heads, size, spread=spread)
    boundaries, kept = boundaries_of(LENGTHS, device), None
    torch.manual_seed(5)
    found = gradients(lambda *given: short_attention(*given, boundaries, dropout_p), inputs, grad)
    if dropout_p:
        torch.manual_seed(5)
        kept = kept_by_dropout(torch.Size((len(grad), heads, LONGEST)), dropout_seed(grad), dropout_p)
    doubles = [tensor.double() for tensor in inputs]
    bias = doubles[1].view(3, heads, size)
    doubles[0] = (doubles[0] + bias).to(dtype).double() - bias  # the kernels multiply the sum, rounded
    right = gradients(lambda *given: exact(*given, boundaries, kept, dropout_p), doubles, grad.double())
    for name, ours, expected in zip(("output", "qkv", "bias"), found, right, strict=True):
        error, eps = (ours.double() - expected).abs(), torch.finfo(dtype).eps
        assert ours.dtype == (torch.float32 if name == "bias" else dtype) and ours.shape == expected.shape
        assert error.norm() < eps * expected.norm(), f"{name}: {error.norm() / expected.norm():.1e}"
        assert error.max() < 8 * eps * expected.abs().max(), name


def check_equal_bits(device, dtype) -> None:
    *inputs, grad = draw(device, dtype, heads=2, size=32)
    boundaries, results = boundaries_of(LENGTHS, device), []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(gradients(lambda *given: short_attention(*given, boundaries, 0.1), inputs, grad))
    assert all(map(torch.equal, *results))


def check_nothing_behind_a_sequence_is_touched(device, dtype) -> None:
    """What lies there is not read, or a NaN would spread, and not written, or it would not stay one."""
    length = 71
    qkv, bias, grad = draw(device, dtype, heads=2, size=32)
    qkv[length:], grad[length:] = float("nan"), float("nan")
    boundaries = boundaries_of([length], device)
    found = gradients(lambda *given: short_attention(*given, boundaries, 0.1), [qkv, bias], grad)
    for tensor in found[:2]:
        assert tensor[:length].isfinite().all() and tensor[length:].isnan().all()
    assert found[2].isfinite().all()


def check_other_strides(device, dtype) -> None:
    """Inputs that lie in memory in another order."""
    qkv, bias, grad = draw(device, dtype, heads=2, size=32)
    boundaries, results = boundaries_of(LENGTHS, device), []
    for lay_out in (Tensor.contiguous, lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1)):
        given = [lay_out(qkv), bias]
        results.append(gradients(lambda *inputs: short_attention(*inputs, boundaries, 0.0), given, lay_out(grad)))
    assert all(map(torch.equal, *results))
