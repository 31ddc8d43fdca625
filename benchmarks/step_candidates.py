"""Variants of the pretraining step that take turns on one GPU: their memory, their times, where these go."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from benchmarks.huggingface_step import HuggingFaceStep
from benchmarks.memory import size_of
from benchmarks.step_profile import profile
from benchmarks.timing import GpuState, GpuWatch, Spread
from benchmarks.training_step import (
    SharedGraphs,
    TrainingStep,
    prediction_flags,
    predictions_of,
    run_flags,
    take_turns,
    wait,
)
from configuration import BertConfig
from training.distributed import World
from training.throughput import peak_tflops, useful_flops

HUGGINGFACE = "huggingface"
OURS = {"dense": ("dense", 0), "slope": ("slope", 0), "slope-16": ("slope", 16), "slope-64": ("slope", 64)}
MULTIPLE = 8  # of the largest batch


@dataclass(frozen=True)
class Setting:
    """Sequences of one micro-step, and their length."""

    length: int
    sequences: int

    def __str__(self) -> str:
        return f"{self.length}x{self.sequences}"


@dataclass
class Candidate:
    """A variant that is ready to take steps."""

    name: str
    step: TrainingStep | HuggingFaceStep
    graphs: SharedGraphs | None
    held: int = 0
    """Bytes that stay on the GPU between steps."""
    peak: int | None = None
    """Bytes that a step takes, those among them."""
    kinds: dict[str, float] | None = None
    """Seconds of a step by kind of kernel."""
    others: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------- memory
def allocated(world: World) -> int:
    """Bytes of the tensors on the GPU; what was freed is given back."""
    gc.collect()
    if world.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def state_bytes(step: TrainingStep | HuggingFaceStep) -> dict[str, int]:
    """Bytes that training has for a model at each step's end, by kind."""
    parameters, buffers = list(step.model.parameters()), list(step.model.buffers())
    return {
        "parameters": size_of(parameters),
        "gradients": size_of(p for p in parameters if p.requires_grad),  # of their size and dtype
        "optimizer": size_of(
            t for state in step.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ),
        "operands": size_of(buffer for buffer in buffers if buffer.is_floating_point()),
        "index data": size_of(buffer for buffer in buffers if not buffer.is_floating_point()),
    }


# ----------------------------------------------------------------------------------------------------------- candidates
def make_step(name: str, setting: Setting, args, world: World, **more) -> TrainingStep | HuggingFaceStep:
    config = BertConfig.from_json_file(args.model_config_file)
    if name == HUGGINGFACE:
        step = HuggingFaceStep(config, world, args.dtype, setting.sequences, setting.length)
    else:
        model, rank = OURS[name]
        same = {name: getattr(args, name) for name in ("model_config_file", "optimizer", "attention", "dense_kernels")}
        same |= {"local_batch_size": setting.sequences, **prediction_flags(setting.length)}
        flags = run_flags(model, precision=args.dtype, **same, **more)
        step = TrainingStep(flags, config, world, setting.length, rank)
    step.repeat(args.accumulation)
    return step


def rehearsed(name: str, setting: Setting, args, world: World, pool) -> Candidate | None:
    """A variant that has taken a step, so that all it keeps is there; None where the GPU's memory does not suffice."""
    before = allocated(world)
    try:
        step = make_step(name, setting, args, world)
        candidate = Candidate(name, step, step.connect(pool))
        step.take()
        wait(world)
    except torch.OutOfMemoryError:
        return None
    candidate.held = allocated(world) - before
    return candidate


def captured(candidate: Candidate, world: World) -> bool:
    """Take the steps that capture its graphs, and find its peak memory; False where memory does not suffice."""
    others = allocated(world) - candidate.held
    if candidate.graphs is not None:
        candidate.graphs.rehearsing = False
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        candidate.step.take(2)
        wait(world)
    except torch.OutOfMemoryError:
        return False
    if world.device.type == "cuda":
        candidate.peak = torch.cuda.max_memory_allocated() - others
    return True


def prepare(names: Iterable[str], setting: Setting, args, world: World) -> tuple[list[Candidate], list[str]]:
    """Those of the variants that fit into memory together, and the names of those that do not."""
    pool = torch.cuda.graph_pool_handle() if world.device.type == "cuda" else None
    candidates, left_out = [], []
    for name in names:
        candidate = rehearsed(name, setting, args, world, pool)
        if candidate is None:
            left_out.append(name)
        else:
            candidates.append(candidate)
    fitting = []
    for candidate in candidates:
        if captured(candidate, world):
            fitting.append(candidate)
        else:
            left_out.append(candidate.name)
    return fitting, left_out


