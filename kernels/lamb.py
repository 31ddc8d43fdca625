"""A LAMB step over all tensors of a model at once, in Triton, at about the speed of the GPU's memory.

Five launches, whatever the number of tensors and groups:

    squared norm     per chunk  sum g^2                                             reads g
    clip             once       1 / max(1, G / max_grad_norm) from these sums
    moments          per chunk  m, v; sum p^2 and sum u^2                           reads p g m v, writes m v
    trust ratio      per tensor lr |p| / |u| from these sums
    apply            per chunk  u once more, from m v p; p                          reads p m v, writes p

So 44 bytes move a parameter: keeping u for the last pass would take as many, and memory for it. A chunk is a stretch of
one tensor. All sums have a fixed order (no atomics), so equal inputs give equal bits. The formulas are
`optimization.Lamb`'s.
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

import os
import shutil
import sysconfig
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from kernels.build import KernelsUnavailable

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise KernelsUnavailable(f"no Triton ({error}): it comes with every CUDA build of torch for Linux") from error

CHUNK = 8192  # values of one tensor that a program handles: many programs even for small models
BLOCK = 1024
WARPS = 4
SUMS_BLOCK = 1024  # partial sums that a program adds up at a time
# A tensor's row in the table of addresses, and a class's in the table of numbers.
P, G, M, V, CLASS, ADDRESS_COLUMNS = (tl.constexpr(i) for i in range(6))
LR, CORRECTION1, CORRECTION2, BETA1, GRADIENT_WEIGHT, BETA2, SQUARE_WEIGHT = (tl.constexpr(i) for i in range(7))
EPS, WEIGHT_DECAY, TRUST_RATIO, NUMBER_COLUMNS = (tl.constexpr(i) for i in range(7, 11))


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _chunk(tensor_of, first_of, sizes, CHUNK: tl.constexpr):
    """(the tensor, where the chunk begins in it, how many values it has) of this program's chunk."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of + chunk)
    begin = (chunk - tl.load(first_of + tensor)).to(tl.int64) * CHUNK
    return tensor, begin, tl.minimum(tl.load(sizes + tensor) - begin, CHUNK).to(tl.int32)


@triton.jit
def _pointer(addresses, tensor, begin, COLUMN: tl.constexpr):
    return tl.load(addresses + tensor * ADDRESS_COLUMNS + COLUMN).to(tl.pointer_type(tl.float32)) + begin


@triton.jit
def _numbers(addresses, numbers, tensor):
    """Where the numbers of a tensor's class lie."""
    return numbers + tl.load(addresses + tensor * ADDRESS_COLUMNS + CLASS) * NUMBER_COLUMNS


@triton.jit
def _sum(sums, first, end, BLOCK: tl.constexpr):
    lanes, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        total += tl.load(sums + start + lanes, mask=start + lanes < end, other=0.0)
    return tl.sum(total)


@triton.jit
def _update(p, m, v, row):
    """u of the formulas."""
    denominator = tl.sqrt(v * tl.load(row + CORRECTION2)) + tl.load(row + EPS)
    return m * tl.load(row + CORRECTION1) / denominator + tl.load(row + WEIGHT_DECAY) * p


@triton.jit
def _squared_norm(addresses, tensor_of, first_of, sizes, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    tensor, begin, size = _chunk(tensor_of, first_of, sizes, CHUNK)
    g_at = _pointer(addresses, tensor, begin, G)
    lanes, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        g = tl.load(g_at + start + lanes, mask=start + lanes < size, other=0.0)
        total += g * g
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["chunks", "max_grad_norm"])
def _clip(sums, chunks, max_grad_norm, factor, BLOCK: tl.constexpr):
    excess = tl.sqrt(_sum(sums, 0, chunks, BLOCK)) / max_grad_norm
    tl.store(factor, tl.where(excess <= 1.0, 1.0, 1.0 / excess))  # in this order a NaN reaches every weight


