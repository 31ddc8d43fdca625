"""The operand kernels on a GPU, against kernels/layout.py and sparse_ops, and how near they come to its memory's speed.

    python tests/test_gpu_operands.py       # the same without pytest: prints every result

Skipped, with the reason, where there is no GPU that can run them or no way to compile them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import pytest
import torch
from operand_checks import (
    DTYPES,
    Case,
    OperandLibrary,
    Operands,
    check_forward_metadata,
    check_gather,
    check_refresh,
    check_refresh_of_many,
    check_reuse,
    check_rows_apart,
    check_second_bits,
    check_without_forward,
    make_case,
    refresh_entry,
    sizes_for,
)

from kernels import build

pytestmark = pytest.mark.gpu
KINDS = ("random", "ties", "zeros")
PATTERNS = (4, 8, 16, 32, 64, 128)
LARGE = [(1024, 4096, m) for m in (4, 8, 16)]  # and BERT-Large's other layers where speed is measured
CASES = [(out, inp, m) for m in PATTERNS for out, inp in sizes_for(m)] + LARGE
BERT_LARGE = [(1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)]
HALF_DTYPES = (torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why this machine cannot run the kernels."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and this machine has none"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"needs a Hopper GPU, and this is {torch.cuda.get_device_name()}"
    try:
        build.library("operands")
    except build.KernelsUnavailable as reason:
        return str(reason)
    return None


@pytest.fixture(scope="module")
def library() -> OperandLibrary:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return OperandLibrary(build.library("operands"), "cuda")


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("out", "inp", "m"), CASES)
def test_operands(library, out, inp, m, dtype):
    for kind in KINDS:
        case = make_case(out, inp, m, kind, "cuda")
        check_forward_metadata(library, case)
        check_refresh(library, case, dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_many_layers_are_refreshed_together(library, dtype):
    check_refresh_of_many(library, dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("out", "inp", "m"), CASES)
def test_the_backward_operands_rows_may_lie_apart(library, out, inp, m, dtype):
    check_rows_apart(library, make_case(out, inp, m, "random", "cuda"), dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("out", "inp", "m"), CASES)
def test_operands_of_an_old_choice(library, out, inp, m, dtype):
    for kind in KINDS:
        check_reuse(library, make_case(out, inp, m, kind, "cuda"), dtype)


@pytest.mark.parametrize(("out", "inp", "m"), CASES)
def test_a_choice_leaves_and_returns(library, out, inp, m):
    for kind in KINDS:
        check_second_bits(library, make_case(out, inp, m, kind, "cuda"))


@pytest.mark.parametrize(("out", "inp", "m"), CASES)
def test_a_forward_operand_is_optional(library, out, inp, m):
    check_without_forward(library, make_case(out, inp, m, "random", "cuda"))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("out", "inp", "m"), CASES)
def test_gradient_is_gathered(library, out, inp, m, dtype):
    case = make_case(out, inp, m, "random", "cuda")
    for accumulate in (False, True):
        for slack in (0, 8, 3):
            check_gather(library, case, dtype, accumulate, slack)


def test_sizes_that_no_kernel_takes_are_refused(library):
    case = make_case(64, 64, 4, "random", "cuda")
    operands = Operands(case, torch.bfloat16, "cuda")
    outputs = (None, operands.metadata, None, operands.backward)
    for out, inp, m, dtype in [(64, 8, 4, 0), (64, 64, 12, 0), (64, 48, 32, 0), (64, 64, 8, 0), (64, 64, 4, 2)]:
        entry = refresh_entry(case.values, case.mask_bits, *outputs, out, inp, m)
        assert library.code("refresh", entry, 1, dtype, 1) == 1
    assert library.code("gather", case.values, 32, case.mask_bits, case.values, 64, 64, 4, 2, 0) == 1  # stride < in
    narrow = operands.backward.as_strided((64, 32), (24, 1))  # rows that overlap
    entry = refresh_entry(case.values, case.mask_bits, None, operands.metadata, None, narrow, 64, 64, 4)
    assert library.code("refresh", entry, 1, 0, 1) == 1
    torch.cuda.synchronize()


def test_a_captured_graph_reads_new_values(library):
    case = make_case(128, 192, 4, "random", "cuda")
    operands = Operands(case, torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    operands.refresh(library, case, rechoose=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        operands.refresh(library, case, rechoose=True)
    case.values.copy_(torch.randn(case.values.shape))
    operands.backward.fill_(float("nan"))
    graph.replay()
    assert torch.equal(operands.backward, check_refresh(library, case).backward)


# -------------------------------------------------------------------------------------------------------------- speed
def microseconds(launches) -> float:
    """Time of one of the `launches`, replayed as one CUDA graph: the median of several replays."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return sorted(times)[len(times) // 2]


