"""kernels/long_attention.py in Triton's interpreter."""
import pytest, torch
from attention_checks import boundaries_of, draw, exact, gradients
from kernels import long_attention as la
from kernels.dense_parts import dropout_seed
from kernels.short_attention import share_dropped

LENGTHS = (256, 0, 1, 71, 200, 64, 129, 0)


def kept_scores(boundaries, heads, seed, dropout_p, longest):
    starts, lengths, words = boundaries[:-1].long(), boundaries.diff().long(), 2**32 - 1
    first = torch.repeat_interleave(starts, lengths)
    queries = torch.arange(len(first), device=seed.device) - first
    keys = torch.arange(longest, device=seed.device)
    rows = (first + (queries & -9))[:, None] * heads + torch.arange(heads, device=seed.device)

    def folded(bits, by):
        low, high = bits * (by & 0xFFFF), bits * (by >> 16)
        upper = (low >> 16) + high
        return (upper >> 16) ^ ((upper << 16 | low & 0xFFFF) & words)

    bits = folded((rows[..., None] * longest + (keys & -9) + seed[0]) & words, 0xED5AD4BB)
    bits = folded(bits ^ (seed[1].long() & words), 0xAC4C1B51)
    bits = torch.where((queries & 8 != 0)[:, None, None], folded(bits, 0xC2B2AE3D), bits)
    return torch.where(keys & 8 != 0, bits & 0xFFFF, bits >> 16) >= share_dropped(dropout_p) * 2**16


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("heads", "size", "together"), [(1, 64, True), (2, 32, False)])
def test_exact(heads, size, dropout_p, together):
    dtype, device, longest = torch.float16, "cpu", 256
    qkv, bias, grad = draw(device, dtype, heads, size, LENGTHS)
    boundaries, kept = boundaries_of(LENGTHS, device), None

    def attention(qkv, bias):
        parts = [qkv] if together else [p.contiguous() for p in qkv.unbind(1)]
        return la.long_attention(parts, bias, boundaries, longest, dropout_p)

    torch.manual_seed(5)
    found = gradients(attention, [qkv, bias], grad)
    if dropout_p:
        torch.manual_seed(5)
        kept = kept_scores(boundaries, heads, dropout_seed(grad), dropout_p, longest)
    doubles = [qkv.double(), bias.double()]
    b = doubles[1].view(3, heads, size)[:1]
    doubles[0][:, :1] = (doubles[0][:, :1] + b).to(dtype).double() - b  # the kernels multiply the sum, rounded
    right = gradients(lambda *given: exact(*given, boundaries, kept, dropout_p), doubles, grad.double())
    for name, ours, expected in zip(("output", "qkv", "bias"), found, right, strict=True):
        error, eps = (ours.double() - expected).abs(), torch.finfo(dtype).eps
        print(name, (error.norm() / expected.norm() / eps).item(), (error.max() / expected.abs().max() / eps).item())
        assert error.norm() < eps * expected.norm(), f"{name}: {error.norm() / expected.norm():.1e}"
        assert error.max() < 8 * eps * expected.abs().max(), name
