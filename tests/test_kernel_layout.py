"""The formats of kernels/layout.py, and the kernels' own code, run on the host thread by thread, against them."""

import shutil
import subprocess

import pytest
import torch
from operand_checks import (
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
    sizes_for,
)
from pretraining_runs import ROOT
from product_checks import check_adapter_slices

from kernels import layout, native
from sparse_ops import nm_mask

KINDS = ("random", "ties", "zeros")
PATTERNS = (4, 8, 16, 32, 64, 128)
CASES = [(out, inp, m, kind) for m in PATTERNS for out, inp in sizes_for(m) for kind in KINDS]


# -------------------------------------------------------------------------------------------------------- layout alone
def word_by_hand(mask, kb: int, mb: int, t: int) -> int:
    """One metadata word of a 2:4 mask, as the head of layout.py words it."""
    word = 0
    for half in range(2):
        row = mb * 64 + t // 32 * 16 + t % 32 // 4 + 8 * half
        for group in range(4):
            first = kb * 64 + t % 4 * 16 + 4 * group
            nibble = 0x4
            if row < mask.shape[0] and first < mask.shape[1]:
                low, high = (k for k in range(4) if mask[row, first + k])
                nibble = low | high << 2
            word |= nibble << (16 * half + 4 * group)
    return word


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (16, 48), (272, 80)])
def test_metadata_is_in_fragment_order(rows, cols):
    mask = nm_mask(torch.rand(rows, cols), 2, 4, dim=1)
    metadata = layout.fragment_metadata(mask)
    assert metadata.shape == layout.metadata_shape(rows, cols) == (-(-cols // 64), -(-rows // 256) * 4, 128)
    for kb, mb, t in torch.cartesian_prod(*(torch.arange(size) for size in metadata.shape)).tolist()[::5]:
        assert int(metadata[kb, mb, t]) & 0xFFFFFFFF == word_by_hand(mask, kb, mb, t)


@pytest.mark.parametrize("m", [4, 8, 16])
def test_expand_undoes_compress(m):
    mask = nm_mask(torch.rand(80, 48), 2, m, dim=1)
    weight = torch.randn(80, 48)
    kept, metadata = layout.compress(weight, mask)
    assert kept.shape == (80, 24)
    assert torch.equal(layout.expand(kept, metadata, 80, 48), torch.where(mask, weight, 0))
    if m == 4:
        assert torch.equal(kept.flatten(), weight[mask])


def test_free_positions_are_pruned_ones_first():
    kept = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    first = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    pairs = layout.complete_pairs(kept, first).long().view(4, 4).tolist()
    assert pairs == [[0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]


def test_three_of_a_group_are_refused():
    mask = torch.ones(16, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="at most 2 of every 4"):
        layout.compress(torch.ones(16, 16), mask)


# ------------------------------------------------------------------------------------------------- the kernels' threads
@pytest.fixture(scope="module")
def library(tmp_path_factory) -> OperandLibrary:
    """The threads of kernels/operands.cu, and of adapters.cu's operands, compiled for this host."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, and this machine has none")
    path = tmp_path_factory.mktemp("host") / "operands.so"
    source = ROOT / "tests" / "operand_rules_host.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{ROOT / 'kernels'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True)
    return OperandLibrary(path, "cpu")


@pytest.mark.parametrize(("out", "inp", "m", "kind"), CASES)
def test_threads_make_the_operands(library, out, inp, m, kind):
    case = make_case(out, inp, m, kind, "cpu")
    check_forward_metadata(library, case)
    check_refresh(library, case)


def test_many_layers_are_refreshed_together(library):
    check_refresh_of_many(library)


@pytest.mark.parametrize(("out", "inp", "m", "kind"), CASES)
def test_the_backward_operands_rows_may_lie_apart(library, out, inp, m, kind):
    check_rows_apart(library, make_case(out, inp, m, kind, "cpu"))


@pytest.mark.parametrize(("out", "inp", "m", "kind"), CASES)
def test_threads_keep_a_choice(library, out, inp, m, kind):
    check_reuse(library, make_case(out, inp, m, kind, "cpu"))


@pytest.mark.parametrize(("out", "inp", "m", "kind"), CASES)
def test_a_choice_leaves_and_returns(library, out, inp, m, kind):
    check_second_bits(library, make_case(out, inp, m, kind, "cpu"))


@pytest.mark.parametrize("m", PATTERNS)
def test_a_forward_operand_is_optional(library, m):
    check_without_forward(library, make_case(*sizes_for(m)[1], m, "random", "cpu"))


def test_threads_make_the_operands_of_adapters_and_nothing_beside_them(library, monkeypatch):
    host = library.library.slope_adapter_operands
    host.argtypes = native._SIGNATURES["adapters"]["slope_adapter_operands"]
    monkeypatch.setattr(native, "_function", lambda *_: host)
    monkeypatch.setattr(native, "_enter", lambda tensor: None)
    check_adapter_slices("cpu", torch.bfloat16)


@pytest.mark.parametrize("slack", [0, 8, 3])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "inp", "m"), sorted({case[:3] for case in CASES}))
def test_threads_gather_the_gradient(library, out, inp, m, dtype, accumulate, slack):
    check_gather(library, make_case(out, inp, m, "random", "cpu"), dtype, accumulate, slack)


def test_not_a_number_is_chosen_and_stays_visible(library):
    """A diverged weight must reach the products, and a group keeps two all the same."""
    case = make_case(64, 64, 4, "random", "cpu")
    case.values[::3, ::5] = float("nan")
    operands = Operands(case, torch.bfloat16, "cpu")
    operands.refresh(library, case, rechoose=True)
    pairs = layout.metadata_pairs(operands.metadata, case.inp, case.out)
    assert (pairs.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    seen = layout.expand(operands.backward, operands.metadata, case.inp, case.out).isnan()
    per_group = case.weight.t().isnan().unflatten(-1, (-1, 4)).sum(-1).clamp(max=2)
    assert torch.equal(seen.unflatten(-1, (-1, 4)).sum(-1), per_group)
