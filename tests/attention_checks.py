"""What short_attention must do on any device that runs its kernels, against softmax attention in float64."""

from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import blockwise_attention
from kernels.dense_parts import dropout_seed
from kernels.short_attention import LONGEST, share_dropped, short_attention

LENGTHS = (LONGEST, 0, 1, 71, 64, 17, LONGEST, 0)


def lengths_for(longest: int) -> tuple[int, ...]:
    """For one of the two modules; the longest has blocks of its own, or part of one."""
    return LENGTHS if longest == LONGEST else (longest, 0, 1, 71, 192, 64, 129, 0)


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


def kept_scores(boundaries: Tensor, heads: int, seed: Tensor, dropout_p: float, longest: int = LONGEST) -> Tensor:
    """What dropout keeps, [T, A, longest]: the kernels' rule in int64."""
    starts, lengths, words = boundaries[:-1].long(), boundaries.diff().long(), 2**32 - 1
    stride = LONGEST if longest == LONGEST else blockwise_attention.LONGEST
    first = torch.repeat_interleave(starts, lengths)
    queries = torch.arange(len(first), device=seed.device) - first
    keys = torch.arange(longest, device=seed.device)
    rows = (first + (queries & ~8))[:, None] * heads + torch.arange(heads, device=seed.device)

    def folded(bits: Tensor, by: int) -> Tensor:
        low, high = bits * (by & 0xFFFF), bits * (by >> 16)  # of 48 bits each
        upper = (low >> 16) + high
        return (upper >> 16) ^ ((upper << 16 | low & 0xFFFF) & words)

    bits = folded((rows[..., None] * stride + (keys & ~8) + seed[0]) & words, 0xED5AD4BB)
    bits = folded(bits ^ (seed[1].long() & words), 0xAC4C1B51)
    bits = torch.where((queries & 8 != 0)[:, None, None], folded(bits, 0xC2B2AE3D), bits)
    return torch.where(keys & 8 != 0, bits & 0xFFFF, bits >> 16) >= share_dropped(dropout_p) * 2**16


def exact(qkv: Tensor, bias: Tensor, boundaries: Tensor, kept: Tensor | None, dropout_p: float):
    """In float64, sequence by sequence; `kept` [T, A, longest] is dropout's mask.

    Returns:
        The output, and the logarithm of the sum of each query's softmax, [T, A].
    """
    outputs, log_sums = [], []
    biased = qkv + bias.view(qkv.shape[1:])
    for begin, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = biased[begin:end].permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        p = scores.softmax(-1)
        log_sums.append(scores.logsumexp(-1).transpose(0, 1))
        if kept is not None:
            p = p * kept[begin:end, :, : end - begin].transpose(0, 1) / (1 - share_dropped(dropout_p))
        outputs.append((p @ v).transpose(0, 1))
    return torch.cat(outputs), torch.cat(log_sums)