# ---------------------------------------------------------------------------------------------------------- measurement
def measure(names: Sequence[str], setting: Setting, args, world: World) -> tuple[list[dict], list[str]]:
    """Records of the variants, the base first, and lines about them."""
    on_gpu, held_before = world.device.type == "cuda", allocated(world)
    candidates, left_out = prepare(names, setting, args, world)
    notes = [f"{setting}: {name} does not fit into memory beside the others" for name in left_out]
    if not candidates or candidates[0].name != names[0]:
        return [], notes
    watching = GpuWatch() if on_gpu else None
    with watching or nullcontext():
        samples = take_turns({c.name: c.step for c in candidates}, args.rounds, args.sample_seconds, world)
    if on_gpu and args.profile_steps:
        for candidate in candidates:
            candidate.kinds, candidate.others = profile(candidate.step.take, args.profile_steps)
    state = watching.state if watching else GpuState(None, None, None)
    machine = {"gpu": state, "held_before_bytes": held_before}
    notes += [f"{setting}, {c.name}: {line}" for c in candidates for line in getattr(c.step, "notes", ())]
    return [record(candidate, setting, samples, args, world) | machine for candidate in candidates], notes


def record(candidate: Candidate, setting: Setting, samples: Mapping[str, list[float]], args, world: World) -> dict:
    """What is known of one variant; `samples` are seconds of a step, of all variants that took turns."""
    own, sequences = samples[candidate.name], args.accumulation * setting.sequences
    tokens, config = sequences * setting.length, BertConfig.from_json_file(args.model_config_file)
    masked = sequences * predictions_of(setting.length)
    seconds = Spread.of(own)
    tflops = useful_flops(config, tokens, tokens * setting.length, masked, sequences) / seconds.median / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), args.dtype) if world.device.type == "cuda" else None

    def against(base: str) -> Spread | None:
        if base == candidate.name or base not in samples:
            return None
        return Spread.of([theirs / ours for theirs, ours in zip(samples[base], own, strict=True)])

    return {
        "sequence_length": setting.length,
        "sequences": setting.sequences,
        "accumulation": args.accumulation,
        "variant": candidate.name,
        "tokens_per_second": tokens / seconds.median,
        "step": seconds,
        "against_dense": against("dense"),
        "against_slope": against("slope") if candidate.name in OURS and OURS[candidate.name][1] else None,
        "tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "peak_bytes": candidate.peak,
        "state_bytes": state_bytes(candidate.step),
        "kernel_seconds": candidate.kinds,
        "other_kernels": candidate.others,
        "samples": own,
    }


# -------------------------------------------------------------------------------------------------------- largest batch
def largest(peak_of: Callable[[int], int | None], memory: int, limit: int = 2**16) -> int:
    """The largest multiple of `MULTIPLE` that fits; 0: none does.

    Two small batches say how much memory each sequence takes, and so about where to look.

    Args:
        peak_of: bytes that so many sequences take; None: they do not fit.
        memory: of the device, in bytes.
        limit: sequences that are not tried any more.
    """
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        peak = peak_of(count) if count <= limit else None
        if peak is not None:
            peaks[count] = peak
        return peak is not None

    low = 0
    for high in (MULTIPLE, 8 * MULTIPLE):
        if not fits(high):
            break
        low = high
    else:
        low, high = _bracket(fits, low, _extrapolated(peaks, memory))
    while high - low > MULTIPLE:
        middle = (low + high) // (2 * MULTIPLE) * MULTIPLE
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _extrapolated(peaks: Mapping[int, int], memory: int) -> int:
    """Sequences, a multiple of `MULTIPLE`, whose peak is about `memory`, if peaks grow as between these two."""
    (few, low), (many, high) = peaks.items()
    count = many + (memory - high) * (many - few) / max(high - low, 1)
    return max(many + MULTIPLE, int(min(count, 2**20)) // MULTIPLE * MULTIPLE)


def _bracket(fits: Callable[[int], bool], low: int, start: int) -> tuple[int, int]:
    """A size that fits and a larger one that does not, by steps from `start` that double; `low` is known to fit."""
    step = MULTIPLE
    if fits(start):
        low = start
        while fits(low + step):
            low, step = low + step, 2 * step
        return low, low + step
    high = start
    while high - step > low and not fits(high - step):
        high, step = high - step, 2 * step
    return max(low, high - step), high


def peak_alone(name: str, setting: Setting, args, world: World) -> int | None:
    """Bytes at most while a variant alone takes two steps, the second with all of the optimizer's state there.

    None, where it runs out of memory.
    """
    allocated(world)
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make_step(name, setting, args, world, cuda_graphs="False")  # memory can run out cleanly
        step.connect()
        step.take(2)
        wait(world)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()
