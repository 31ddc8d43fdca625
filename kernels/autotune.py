"""Which tile of the 2:4 GEMM a shape is given to, and how it compares with dense products: measured once, then cached.

Every candidate is first checked against the dense product, then timed interleaved with it (dense, candidate, dense,
candidate, ...), since a GPU at its power limit is slower when hot; the median of the ratios counts. Results lie in
one JSON file a GPU model beside the compiled kernels. Nothing is measured inside a training step: `tune` is called at
start-up, and a product of another number of tokens takes the choice of the nearest one.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import build, layout
from kernels.native import launch_sparse_mm, variant_count
from sparse_ops import N, nm_mask

GROUPS = (1, 4, 16)  # token tiles worked on together
ROUNDS = 5
SECONDS_A_SAMPLE = 1e-3
TOLERANCE = 2e-2  # of the largest output: bf16 rounds at 2^-9, and sums differ in their order


@dataclass(frozen=True)
class Choice:
    """What was measured for one product of [tokens, in] with [out, in]."""

    variant: int = 1
    group: int = 1
    ratio: float = 0.0
    """Time of the dense product over time of this one, of rounded weights; 0 where nothing was measured."""


_choices: dict[tuple[int, int, torch.dtype], dict[int, Choice]] = {}
_nearest: dict[tuple[int, int, int, torch.dtype], Choice] = {}


def choice_of(tokens: int, out: int, kept_columns: int, dtype: torch.dtype) -> Choice:
    """The choice for `tokens` rows times a kept matrix [out, kept_columns]: a lookup, never a measurement."""
    key = (tokens, out, kept_columns, dtype)
    found = _nearest.get(key)
    if found is None:
        known = _choices.get(key[1:], {})
        nearest = min(known, key=lambda other: abs(other - tokens), default=None)
        found = _nearest[key] = Choice() if nearest is None else known[nearest]
    return found


def tune(tokens: int, out: int, columns: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Measure (or read from the cache) the best tile for [tokens, columns] x [out, columns]^T, and use it from now on.

    Raises:
        KernelsUnavailable: when the kernels cannot be compiled or loaded.
        RuntimeError: when no tile computes the dense product.
    """
    name = f"{tokens}x{out}x{columns} {name_of(dtype)}"
    fields = asdict(Choice())
    found = measured_once(name, device, fields, lambda: asdict(_measure(tokens, out, columns, dtype, device)))
    choice = Choice(**found)
    _choices.setdefault((out, columns // 2, dtype), {})[tokens] = choice
    _nearest.clear()
    return choice


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measured_once(
    name: str, device: torch.device, fields: Collection[str], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What `measure` returned, in the first process of this machine that asked for it by this name.

    Args:
        fields: its names; what an earlier version measured under others is measured anew.
    """
    path = _cache_file(device)
    with _one_at_a_time(path):
        found = _read(path).get(name, {})
        if found.keys() != set(fields):
            found = measure()
            _write(path, _read(path) | {name: found})
    return found


def _cache_file(device: torch.device) -> Path:
    gpu = torch.cuda.get_device_name(device).replace(" ", "_")
    library = build.library("sparse_gemm")
    return library.with_name(f"{library.stem}-{gpu}-torch{torch.__version__}.json")


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """The first process of a machine measures and the others read what it found, so that all choose alike."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written: each process measures for itself
            stack.enter_context(build.locked(path.with_suffix(".lock")))
        yield


def _read(path: Path) -> dict:
    """What was measured before; nothing where the file is missing or torn, and then it is measured again."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        os.chmod(file.name, 0o644)  # the cache may be shared
        os.replace(file.name, path)
    except OSError as error:
        print(
            f"the measured tiles cannot be kept in {path} ({error.strerror}): the next start measures them again",
            file=sys.stderr,
        )


@dataclass
class Trial:
    """One product to measure, on random data, with what both sides need."""

    x: Tensor
    weight: Tensor
    kept: Tensor
    metadata: Tensor
    y: Tensor

    @classmethod
    def random(cls, tokens: int, out: int, columns: int, dtype: torch.dtype, device: torch.device) -> "Trial":
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(out, columns, generator=generator, device=device).to(dtype)
        mask = nm_mask(weight.abs(), N, 4)
        kept, metadata = layout.compress(weight, mask)
        x = torch.randn(tokens, columns, generator=generator, device=device).to(dtype)
        return cls(
            x, torch.where(mask, weight, 0), kept, metadata, torch.empty(tokens, out, dtype=dtype, device=device)
        )

    def dense(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)

    def sparse(self, variant: int, group: int) -> None:
        launch_sparse_mm(variant, group, self.x, self.kept, self.metadata, None, None, None, self.y)

    def agrees(self, variant: int, group: int, expected: Tensor) -> bool:
        self.y.fill_(float("nan"))
        self.sparse(variant, group)
        error = (self.y.float() - expected).abs().max() / expected.abs().max()
        return bool(error < TOLERANCE)  # a NaN is not


def _measure(tokens: int, out: int, columns: int, dtype: torch.dtype, device: torch.device) -> Choice:
    trial = Trial.random(tokens, out, columns, dtype, device)
    trial.dense()
    expected = trial.y.float()
    every = [(variant, group) for variant in range(variant_count()) for group in GROUPS]
    checked = [candidate for candidate in every if trial.agrees(*candidate, expected)]
    if not checked:
        raise RuntimeError(f"no tile of the 2:4 GEMM computes the dense product of {tokens} x {out} x {columns}")
    dense = Stopwatch(trial.dense)
    candidates = {
        (variant, group): Stopwatch(lambda variant=variant, group=group: trial.sparse(variant, group), dense.repeats)
        for variant, group in checked
    }
    ratios: dict[tuple[int, int], list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate, watch in candidates.items():
            ratios[candidate].append(dense.seconds() / watch.seconds())
    best = max(candidates, key=lambda candidate: statistics.median(ratios[candidate]))
    return Choice(*best, statistics.median(ratios[best]))


def compared(run: Callable[[], object], with_this: Callable[[], object]) -> float:
    """GPU time of `run` over that of `with_this`, in turn."""
    first = Stopwatch(run)
    second = Stopwatch(with_this, first.repeats)
    return statistics.median(first.seconds() / second.seconds() for _ in range(ROUNDS))


class Stopwatch:
    """GPU time of `run`, by CUDA events around a replayed graph of `repeats` calls, so that host time does not count.

    Args:
        repeats: calls in a sample; as many as take `SECONDS_A_SAMPLE` if None.
    """

    def __init__(self, run: Callable[[], object], repeats: int | None = None):
        run()  # what loads lazily is loaded before the capture
        self.run, self.repeats = run, 3
        self.graph = self._capture()
        if repeats is None:
            self.seconds()
            repeats = max(1, min(100, int(SECONDS_A_SAMPLE / self.seconds())))
        self.repeats = repeats
        self.graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.repeats):
                self.run()
        return graph

    def seconds(self) -> float:
        """Seconds of one call, from one sample."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.repeats / 1e3
