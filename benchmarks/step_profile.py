"""Where a step's GPU time goes: kernels by kind, and the time in which none runs, from a profiler trace."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

IDLE, OTHER = "idle", "other kernels"
# A kernel is of the first kind whose pattern its name holds.
KERNELS = {
    "2:4 GEMM": r"\bsparse_gemm_kernel\b|\bcusparselt|sparse_.*spmma",
    "adapters": r"\badapter_grads_kernel\b",
    "attention": r"flash|fmha|AttentionKernel|attention_kernel|cudnn.*sdpa|^blockwise_|^_?attention_(for|back)ward",
    "refresh, gather": r"\b(refresh_kernel|choose_long_kernel|gather_kernel|adapter_operands_kernel)\b",
    # Triton kernels of kernels/lamb.py go by their functions' names; foreach and torch's fused optimizers are the rest.
    "optimizer": r"^_(squared_norm|clip|moments|trust_ratio|apply)(_\d|$)|multi_tensor_apply|lpnorm_cleanup",
    "dense GEMM": r"nvjet|gemm|cublas|cutlass|splitK|xmma|triton_(mm|tem)",
}
KINDS = (*KERNELS, OTHER, IDLE)
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace; spans that only mark ranges are others


@dataclass(frozen=True)
class Kernel:
    name: str
    begin: float
    """Seconds."""
    end: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name)), OTHER)


def breakdown(kernels: Sequence[Kernel], steps: int) -> dict[str, float]:
    """Seconds of a step by kind of kernel; idle is what lies between the first and the last one and none covers."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        seconds[kind_of(kernel.name)] += (kernel.end - kernel.begin) / steps
    wall = max(kernel.end for kernel in kernels) - min(kernel.begin for kernel in kernels)
    return seconds | {IDLE: (wall - covered(kernels)) / steps}


def kind_text(kind: str, row: dict) -> str:
    """Milliseconds of a kind in `kernel_seconds`, and its share."""
    seconds = row["kernel_seconds"]
    return f"{seconds[kind] * 1e3:.2f} ({seconds[kind] / sum(seconds.values()):.1%})"


KIND_COLUMNS = {kind: partial(kind_text, kind) for kind in KINDS}  # of a table of profiles


def covered(kernels: Iterable[Kernel]) -> float:
    """Seconds in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        total += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return total


def read_trace(path: Path) -> list[Kernel]:
    """What ran on the GPU, from a trace in Chrome's format, whose times are microseconds."""
    events = json.loads(path.read_text())["traceEvents"]
    return [
        Kernel(event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ON_GPU
    ]


def profile(take: Callable[[int], None], steps: int) -> tuple[dict[str, float], list[str]]:
    """Let `take` take so many steps; seconds of one by kind, and the longest of the other kernels, for a reader."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        take(steps)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        kernels = read_trace(path)
    return breakdown(kernels, steps), longest_others(kernels, steps)


def longest_others(kernels: Iterable[Kernel], steps: int, count: int = 24) -> list[str]:
    """Names and milliseconds a step of the longest kernels that are of no kind of their own."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        if kind_of(kernel.name) == OTHER:
            totals[kernel.name] = totals.get(kernel.name, 0.0) + (kernel.end - kernel.begin) / steps
    longest = sorted(totals, key=totals.__getitem__, reverse=True)[:count]
    return [f"{totals[name] * 1e3:.3f} ms {name[:90]}" for name in longest]