def exact_gradients(attention, inputs: list[Tensor], grad: Tensor, given_out: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of the inputs; as if rowsum(dO * O) were of `given_out`, if there is one.

    The gradient of scores S is P (dP - rowsum(dO * O)): what that sum is off by counts P, log sum exp S's gradient.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out, log_sums = attention(*leaves)
    off = torch.zeros_like(log_sums) if given_out is None else (grad * (given_out - out.detach())).sum(-1)
    return [out.detach(), *torch.autograd.grad((out, log_sums), leaves, (grad, -off))]


def draw(device, dtype, heads: int, size: int, lengths=LENGTHS, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Query, key and value together, their bias, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    qkv = (spread * normal(sum(lengths), 3, heads, size)).to(dtype)
    bias = 0.5 * normal(3 * heads * size)
    return [qkv, bias, normal(sum(lengths), heads, size).to(dtype)]


def attention_of(boundaries: Tensor, dropout_p: float = 0.0, apart: bool = False, longest: int = LONGEST):
    """Of query, key and value in one tensor and their bias."""

    def attention(qkv: Tensor, bias: Tensor) -> Tensor:
        heads = [part.contiguous() for part in qkv.unbind(1)] if apart else [qkv]
        return short_attention(heads, bias, boundaries, dropout_p, longest)

    return attention


def gradients(attention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with poisoned_memory():
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(
    device,
    dtype,
    heads: int = 2,
    size: int = 64,
    dropout_p: float = 0.0,
    spread: float = 1.0,
    longest: int = LONGEST,
) -> None:
    """Output and gradients, to the rounding of `dtype`, with scores that are spread by `spread` squared.

    Where one score outweighs all others, its P (dP - rowsum(dO * O)) is a difference of nearly equal numbers. Block by
    block, as in FlashAttention-2, O is there as it was rounded, and dP of the keys' gradient is of rounded values: of
    scores far apart, so is what is held to be right.
    """
    lengths = lengths_for(longest)
    *inputs, grad = draw(device, dtype, heads, size, lengths, spread)
    boundaries, kept = boundaries_of(lengths, device), None
    torch.manual_seed(5)
    found = gradients(attention_of(boundaries, dropout_p, longest=longest), inputs, grad)
    if dropout_p:
        torch.manual_seed(5)
        kept = kept_scores(boundaries, heads, dropout_seed(grad), dropout_p, longest)

    def right(*rounded: int, given_out: Tensor | None = None) -> list[Tensor]:
        """`rounded`: of which of query, key and value the kernels multiply the sum with the bias, rounded."""
        qkv, bias = (tensor.double() for tensor in inputs)
        biases, parts = bias.view(3, heads, size)[list(rounded)], qkv[:, list(rounded)]
        qkv[:, list(rounded)] = (parts + biases).to(dtype).double() - biases
        return exact_gradients(
            lambda *given: exact(*given, boundaries, kept, dropout_p), [qkv, bias], grad.double(), given_out
        )

    if longest == LONGEST:
        all_expected = right(0, 1, 2)
    elif spread == 1:
        all_expected = right(0)
    else:
        all_expected, with_values = (right(*parts, given_out=found[0].double()) for parts in ((0,), (0, 2)))
        all_expected[1][:, 1] = with_values[1][:, 1]
        all_expected[2].view(3, -1)[1] = 0  # of the key's bias, which changes no probability
    if longest > LONGEST:
        assert not found[2].view(3, -1)[1].any(), "the key's bias changes no probability"
    for name, ours, expected in zip(("output", "qkv", "bias"), found, all_expected, strict=True):
        error, eps = (ours.double() - expected).abs(), torch.finfo(dtype).eps
        assert ours.dtype == (torch.float32 if name == "bias" else dtype) and ours.shape == expected.shape
        assert error.norm() < eps * expected.norm(), f"{name}: {error.norm() / expected.norm():.1e}"
        assert error.max() < 8 * eps * expected.abs().max(), name


def check_equal_bits(device, dtype, size: int = 32, longest: int = LONGEST) -> None:
    *inputs, grad = draw(device, dtype, heads=2, size=size, lengths=lengths_for(longest))
    boundaries, results = boundaries_of(lengths_for(longest), device), []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(gradients(attention_of(boundaries, 0.1, longest=longest), inputs, grad))
    assert all(map(torch.equal, *results))


def check_nothing_behind_a_sequence_is_touched(device, dtype, size: int = 32, longest: int = LONGEST) -> None:
    """What lies there is not read, or a NaN would spread, and not written, or it would not stay one."""
    length = 71
    qkv, bias, grad = draw(device, dtype, heads=2, size=size, lengths=lengths_for(longest))
    qkv[length:], grad[length:] = float("nan"), float("nan")
    boundaries = boundaries_of([length], device)
    found = gradients(attention_of(boundaries, 0.1, longest=longest), [qkv, bias], grad)
    for tensor in found[:2]:
        assert tensor[:length].isfinite().all() and tensor[length:].isnan().all()
    assert found[2].isfinite().all()


def check_other_strides(device, dtype, longest: int = LONGEST) -> None:
    """Inputs that lie in memory in another order."""
    qkv, bias, grad = draw(device, dtype, heads=2, size=32, lengths=lengths_for(longest))
    boundaries, results = boundaries_of(lengths_for(longest), device), []
    for lay_out in (Tensor.contiguous, lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1)):
        given = [lay_out(qkv), bias]
        results.append(gradients(attention_of(boundaries, longest=longest), given, lay_out(grad)))
    assert all(map(torch.equal, *results))


def check_three_tensors(device, dtype, size: int = 32, longest: int = LONGEST) -> None:
    """Query, key and value apart are what they are together, bit by bit."""
    *inputs, grad = draw(device, dtype, heads=2, size=size, lengths=lengths_for(longest))
    boundaries, results = boundaries_of(lengths_for(longest), device), []
    for apart in (False, True):
        torch.manual_seed(5)
        results.append(gradients(attention_of(boundaries, 0.1, apart, longest), inputs, grad))
    assert all(map(torch.equal, *results))


def check_dropout_is_independent(device) -> None:
    """Shares and neighbours of the mask: within five standard errors of what independent draws have."""
    boundaries, heads, dropped = boundaries_of([LONGEST] * 16, device), 4, share_dropped(0.1)
    for first in (0, 1):
        seed = torch.tensor([123456789 + first, -987654321], dtype=torch.int32, device=device)
        kept = kept_scores(boundaries, heads, seed, 0.1).view(16, LONGEST, heads, LONGEST).transpose(1, 2).double()
        off = (kept - (1 - dropped)) / (dropped * (1 - dropped)) ** 0.5  # mean 0, variance 1
        pairs = [off, off[..., 1:, :] * off[..., :-1, :], off[..., 1:] * off[..., :-1]]
        for by in (8, 16, 64):
            pairs += [off[..., by:] * off[..., :-by], off[..., by:, :] * off[..., :-by, :]]
        pairs += [off[1:] * off[:-1], off[:, 1:] * off[:, :-1], off[..., 8:, 8:] * off[..., :-8, :-8]]
        for products in pairs:
            assert abs(float(products.mean())) < 5 / products.numel() ** 0.5
