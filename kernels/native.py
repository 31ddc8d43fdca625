"""The compiled libraries, called through ctypes on torch tensors. No function here waits for the GPU."""

import ctypes
import functools
import struct
import threading

import torch
from torch import Tensor

from kernels import build

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "operands": {
        "slope_forward_metadata": (*[_POINTER] * 2, _LONG, _LONG, _INT, _POINTER),
        "slope_refresh": (*[_POINTER] * 6, _LONG, _LONG, _INT, _INT, _INT, _POINTER),
        "slope_second_bits": (*[_POINTER] * 4, _LONG, _LONG, _INT, _POINTER),
        "slope_set_second": (*[_POINTER] * 4, _LONG, _LONG, _INT, _POINTER),
        "slope_set_device": (_INT,),
        "slope_gather": (_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT, _INT, _POINTER),
    },
    "sparse_gemm": {
        "slope_sparse_gemm": (ctypes.c_char_p,),
        "slope_gemm_variants": (),
    },
}
# slope::Call of sparse_gemm.cuh: one packed argument costs a quarter of sixteen.
_CALL = struct.Struct("7P4qP4i")


@functools.cache
def loaded(name: str) -> ctypes.CDLL:
    """A library of kernels/build.py, compiled at first use.

    Raises:
        KernelsUnavailable: as `build.library`.
    """
    library = ctypes.CDLL(str(build.library(name)))
    for function, types in _SIGNATURES[name].items():
        getattr(library, function).argtypes = types
    if name == "sparse_gemm":
        library.slope_gemm_error.restype = ctypes.c_char_p
    return library


@functools.cache
def _function(library: str, name: str):
    return getattr(loaded(library), name)


_thread = threading.local()


def _enter(tensor: Tensor) -> int:
    """Make the device of `tensor` this thread's, and return its current stream.

    The libraries bring a CUDA runtime of their own, which knows the device from the thread's driver context alone; a
    new thread, such as autograd's, has none.
    """
    index = tensor.device.index
    if index is None:
        raise RuntimeError("the 2:4 kernels run on a CUDA device: give the layers DenseOperands before they leave it")
    if getattr(_thread, "device", None) != index or torch._C._cuda_getDevice() != index:
        torch._C._cuda_setDevice(index)
        code = _function("operands", "slope_set_device")(index)
        if code:
            raise RuntimeError(f"CUDA device {index} cannot be used: CUDA error {code}")
        _thread.device = index
    return torch._C._cuda_getCurrentRawStream(index)


def call_operands(name: str, *arguments) -> None:
    """`slope_<name>` of operands.cu on the current stream; a tensor stands for its address, None for null."""
    stream = _enter(next(argument for argument in arguments if isinstance(argument, Tensor)))
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    code = _function("operands", f"slope_{name}")(*plain, stream)
    if code:
        raise RuntimeError(
            f"slope_{name} on {[tuple(a.shape) for a in arguments if isinstance(a, Tensor)]}: CUDA {code}"
        )


def launch_sparse_mm(
    variant: int,
    group: int,
    x: Tensor,
    kept: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    adapter_x: Tensor | None,
    adapter_kept: Tensor | None,
    y: Tensor,
) -> None:
    """One launch of the 2:4 GEMM with a given tile.

    Args:
        x: [tokens, in], rows packed or apart; or [..., in], contiguous.
        y: [..., out] of as many tokens, contiguous.
    """
    columns, out = x.shape[-1], kept.shape[0]
    call = _CALL.pack(
        x.data_ptr(),
        kept.data_ptr(),
        metadata.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if adapter_x is None else adapter_x.data_ptr(),
        0 if adapter_x is None else adapter_kept.data_ptr(),
        y.data_ptr(),
        x.stride(0) if x.dim() == 2 else columns,
        y.numel() // out,
        out,
        columns,
        _enter(x),
        0 if adapter_x is None else adapter_x.shape[-1],
        group,
        variant,
        DTYPE_CODES[x.dtype],
    )
    code = _function("sparse_gemm", "slope_sparse_gemm")(call)
    if code:
        reason = loaded("sparse_gemm").slope_gemm_error(code).decode()
        raise RuntimeError(f"2:4 product of {tuple(x.shape)} with {tuple(kept.shape)}: {reason}")


def variant_count() -> int:
    """How many tiles the 2:4 GEMM has."""
    return _function("sparse_gemm", "slope_gemm_variants")()