@triton.jit
def _moments(
    addresses, numbers, tensor_of, first_of, sizes, factor, p_sums, u_sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, begin, size = _chunk(tensor_of, first_of, sizes, CHUNK)
    p_at, g_at = _pointer(addresses, tensor, begin, P), _pointer(addresses, tensor, begin, G)
    m_at, v_at = _pointer(addresses, tensor, begin, M), _pointer(addresses, tensor, begin, V)
    row, clip = _numbers(addresses, numbers, tensor), tl.load(factor)
    lanes, p_total, u_total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        mask = at < size
        g = tl.load(g_at + at, mask=mask, other=0.0) * clip
        m, v = tl.load(m_at + at, mask=mask, other=0.0), tl.load(v_at + at, mask=mask, other=0.0)
        m = tl.load(row + BETA1) * m + tl.load(row + GRADIENT_WEIGHT) * g
        v = tl.load(row + BETA2) * v + tl.load(row + SQUARE_WEIGHT) * g * g
        tl.store(m_at + at, m, mask=mask)
        tl.store(v_at + at, v, mask=mask)
        p = tl.load(p_at + at, mask=mask, other=0.0)
        u = tl.where(mask, _update(p, m, v, row), 0.0)  # where eps is 0, an empty place has 0 / 0
        p_total += p * p
        u_total += u * u
    tl.store(p_sums + tl.program_id(0), tl.sum(p_total))
    tl.store(u_sums + tl.program_id(0), tl.sum(u_total))


@triton.jit
def _trust_ratio(addresses, numbers, first_of, p_sums, u_sums, scales, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    row = _numbers(addresses, numbers, tensor)
    first, end = tl.load(first_of + tensor), tl.load(first_of + tensor + 1)
    p2, u2 = _sum(p_sums, first, end, BLOCK), _sum(u_sums, first, end, BLOCK)
    has_ratio = (tl.load(row + TRUST_RATIO) != 0.0) & (tl.load(row + WEIGHT_DECAY) != 0.0)
    adaptive = has_ratio & (p2 > 0.0) & (u2 > 0.0)
    tl.store(scales + tensor, tl.load(row + LR) * tl.where(adaptive, tl.sqrt(p2) / tl.sqrt(u2), 1.0))


@triton.jit
def _apply(addresses, numbers, tensor_of, first_of, sizes, scales, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    tensor, begin, size = _chunk(tensor_of, first_of, sizes, CHUNK)
    p_at = _pointer(addresses, tensor, begin, P)
    m_at, v_at = _pointer(addresses, tensor, begin, M), _pointer(addresses, tensor, begin, V)
    row, scale = _numbers(addresses, numbers, tensor), tl.load(scales + tensor)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        at = start + lanes
        mask = at < size
        p, m = tl.load(p_at + at, mask=mask, other=0.0), tl.load(m_at + at, mask=mask, other=0.0)
        v = tl.load(v_at + at, mask=mask, other=0.0)
        tl.store(p_at + at, p - scale * _update(p, m, v, row), mask=mask)


# ---------------------------------------------------------------------------------------------------------------- host
def check_device(device: torch.device) -> None:
    """Whether the kernels run on a CUDA device.

    Raises:
        KernelsUnavailable: it is too old for Triton, or there is nothing to compile Triton's launchers with.
    """
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise KernelsUnavailable(f"{torch.cuda.get_device_name(device)} is too old for Triton: needs capability 8.0")
    if not os.environ.get("CC") and not any(map(shutil.which, ("clang", "gcc"))):
        raise KernelsUnavailable("Triton needs a C compiler: install gcc, or set CC")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise KernelsUnavailable(f"Triton needs Python's headers: no Python.h in {sysconfig.get_path('include')}")


class LambKernels:
    """The kernels with what they keep on a device from step to step: where the tensors lie, and how they are chunked.

    A step compares addresses, step counts and rates with the last one's on the host, sends what differs from fresh
    pinned memory, and waits for nothing. Under CUDA graph capture nothing may differ: no bias correction, and a step
    with the same gradients before.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK, block: int = BLOCK, warps: int = WARPS):
        self.device, self.warps = device, warps
        self.shape = {"CHUNK": chunk, "BLOCK": block}
        self._known: list[list] = []
        self._numels: list[int] = []
        self._rows: list[float] = []

    def step(self, groups: list[dict], members: list[list[Tensor]], states: list[list[dict]], max_norm: float) -> bool:
        """One step of LAMB in place.

        Args:
            groups: the optimizer's, with `lr` (a number or a 0-dim tensor), `betas`, `eps`, `weight_decay`,
                `bias_correction`, `grad_averaging`, `trust_ratio`.
            members: of each group, the parameters that have a gradient; at least one in all.
            states: theirs: `step`, already moved on, `exp_avg`, `exp_avg_sq`.

        Returns:
            False, with nothing done, where the tensors are not all contiguous, fp32 and on the kernels' device.
        """
        params, own = list(chain(*members)), list(chain(*states))
        gradients = [p.grad for p in params]
        moments = [[state[moment] for state in own] for moment in ("exp_avg", "exp_avg_sq")]
        classes, class_of = _classes(states)
        addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in (params, gradients)]
        # Moments are this optimizer's own: a new tensor is all that can happen to them.
        known = [*addresses, class_of, *(list(map(id, tensors)) for tensors in moments)]
        if known != self._known:
            if not _supported([*params, *gradients, *chain(*moments)], self.device):
                return False
            self._lay_out([p.numel() for p in params])
            addresses += [list(map(Tensor.data_ptr, tensors)) for tensors in moments]
            self._addresses = self._send(list(chain(*zip(*addresses, class_of, strict=True))), torch.int64)
            self._known, self._moments = known, moments  # which are kept, or an id could be another tensor's
        self._send_numbers([groups[group] for group, _ in classes], [step for _, step in classes])
        with torch.cuda.device_of(params[0]):
            self._launch(max_norm)
        return True

    def _lay_out(self, numels: list[int]) -> None:
        """Which tensor each chunk belongs to, and room for what the launches hand on."""
        if numels == self._numels:
            return
        counts = [-(-numel // self.shape["CHUNK"]) for numel in numels]
        tensor_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self._chunks = len(tensor_of)
        self._layout = (
            self._send(tensor_of, torch.int32),
            self._send(list(accumulate(counts, initial=0)), torch.int32),
            self._send(numels, torch.int64),
        )
        self._sums = [torch.empty(self._chunks, device=self.device) for _ in range(3)]
        self._factor, self._scales = torch.empty(1, device=self.device), torch.empty(len(counts), device=self.device)
        self._numels = numels

    def _send_numbers(self, groups: list[dict], steps: list[int]) -> None:
        """The numbers of every class, in the order of its columns; a rate on the device comes from there."""
        rows = list(chain.from_iterable(map(_row, groups, steps)))
        if rows != self._rows:
            self._numbers, self._rows = self._send(rows, torch.float32), rows
        for index, group in enumerate(groups):
            if _on_device(group["lr"]):
                self._numbers[index * len(rows) // len(groups)].copy_(group["lr"])

    def _send(self, values: list | Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.as_tensor(values, dtype=dtype)
        if self.device.type != "cuda":
            return values
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a LAMB step can be captured with bias_correction=False alone, after a step with the same gradients: "
                "a graph would replay this step's count and addresses"
            )
        return values.pin_memory().to(self.device, non_blocking=True)

    def _launch(self, max_norm: float) -> None:
        if not self._chunks:
            return  # nothing but empty tensors
        addresses, numbers, layout, first_of = self._addresses, self._numbers, self._layout, self._layout[1]
        g_sums, p_sums, u_sums = self._sums
        settings = {**self.shape, "num_warps": self.warps}
        per_chunk, per_tensor = (self._chunks,), (len(self._numels),)
        _squared_norm[per_chunk](addresses, *layout, g_sums, **settings)
        _clip[(1,)](g_sums, self._chunks, float(max_norm), self._factor, BLOCK=SUMS_BLOCK)
        _moments[per_chunk](addresses, numbers, *layout, self._factor, p_sums, u_sums, **settings)
        _trust_ratio[per_tensor](addresses, numbers, first_of, p_sums, u_sums, self._scales, BLOCK=SUMS_BLOCK)
        _apply[per_chunk](addresses, numbers, *layout, self._scales, **settings)


def _classes(states: list[list[dict]]) -> tuple[list[tuple[int, int]], list[int]]:
    """The distinct (group, step count), and which of them each parameter has: those share all their numbers."""
    classes: list[tuple[int, int]] = []
    class_of: list[int] = []
    for group, own in enumerate(states):
        steps = [state["step"] for state in own]
        index = {step: len(classes) + i for i, step in enumerate(dict.fromkeys(steps))}
        classes += [(group, step) for step in index]
        class_of += map(index.__getitem__, steps)
    return classes, class_of


def _row(group: dict, step: int) -> tuple[float, ...]:
    """The numbers of a class, in the order of its columns; corrections as factors."""
    (beta1, beta2), corrected = group["betas"], group["bias_correction"]
    return (
        0.0 if _on_device(group["lr"]) else float(group["lr"]),
        1 / (1 - beta1**step) if corrected else 1.0,
        1 / (1 - beta2**step) if corrected else 1.0,
        beta1,
        1 - beta1 if group["grad_averaging"] else 1.0,
        beta2,
        1 - beta2,
        group["eps"],
        group["weight_decay"],
        float(group["trust_ratio"]),
    )


def _on_device(rate: float | Tensor) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def _supported(tensors: list[Tensor], device: torch.device) -> bool:
    index = device.index if device.type == "cuda" else -1
    return (
        all(map(Tensor.is_contiguous, tensors))
        and {tensor.dtype for tensor in tensors} == {torch.float32}
        and set(map(Tensor.get_device, tensors)) == {index}
    )
