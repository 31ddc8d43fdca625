"""What kernels/operands.cu must compute, held against kernels/layout.py and sparse_ops: shared by CPU and GPU tests."""

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import layout
from sparse_ops import N, double_prune_mask, nm_mask, pack_bits, unpack_bits

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIZES = [_SIZE, _SIZE, _INT]  # out, in, m
_FUNCTIONS = {
    "slope_forward_metadata": [_POINTER] * 2 + _SIZES,
    "slope_refresh": [ctypes.c_char_p, _INT, _INT, _INT],
    "slope_second_bits": [_POINTER] * 4 + _SIZES,
    "slope_set_second": [_POINTER] * 4 + _SIZES,
    "slope_gather": [_POINTER, _SIZE, _POINTER, _POINTER] + _SIZES + [_INT, _INT],
}
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SIZES = [(64, 64), (128, 192), (192, 128), (16, 48), (48, 16), (320, 80)]


class OperandLibrary:
    """The C interface of operands.cu, on tensors of one device."""

    def __init__(self, path: Path, device: str):
        self.device = torch.device(device)
        self.library = ctypes.CDLL(str(path))
        for name, types in _FUNCTIONS.items():
            getattr(self.library, name).argtypes = [*types, _POINTER]

    def code(self, name: str, *arguments) -> int:
        """The error code of `slope_<name>`; a tensor stands for its address, None for null."""
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else None
        plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        return getattr(self.library, f"slope_{name}")(*plain, stream)

    def call(self, name: str, *arguments) -> None:
        code = self.code(name, *arguments)
        assert code == 0, f"slope_{name} gave error {code}"


@dataclass
class Case:
    """One layer: `weight` is W^R [out, in], `index` the places of its values."""

    out: int
    inp: int
    m: int
    mask: Tensor
    mask_bits: Tensor
    index: Tensor
    values: Tensor
    chosen: Tensor | None = None
    """An earlier choice of W^{R,C}."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.out, self.inp, self.m

    @property
    def weight(self) -> Tensor:
        weight = torch.zeros(self.out, self.inp, device=self.values.device)
        weight.view(-1)[self.index] = self.values.flatten()
        return weight

    @property
    def second(self) -> Tensor:
        return double_prune_mask(self.weight, self.mask, N, self.m, dim=0)


def draw_values(shape: tuple[int, int], kind: str, generator: torch.Generator) -> Tensor:
    """`random`: all different; `ties`: small whole numbers; `zeros`: mostly 0, of either sign."""
    if kind == "random":
        return torch.randn(shape, generator=generator)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.2)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, values, -values)


def make_case(out: int, inp: int, m: int, kind: str, device, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    mask = nm_mask(torch.rand(out, inp, generator=generator), N, m, dim=1)
    if kind == "zeros":  # columns that keep many of their neighbours, and none
        mask = nm_mask((torch.arange(inp) * 7 % 5).expand(out, inp).float(), N, m, dim=1)
    values = draw_values((out, inp * N // m), kind, generator)
    index = mask.flatten().nonzero().flatten()
    return Case(out, inp, m, *(x.to(device) for x in (mask, pack_bits(mask), index, values)))


def sizes_for(m: int) -> list[tuple[int, int]]:
    fitting = [(out, inp) for out, inp in SIZES if out % m == 0 and inp % m == 0]
    return fitting if m < 64 else [(m, 2 * m), (3 * m, m)]


GUARD = 256  # bytes of poison on either side


def poisoned(*shape: int, dtype: torch.dtype, device) -> Tensor:
    """Memory full of ones, NaN to a float, between two guards that `assert_same_bits` looks at."""
    size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    flat = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=device)
    return flat[GUARD : GUARD + size].view(dtype).view(shape)


def assert_same_bits(found: Tensor, expected: Tensor, name: str) -> None:
    """Equal to the last bit (NaN equals itself, and 0 is not -0), and nothing written beside it."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    as_ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    wrong = found.contiguous().view(as_ints) != expected.contiguous().view(as_ints)
    places = wrong.nonzero().tolist()
    assert not places, f"{name}: {len(places)} of {wrong.numel()} differ, first at {places[0]}"
    storage = torch.empty(0, dtype=torch.uint8, device=found.device).set_(found.untyped_storage())
    begin, size = found.storage_offset() * found.element_size(), found.numel() * found.element_size()
    for guard in (storage[:begin], storage[begin + size :]):
        assert (guard == 0xFF).all(), f"{name}: memory beside it was written"