def copies(out: int, inp: int, m: int) -> list[Case]:
    """As many layers as do not fit the L2 cache together, with the same content."""
    case, count = make_case(out, inp, m, "random", "cuda"), max(4, 2**28 // (out * inp * 4))
    return [replace(case, mask_bits=case.mask_bits.clone(), values=case.values.clone()) for _ in range(count)]


def refresh_speed(library: OperandLibrary, out: int, inp: int, m: int, rechoose: bool, together: bool = False) -> str:
    cases = copies(out, inp, m)
    arrays = [Operands(case, torch.bfloat16, "cuda") for case in cases]
    for case, operands in zip(cases, arrays, strict=True):
        operands.refresh(library, case, rechoose=True)
    pairs = list(zip(cases, arrays, strict=True))
    if together:
        packed = b"".join(operands.entry(case) for case, operands in pairs)
        time = microseconds([lambda: library.call("refresh", packed, len(pairs), 0, int(rechoose))]) / len(pairs)
    else:
        time = microseconds([lambda c=c, o=o: o.refresh(library, c, rechoose) for c, o in pairs])
    index_bytes = out * inp * (0.125 if m == 4 else 0.25)  # metadata, and second_kept for M > 4
    size = cases[0].values.numel() * 4 + out * inp * 2 + out * inp / 8 + index_bytes
    kind = f"{'chosen anew' if rechoose else 'old choice '}{', together' if together else ''}"
    return f"refresh {out} x {inp} 2:{m} {kind}: {time:7.2f} us, {size / time / 1e3:6.0f} GB/s"


def gather_speed(library: OperandLibrary, out: int, inp: int, m: int, dtype: torch.dtype, accumulate: bool) -> str:
    cases = copies(out, inp, m)
    gradients = [torch.randn(out, inp, device="cuda").to(dtype) for _ in cases]
    found = [torch.zeros_like(case.values) for case in cases]

    def launch(case: Case, gradient: torch.Tensor, to: torch.Tensor):
        library.call("gather", gradient, inp, case.mask_bits, to, *case.sizes, DTYPES[dtype], int(accumulate))

    triples = zip(cases, gradients, found, strict=True)
    time = microseconds([lambda c=c, g=g, t=t: launch(c, g, t) for c, g, t in triples])
    size = out * inp * (gradients[0].element_size() + 0.125) + found[0].numel() * 4 * (2 if accumulate else 1)
    kind = "added  " if accumulate else "written"
    return f"gather  {out} x {inp} 2:{m} {str(dtype)[6:]} {kind}: {time:7.2f} us, {size / time / 1e3:6.0f} GB/s"


def copy_speed() -> str:
    """What a plain copy of the same memory reaches: the measure for the others."""
    source = [torch.randn(2**22, device="cuda") for _ in range(16)]
    to = [torch.empty_like(x) for x in source]
    time = microseconds([lambda s=s, t=t: t.copy_(s) for s, t in zip(source, to, strict=True)])
    return f"copy of 16 MiB: {time:7.2f} us, {2 * 2**24 / time / 1e3:6.0f} GB/s"


def speeds(library: OperandLibrary):
    """One line a measurement."""
    yield copy_speed()
    for out, inp in BERT_LARGE:
        yield refresh_speed(library, out, inp, 4, rechoose=True)
        yield refresh_speed(library, out, inp, 4, rechoose=True, together=True)
        yield refresh_speed(library, out, inp, 4, rechoose=False)
        yield gather_speed(library, out, inp, 4, torch.bfloat16, accumulate=False)
        yield gather_speed(library, out, inp, 4, torch.bfloat16, accumulate=True)
    for m in (8, 16):
        yield refresh_speed(library, 4096, 1024, m, rechoose=True)
        yield refresh_speed(library, 4096, 1024, m, rechoose=False)
        yield gather_speed(library, 4096, 1024, m, torch.bfloat16, accumulate=False)
    yield gather_speed(library, 4096, 1024, 4, torch.float32, accumulate=False)


@pytest.mark.slow
def test_speed_is_printed(library, capsys):
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, CUDA graphs of many layers, median of 25 replays")
        for line in speeds(library):
            print(line, flush=True)


# --------------------------------------------------------------------------------------------------------- standalone
def run_everything() -> int:
    """Every check above, one line each; the number of failures."""
    reason = unavailable()
    if reason is not None:
        print(f"cannot run: {reason}")
        return 1
    library = OperandLibrary(build.library("operands"), "cuda")
    failures = 0

    def attempt(name: str, check, *arguments) -> None:
        nonlocal failures
        try:
            check(*arguments)
            print(f"ok    {name}", flush=True)
        except AssertionError as error:
            failures += 1
            print(f"WRONG {name}: {error}", flush=True)

    for out, inp, m in CASES:
        size = f"{out} x {inp} 2:{m}"
        for dtype in HALF_DTYPES:
            name = f"{size} {str(dtype)[6:]}"
            attempt(f"operands   {name}", test_operands, library, out, inp, m, dtype)
            attempt(f"old choice {name}", test_operands_of_an_old_choice, library, out, inp, m, dtype)
        attempt(f"bits       {size}", test_a_choice_leaves_and_returns, library, out, inp, m)
        attempt(f"no forward {size}", test_a_forward_operand_is_optional, library, out, inp, m)
        for dtype in DTYPES:
            attempt(f"gather     {size} {str(dtype)[6:]}", test_gradient_is_gathered, library, out, inp, m, dtype)
    attempt("refusals", test_sizes_that_no_kernel_takes_are_refused, library)
    attempt("CUDA graph", test_a_captured_graph_reads_new_values, library)
    print(f"{failures} wrong", flush=True)
    for line in speeds(library):
        print(line, flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(run_everything(), 1))
