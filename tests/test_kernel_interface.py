"""The C interface of the 2:4 GEMM as Python calls it: packed arguments, read back by the struct of the CUDA source."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import build, native

FIELDS = (
    *("inputs", "kept", "metadata", "bias", "adapter_inputs", "adapter_kept", "outputs"),
    *("input_stride", "tokens", "out", "in", "stream", "adapter_columns", "group", "variant", "half"),
)
STREAM = 4242


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A library whose slope_sparse_gemm says what it was told."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    struct = re.search(r"^struct Call \{.*?^\};", (build.SOURCES / "sparse_gemm.cuh").read_text(), re.M | re.S)
    folder = tmp_path_factory.mktemp("echo")
    source = folder / "echo.cpp"
    told = "".join(f"told[{i}] = (int64_t)call->{name};" for i, name in enumerate(FIELDS))
    source.write_text(
        f"#include <cstdint>\ntypedef void* cudaStream_t;\n{struct[0]}\nstatic int64_t told[{len(FIELDS)}];\n"
        f'extern "C" int slope_sparse_gemm(Call const* call) {{ {told} return 0; }}\n'
        'extern "C" int64_t const* what() { return told; }\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(folder / "echo.so")], check=True)
    library = ctypes.CDLL(str(Path(folder / "echo.so")))
    library.slope_sparse_gemm.argtypes = (ctypes.c_char_p,)
    library.what.restype = ctypes.POINTER(ctypes.c_int64)
    return library


def call(echo, monkeypatch, *arguments) -> dict[str, int]:
    monkeypatch.setattr(native, "_function", lambda library, name: getattr(echo, name))
    monkeypatch.setattr(native, "_enter", lambda tensor: STREAM)
    native.launch_sparse_mm(*arguments)
    return dict(zip(FIELDS, echo.what()[: len(FIELDS)], strict=True))


def test_every_argument_arrives_in_its_field(echo, monkeypatch):
    x = torch.zeros(3, 5, 48, dtype=torch.float16)
    kept, metadata, bias = torch.zeros(32, 24, dtype=torch.float16), torch.zeros(8, dtype=torch.int32), torch.zeros(32)
    adapter_x, adapter_kept = torch.zeros(15, 16, dtype=torch.float16), torch.zeros(32, 8, dtype=torch.float16)
    y = torch.zeros(3, 5, 32, dtype=torch.float16)
    told = call(echo, monkeypatch, 2, 16, x, kept, metadata, bias, adapter_x, adapter_kept, y)
    tensors = (x, kept, metadata, bias, adapter_x, adapter_kept, y)
    assert told == {
        **dict(zip(FIELDS, (tensor.data_ptr() for tensor in tensors), strict=False)),
        **{"input_stride": 48, "tokens": 15, "out": 32, "in": 48, "stream": STREAM},
        **{"adapter_columns": 16, "group": 16, "variant": 2, "half": 1},
    }


def test_what_is_not_there_is_null_and_rows_may_be_apart(echo, monkeypatch):
    x = torch.zeros(7, 64, dtype=torch.bfloat16)[:, :48]
    kept, metadata = torch.zeros(32, 24, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int32)
    told = call(echo, monkeypatch, 0, 1, x, kept, metadata, None, None, None, torch.zeros(7, 32, dtype=torch.bfloat16))
    assert [told[name] for name in ("bias", "adapter_inputs", "adapter_kept", "adapter_columns", "half")] == [0] * 5
    assert (told["input_stride"], told["tokens"]) == (64, 7)