class Operands:
    """Output arrays of one layer, poisoned."""

    def __init__(self, case: Case, dtype: torch.dtype, device):
        def words(rows: int, cols: int) -> Tensor:
            return poisoned(*layout.metadata_shape(rows, cols), dtype=torch.int32, device=device)

        self.forward = poisoned(case.out, case.inp // 2, dtype=dtype, device=device)
        self.forward_metadata = words(case.out, case.inp)
        self.backward = poisoned(case.inp, case.out // 2, dtype=dtype, device=device)
        self.metadata = words(case.inp, case.out)
        self.second_kept = None if case.m == 4 else words(case.inp, case.out)

    def entry(self, case: Case, forward: bool = True) -> bytes:
        """The layer as slope_refresh takes it."""
        written = (self.forward if forward else None, self.metadata, self.second_kept, self.backward)
        return refresh_entry(case.values, case.mask_bits, *written, *case.sizes)

    def refresh(self, library: OperandLibrary, case: Case, rechoose: bool, forward: bool = True) -> None:
        library.call("refresh", self.entry(case, forward), 1, DTYPES[self.backward.dtype], int(rechoose))


def refresh_entry(*arguments) -> bytes:
    """slope::RefreshEntry: six tensors, or None for null, and out, in, m."""
    addresses = (0 if x is None else x.data_ptr() for x in arguments[:6])
    return struct.pack("6P2q2i", *addresses, *arguments[6:], arguments[5].stride(0))


def check_rows_apart(library: OperandLibrary, case: Case, dtype: torch.dtype = torch.bfloat16) -> None:
    """The backward operand as some columns of a wider matrix, of which nothing else is written."""
    packed, apart = Operands(case, dtype, library.device), Operands(case, dtype, library.device)
    wide = poisoned(case.inp, case.out // 2 + 24, dtype=dtype, device=library.device)
    apart.backward = wide[:, 8 : 8 + case.out // 2]
    for each in (packed, apart):
        each.refresh(library, case, rechoose=True)
    assert torch.equal(apart.backward, packed.backward) and torch.equal(apart.metadata, packed.metadata)
    around = torch.cat([wide[:, :8], wide[:, -16:]], 1).contiguous()
    assert (around.view(torch.uint8) == 0xFF).all()


def check_refresh_of_many(library: OperandLibrary, dtype: torch.dtype = torch.bfloat16) -> None:
    """More layers than a launch holds, of several sizes and patterns: each as if it were alone."""
    shapes = [(64, 64, 4), (128, 192, 8), (192, 128, 4), (128, 256, 128), (320, 80, 16), (48, 16, 4)] * 20
    cases = [make_case(*shape, "random", library.device, seed) for seed, shape in enumerate(shapes)]
    operands = [Operands(case, dtype, library.device) for case in cases]
    for rechoose in (True, False):
        if not rechoose:
            for case in cases:
                case.chosen = case.second
                case.values.mul_(torch.linspace(1, 2, case.values.numel(), device=library.device).view_as(case.values))
        packed = b"".join(each.entry(case) for each, case in zip(operands, cases, strict=True))
        library.call("refresh", packed, len(cases), DTYPES[dtype], int(rechoose))
        for each, case in zip(operands, cases, strict=True):
            _check_operands(each, case, case.second if rechoose else case.chosen, dtype)


def check_forward_metadata(library: OperandLibrary, case: Case) -> None:
    operands = Operands(case, torch.bfloat16, library.device)
    library.call("forward_metadata", case.mask_bits, operands.forward_metadata, *case.sizes)
    assert_same_bits(operands.forward_metadata, layout.fragment_metadata(case.mask), "forward metadata")


def check_refresh(library: OperandLibrary, case: Case, dtype: torch.dtype = torch.bfloat16) -> Operands:
    """Operands chosen anew, against both references."""
    operands = Operands(case, dtype, library.device)
    operands.refresh(library, case, rechoose=True)
    _check_operands(operands, case, case.second, dtype)
    return operands


def _check_operands(operands: Operands, case: Case, second: Tensor, dtype: torch.dtype) -> None:
    weight = case.weight.to(dtype)
    forward, metadata = layout.compress(weight, case.mask)
    assert_same_bits(operands.forward, forward, "forward operand")
    assert_same_bits(layout.expand(operands.forward, metadata, case.out, case.inp), weight, "W^R")
    backward, metadata = layout.backward_operand(weight, case.mask, second)
    assert_same_bits(operands.backward, backward, "backward operand")
    assert_same_bits(operands.metadata, metadata, "backward metadata")
    transposed = layout.expand(operands.backward, operands.metadata, case.inp, case.out)
    assert_same_bits(transposed, torch.where(second, weight, 0).t(), "W^{R,C} transposed")
    if case.m != 4:
        assert_same_bits(operands.second_kept, layout.second_kept_words(second), "second_kept")


def check_reuse(library: OperandLibrary, case: Case, dtype: torch.dtype = torch.bfloat16) -> None:
    """New values on the old choice: what the second pruning dropped stays dropped, whatever the values."""
    operands, second = check_refresh(library, case, dtype), case.second
    case.values = draw_values(case.values.shape, "random", torch.Generator().manual_seed(99)).to(library.device)
    for entries in (operands.forward, operands.backward):
        entries.fill_(float("nan"))
    operands.refresh(library, case, rechoose=False)
    _check_operands(operands, case, second, dtype)


def check_without_forward(library: OperandLibrary, case: Case) -> None:
    """A null forward operand is not written, and changes nothing else."""
    operands = Operands(case, torch.bfloat16, library.device)
    operands.refresh(library, case, rechoose=True, forward=False)
    assert operands.forward.isnan().all()
    full = check_refresh(library, case)
    assert_same_bits(operands.backward, full.backward, "backward operand")
    assert_same_bits(operands.metadata, full.metadata, "backward metadata")


def check_second_bits(library: OperandLibrary, case: Case) -> None:
    """The choice leaves as one bit a value, and comes back."""
    operands, device = check_refresh(library, case), library.device
    expected = pack_bits(case.second.flatten()[case.index])
    bits = poisoned(expected.numel(), dtype=torch.uint8, device=device)
    library.call("second_bits", operands.metadata, operands.second_kept, case.mask_bits, bits, *case.sizes)
    assert_same_bits(bits, expected, "second bits")
    restored = Operands(case, torch.bfloat16, device)
    library.call("set_second", bits, case.mask_bits, restored.metadata, restored.second_kept, *case.sizes)
    assert_same_bits(restored.metadata, operands.metadata, "restored metadata")
    if case.m != 4:
        assert_same_bits(restored.second_kept, operands.second_kept, "restored second_kept")


def check_gather(library: OperandLibrary, case: Case, dtype: torch.dtype, accumulate: bool, slack: int = 0) -> None:
    """`slack`: elements between two rows of the gradient."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(case.out, case.inp + slack, generator=generator).to(library.device, dtype)
    gradient = wide[:, : case.inp]
    old = torch.randn(case.values.shape, generator=generator).to(library.device)
    found = poisoned(*case.values.shape, dtype=torch.float32, device=library.device)
    if accumulate:
        found.copy_(old)
    library.call("gather", gradient, wide.stride(0), case.mask_bits, found, *case.sizes, DTYPES[dtype], int(accumulate))
    mask = unpack_bits(case.mask_bits, (case.out, case.inp))
    expected = gradient[mask].float().view(case.values.shape)
    assert_same_bits(found, expected + old if accumulate else expected, "gathered gradient")
