"""What several kernels in Triton share: a reciprocal, dropout's mask, LayerNorm's gradient, sums of shares."""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

import torch
from torch import Tensor

from kernels.build import KernelsUnavailable

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise KernelsUnavailable(f"no Triton ({error}): it comes with every CUDA build of torch for Linux") from error


if triton.knobs.runtime.interpret:  # Triton's interpreter knows no assembler

    @triton.jit
    def reciprocal(x):
        return 1 / x

else:

    @triton.jit
    def reciprocal(x):
        """1 / x, fp32, to the last bit; 0 for x above 2^126. On sm_90 a quotient takes seven instructions more."""
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


def settings(probability: float) -> tuple[int, float]:
    """What an element's bits must reach to be kept, and what it is then multiplied by."""
    return round(probability * 2**24), 1 / (1 - probability)


@triton.jit
def _shifted_xor(bits, BY: tl.constexpr):
    return bits ^ (bits >> BY)


@triton.jit
def kept_by_dropout(numbers, seed, threshold):
    """Which elements dropout keeps, by their numbers; `seed` points to its two words."""
    bits = (numbers + tl.load(seed)).to(tl.uint32, bitcast=True)
    bits = _shifted_xor(bits, 17) * 0xED5AD4BB
    bits = bits ^ tl.load(seed + 1).to(tl.uint32, bitcast=True)
    bits = _shifted_xor(bits, 11) * 0xAC4C1B51
    bits = _shifted_xor(bits, 15) * 0x31848BAB
    return (_shifted_xor(bits, 14) & 0xFFFFFF) >= threshold


@triton.jit
def norm_backward(grad, total, mean, inverse_deviation, weight, HIDDEN: tl.constexpr):
    """Gradients of what LayerNorm normalised, `total`, and that normalised; rows of HIDDEN numbers and zeros."""
    normalised = (total - mean) * inverse_deviation
    scaled = grad * weight
    projected = normalised * (tl.sum(scaled * normalised, 1) / HIDDEN)[:, None]
    return (scaled - (tl.sum(scaled, 1) / HIDDEN)[:, None] - projected) * inverse_deviation, normalised


@triton.jit
def _sum_shares(shares, total, programs, columns_in_all, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < columns_in_all
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        places = rows[:, None].to(tl.int64) * columns_in_all + columns[None, :]
        added += tl.load(shares + places, mask=(rows < programs)[:, None] & inside[None, :], other=0.0)
    tl.store(total + columns, tl.sum(added, 0), mask=inside)


def sum_of_shares(shares: Tensor) -> Tensor:
    """Over the first dimension, fp32 [programs, ...], contiguous, in a fixed order."""
    total = shares.new_empty(shares.shape[1:])
    columns, rows = 16, 256  # few turns, each of which waits for memory, and programs for all multiprocessors
    programs = (triton.cdiv(total.numel(), columns),)
    with torch.cuda.device_of(shares):
        _sum_shares[programs](shares, total, len(shares), total.numel(), columns, rows, num_warps=8)
    return total
