"""`kernels.dense_parts.kept_by_dropout` in Triton, for kernels that draw dropout's mask themselves."""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

from kernels.build import KernelsUnavailable

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise KernelsUnavailable(f"no Triton ({error}): it comes with every CUDA build of torch for Linux") from error


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
