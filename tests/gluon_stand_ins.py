"""Gluon's names, standing for Triton's, so that Triton's interpreter runs a Gluon kernel's arithmetic on a CPU.

Layouts are dropped and shared memory is a numpy array. What threads hold, and when, is not seen here; only that each
wait names what its products read.
"""

import sys
import types
from contextlib import contextmanager

import numpy as np
import triton
import triton.experimental.gluon
import triton.language as tl
from triton.runtime import interpreter, jit

_own_name_of_type = jit._normalize_ty
# The interpreter knows compile-time arguments by how Triton spells them.
jit._normalize_ty = lambda given: "constexpr" if given == "gl.constexpr" else _own_name_of_type(given)


def _value(given):
    return getattr(given, "value", given)


class Shared:
    """Shared memory, which begins full of NaN."""

    def __init__(self, raw: np.ndarray, dtype):
        self.raw, self.dtype = raw, dtype

    def store(self, value) -> None:
        self.raw[...] = value.handle.data

    def load(self, layout=None):
        return tl.core.tensor(
            interpreter.TensorHandle(self.raw.copy(), self.dtype), tl.block_type(self.dtype, [*self.raw.shape])
        )

    def slice(self, start, length):
        start, length = int(_value(start)), int(_value(length))
        return Shared(self.raw[start : start + length], self.dtype)

    def permute(self, order):
        return Shared(self.raw.transpose(order), self.dtype)


def allocate_shared_memory(dtype, shape, layout, given=None) -> Shared:
    dtype = _value(dtype)
    shared = Shared(np.full([_value(size) for size in shape], np.nan, dtype=np.float16), dtype)
    if given is not None:
        shared.store(given)
    return shared


under_way: list[set[int]] = []
"""Of each product that is not waited for: the arrays in shared memory that it reads."""


def _array(shared: Shared) -> int:
    return id(shared.raw if shared.raw.base is None else shared.raw.base)


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    under_way.append({_array(a), _array(b)})
    product = tl.dot(a.load(), b.load())
    return acc + product if _value(use_acc) else product


def warpgroup_mma_wait(pending, given):
    """The wait must name what its products read: else the compiler gives that memory to others before it."""
    named = {_array(operand) for operand in given if isinstance(operand, Shared)}
    while len(under_way) > _value(pending):
        assert under_way.pop(0) <= named, "a product is waited for that reads more than is named"
    return given


def _tritons(name: str):
    """Looked up at each call: the interpreter replaces Triton's functions while a kernel runs."""
    return lambda *given, **more: getattr(tl, name)(*given, **more)


LANGUAGE = {
    "constexpr": tl.constexpr,
    **{name: getattr(tl, name) for name in ("float32", "int64", "uint64", "uint32")},
    **{name: _tritons(name) for name in ("exp2", "where", "sum", "max", "load", "store", "program_id")},
    **dict.fromkeys(("BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout"), lambda *_: None),
    "arange": lambda first, end, layout: tl.arange(*(tl.constexpr(_value(bound)) for bound in (first, end))),
    "zeros": lambda shape, dtype, layout: tl.zeros([_value(size) for size in shape], dtype),
    "barrier": lambda: None,
    "static_range": lambda *bounds: range(*map(_value, bounds)),
    "allocate_shared_memory": allocate_shared_memory,
}
HOPPER = {
    "fence_async_shared": lambda: None,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


@contextmanager
def stand_ins():
    """What is imported meanwhile gets them for Gluon."""
    package = "triton.experimental.gluon"
    names = {package: {"jit": triton.jit}, f"{package}.language": LANGUAGE, f"{package}.language.nvidia": {}}
    names |= {f"{package}.language.nvidia.hopper": HOPPER}
    own, own_package = {name: sys.modules.get(name) for name in names}, triton.experimental.gluon
    for name, attributes in names.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes, __path__=[])
    sys.modules[package].language = sys.modules[f"{package}.language"]
    triton.experimental.gluon = sys.modules[package]
    try:
        yield
    finally:
        triton.experimental.gluon = own_package
        for name, module in own.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
