"""The C interface of the kernels as Python calls it: packed arguments, read back by the structs of the CUDA sources."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from operand_checks import make_case, refresh_entry

from kernels import build, native

FIELDS = {  # of the struct that each function takes
    "slope_sparse_gemm": (
        *("inputs", "kept", "metadata", "bias", "adapter_inputs", "adapter_kept", "outputs"),
        *("input_stride", "kept_stride", "adapter_stride", "tokens", "out", "in", "stream"),
        *("adapter_columns", "group", "variant", "half"),
    ),
    "slope_adapter_grads": (
        *("grad_weight", "left_rows", "right_rows", "grad_left", "grad_right"),
        *("out", "in", "stream", "width", "rank", "half", "right_stride"),
    ),
    "slope_refresh": (
        *("values", "mask_bits", "forward", "metadata", "second_kept", "backward"),
        *("out", "in", "m", "backward_stride"),
    ),
    "slope_adapter_operands": (
        *("left", "right", "left_rows", "right_rows", "left_kept", "right_kept"),
        *("in", "out", "rank", "width"),
        *("left_rows_stride", "right_rows_stride", "left_kept_stride", "right_kept_stride"),
    ),
}
STRUCTS = {
    "slope_sparse_gemm": ("sparse_gemm.cuh", "Call"),
    "slope_adapter_grads": ("adapters.cu", "AdapterGradsCall"),
    "slope_refresh": ("operand_threads.cuh", "RefreshEntry"),
    "slope_adapter_operands": ("operand_threads.cuh", "AdapterOperands"),
}
SEVERAL = {"slope_refresh": ", int count, int dtype, int rechoose, void* stream",
           "slope_adapter_operands": ", int count, int dtype, void* stream"}  # fmt: skip
STREAM = 4242


def echo_source(function: str) -> str:
    """A function that notes the fields of what it is told, one struct after the other, and then its other arguments."""
    source, name = STRUCTS[function]
    struct = re.search(rf"^struct {name} \{{.*?^\}};", (build.SOURCES / source).read_text(), re.M | re.S)[0]
    struct = re.sub(r"\n\n  SLOPE_RULE.*", "\n};", struct, flags=re.S)  # without member functions
    told = "".join(f"told[n++] = (int64_t)call[i].{field};" for field in FIELDS[function])
    more = [word.split()[-1] for word in SEVERAL.get(function, "").split(",")[1:]]
    told_after = "".join(f"told[n++] = (int64_t){word};" for word in more)
    return (
        f'namespace {function}_ {{ {struct} }}\nextern "C" int {function}({function}_::{name} const* call'
        f"{SEVERAL.get(function, '')}) {{ int n = 0; for (int i = 0; i < {'count' if more else '1'}; ++i) {{ {told} }} "
        f"{told_after} return 0; }}\n"
    )


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A library whose functions note what they were told."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("echo")
    source = folder / "echo.cpp"
    source.write_text(
        "#include <cstdint>\ntypedef void* cudaStream_t;\nstatic int64_t told[64];\n"
        + "".join(map(echo_source, STRUCTS))
        + 'extern "C" int64_t const* what() { return told; }\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(folder / "echo.so")], check=True)
    library = ctypes.CDLL(str(Path(folder / "echo.so")))
    for functions in native._SIGNATURES.values():
        for name in functions.keys() & STRUCTS.keys():
            getattr(library, name).argtypes = functions[name]
    library.what.restype = ctypes.POINTER(ctypes.c_int64)
    return library


@pytest.fixture
def told(echo, monkeypatch):
    monkeypatch.setattr(native, "_function", lambda library, name: getattr(echo, name))
    monkeypatch.setattr(native, "_enter", lambda tensor: STREAM)
    return lambda function: dict(zip(FIELDS[function], echo.what()[: len(FIELDS[function])], strict=True))


def addresses(*tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_every_argument_of_a_product_arrives_in_its_field(told):
    x = torch.zeros(3, 5, 48, dtype=torch.float16)
    kept, metadata, bias = torch.zeros(32, 24, dtype=torch.float16), torch.zeros(8, dtype=torch.int32), torch.zeros(32)
    adapter_x, adapter_kept = torch.zeros(15, 16, dtype=torch.float16), torch.zeros(32, 8, dtype=torch.float16)
    y = torch.zeros(3, 5, 32, dtype=torch.float16)
    tensors = (x, kept, metadata, bias, adapter_x, adapter_kept, y)
    native.launch_sparse_mm(2, 16, *tensors)
    assert told("slope_sparse_gemm") == {
        **dict(zip(FIELDS["slope_sparse_gemm"], addresses(*tensors), strict=False)),
        **{"input_stride": 48, "kept_stride": 24, "adapter_stride": 8},
        **{"tokens": 15, "out": 32, "in": 48, "stream": STREAM},
        **{"adapter_columns": 16, "group": 16, "variant": 2, "half": 1},
    }


def test_what_is_not_there_is_null_and_rows_may_be_apart(told):
    x = torch.zeros(7, 64, dtype=torch.bfloat16)[:, :48]
    kept, metadata = torch.zeros(32, 40, dtype=torch.bfloat16)[:, 8:32], torch.zeros(8, dtype=torch.int32)
    y = torch.zeros(7, 32, dtype=torch.bfloat16)
    native.launch_sparse_mm(0, 1, x, kept, metadata, None, None, None, y)
    found = told("slope_sparse_gemm")
    absent = ("bias", "adapter_inputs", "adapter_kept", "adapter_stride", "adapter_columns", "half")
    assert [found[name] for name in absent] == [0] * 6
    assert (found["input_stride"], found["kept_stride"], found["tokens"]) == (64, 40, 7)
    adapter_x, adapter_kept = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((7, 16), (32, 24)))
    native.launch_sparse_mm(0, 1, x, kept, metadata, None, adapter_x, adapter_kept[:, 8:16], y)
    found = told("slope_sparse_gemm")
    assert (found["adapter_stride"], found["adapter_columns"]) == (24, 16)
    assert found["adapter_kept"] == adapter_kept.data_ptr() + 16


def test_every_argument_of_the_adapters_gradients_arrives_in_its_field(told):
    weight, left_rows, right_rows = (
        torch.zeros(shape, dtype=torch.float16) for shape in ((32, 48), (64, 48), (64, 32))
    )
    left, right = torch.zeros(48, 20), torch.zeros(20, 32)
    tensors = (weight, left_rows, right_rows, left, right)
    native.launch_adapter_grads(*tensors)
    assert list(told("slope_adapter_grads").values()) == [*addresses(*tensors), 32, 48, STREAM, 32, 20, 1, 32]
    apart = torch.zeros(64, 96, dtype=torch.float16)[:, 40:72]
    native.launch_adapter_grads(weight, left_rows, apart, left, right)
    assert (told("slope_adapter_grads")["right_rows"], told("slope_adapter_grads")["right_stride"]) == (
        apart.data_ptr(),
        96,
    )


def test_every_layer_of_a_refresh_arrives(told, echo):
    cases = [make_case(64, 128, 4, "random", "cpu"), make_case(128, 64, 8, "random", "cpu")]
    written = [*(torch.zeros(1) for _ in range(3)), torch.zeros(128, 96)[:, 8:72]]  # the last one's rows lie apart
    entries = [
        (cases[0].values, cases[0].mask_bits, *written[:2], None, written[3], 64, 128, 4),
        (cases[1].values, cases[1].mask_bits, *written[:3], torch.zeros(64, 64), 128, 64, 8),
    ]
    native.refresh_operands(entries, torch.float16, rechoose=True)
    given = [[*entry, stride] for entry, stride in zip(entries, (96, 64), strict=True)]
    expected = [0 if x is None else x if isinstance(x, int) else x.data_ptr() for entry in given for x in entry]
    assert echo.what()[: len(expected) + 4] == [*expected, 2, 1, 1, STREAM]
    assert native._REFRESH_ENTRY.pack(*expected[:10]) == refresh_entry(*entries[0])


def test_the_adapters_of_every_layer_arrive(told, echo):
    layers = []
    for columns, out, rank, width in ((48, 32, 20, 32), (16, 64, 4, 16)):
        shapes = ((columns, rank), (rank, out), (2 * width, columns), (2 * width, out), (columns, width), (out, width))
        layers.append([torch.zeros(shape) for shape in shapes])
    layers[1][2:] = [torch.zeros(len(x), x.shape[1] + 8 * i)[:, : x.shape[1]] for i, x in enumerate(layers[1][2:], 1)]
    native.refresh_adapters(layers, torch.bfloat16)
    expected = [*addresses(*layers[0]), 48, 32, 20, 32, 48, 32, 32, 32]
    expected += [*addresses(*layers[1]), 16, 64, 4, 16, 24, 80, 40, 48]
    assert echo.what()[: len(expected) + 3] == [*expected, 2, 0, STREAM]
