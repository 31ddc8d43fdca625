"""The compiled libraries, called through ctypes on torch tensors. No function here waits for the GPU."""

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import build

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "operands": {
        "slope_forward_metadata": (*[_POINTER] * 2, _LONG, _LONG, _INT, _POINTER),
        "slope_refresh": (ctypes.c_char_p, _INT, _INT, _INT, _POINTER),
        "slope_second_bits": (*[_POINTER] * 4, _LONG, _LONG, _INT, _POINTER),
        "slope_set_second": (*[_POINTER] * 4, _LONG, _LONG, _INT, _POINTER),
        "slope_set_device": (_INT,),
        "slope_gather": (_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT, _INT, _POINTER),
    },
    "adapters": {
        "slope_adapter_grads": (ctypes.c_char_p,),
        "slope_adapter_operands": (ctypes.c_char_p, _INT, _INT, _POINTER),
    },
    "sparse_gemm": {
        "slope_sparse_gemm": (ctypes.c_char_p,),
        "slope_gemm_variants": (),
    },
}
# Arguments as the C structs of this name hold them: one packed argument costs a quarter of sixteen.
_CALL = struct.Struct("7P6qP4i")  # sparse_gemm.cuh
_ADAPTER_GRADS_CALL = struct.Struct("5P2qP4i")  # adapters.cu
_REFRESH_ENTRY = struct.Struct("6P2q2i")  # operand_threads.cuh
_ADAPTER_OPERANDS = struct.Struct("6P8i")  # operand_threads.cuh


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


def _address(argument: Tensor | None) -> int:
    return 0 if argument is None else argument.data_ptr()


def _raise_if(code: int, what: str, *tensors: Tensor) -> None:
    if code:
        raise RuntimeError(f"{what} of {' with '.join(str(tuple(tensor.shape)) for tensor in tensors)}: CUDA {code}")


# ------------------------------------------------------------------------------------------------------------ operands
def call_operands(name: str, *arguments) -> None:
    """`slope_<name>` of operands.cu on the current stream; a tensor stands for its address, None for null."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    stream = _enter(tensors[0])
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    _raise_if(_function("operands", f"slope_{name}")(*plain, stream), f"slope_{name}", *tensors)


def refresh_operands(layers: Sequence[tuple], dtype: torch.dtype, rechoose: bool) -> None:
    """What every layer keeps of both operands, from its values, on the current stream: one launch for 48 layers.

    Args:
        layers: of each one values, mask_bits, kept or None, metadata_backward, second or None, kept_backward, out, in,
            m.
        dtype: of `kept` and `kept_backward`; the rows of the latter may lie apart.
        rechoose: choose W^{R,C} anew.
    """
    stream = _enter(layers[0][0])
    packed = b"".join(
        _REFRESH_ENTRY.pack(*map(_address, layer[:6]), *layer[6:], layer[5].stride(0)) for layer in layers
    )
    code = _function("operands", "slope_refresh")(packed, len(layers), DTYPE_CODES[dtype], int(rechoose), stream)
    _raise_if(code, f"refresh of {len(layers)} layers, the first", layers[0][0])


def refresh_adapters(layers: Sequence[tuple], dtype: torch.dtype) -> None:
    """What the products read of every layer's adapters, on the current stream: one launch for 48 layers.

    Args:
        layers: of each one lora_left [in, rank], lora_right [rank, out] (fp32, contiguous), and the four of
            `ops.AdapterOperands`, all of which is written; the rows of these may lie apart.
        dtype: of the last four.
    """

    def entry(left: Tensor, right: Tensor, *operands: Tensor) -> bytes:
        (columns, rank), out, width = left.shape, right.shape[1], operands[-1].shape[1]
        strides = (matrix.stride(0) for matrix in operands)
        return _ADAPTER_OPERANDS.pack(*map(_address, (left, right, *operands)), columns, out, rank, width, *strides)

    stream = _enter(layers[0][0])
    packed = b"".join(entry(*layer) for layer in layers)
    code = _function("adapters", "slope_adapter_operands")(packed, len(layers), DTYPE_CODES[dtype], stream)
    _raise_if(code, f"refresh of the adapters of {len(layers)} layers, the first", layers[0][0])


# ------------------------------------------------------------------------------------------------------------ products
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
        kept: [out, in/2], rows packed or apart.
        adapter_x: [tokens, 2 width], contiguous.
        adapter_kept: [out, width], rows packed or apart.
        y: [..., out] of as many tokens, contiguous.
    """
    columns, out = x.shape[-1], kept.shape[0]
    call = _CALL.pack(
        x.data_ptr(),
        kept.data_ptr(),
        metadata.data_ptr(),
        _address(bias),
        _address(adapter_x),
        _address(adapter_kept),
        y.data_ptr(),
        x.stride(0) if x.dim() == 2 else columns,
        kept.stride(0),
        0 if adapter_kept is None else adapter_kept.stride(0),
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


def launch_adapter_grads(
    grad_weight: Tensor, left_rows: Tensor, right_rows: Tensor, grad_left: Tensor, grad_right: Tensor
) -> None:
    """grad_left [in, rank] and grad_right [rank, out], fp32, from the dense weight gradient.

    Args:
        grad_weight: dY^T X [out, in]; left_rows and right_rows: see `ops.AdapterOperands`; all contiguous, but for
            right_rows, whose rows may lie apart.
    """
    out, columns = grad_weight.shape
    call = _ADAPTER_GRADS_CALL.pack(
        grad_weight.data_ptr(),
        left_rows.data_ptr(),
        right_rows.data_ptr(),
        grad_left.data_ptr(),
        grad_right.data_ptr(),
        out,
        columns,
        _enter(grad_weight),
        len(left_rows) // 2,
        len(grad_right),
        DTYPE_CODES[grad_weight.dtype],
        right_rows.stride(0),
    )
    code = _function("adapters", "slope_adapter_grads")(call)
    _raise_if(code, "gradients of adapters", grad_weight, left_rows)


def variant_count() -> int:
    """How many tiles the 2:4 GEMM has."""
    return _function("sparse_gemm", "slope_gemm_variants")()
