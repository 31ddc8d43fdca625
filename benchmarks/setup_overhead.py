#!/usr/bin/env python3
"""What the 2:4 kernels cost beside the products: before the first step of BERT-Large, and in each step.

    python3 benchmarks/setup_overhead.py --output setup.json
    python3 benchmarks/setup_overhead.py --cache /tmp/kernels   # and SLOPE_KERNEL_CACHE=/tmp/kernels for later commands

Once        compiling the kernels into an empty cache, with all processors; tuning, with a cold and a warm cache;
            choosing the masks; making the operands
Each step   rebuilding all operands after the optimizer's step (`OperandRefresh`, W^{R,C} chosen anew), rounding the
            values as the forward products do, and gathering the kept ones from the dense gradients of all layers: GPU
            time as a replayed CUDA graph, host time of the calls without one. The last two run in every micro-step.
A call      host time of one product, forward and with its backward pass, against nn.Linear's

The share of a step is against the time of all matrix products of BERT-Large's 24 blocks, forward and backward, in one
micro-step of 16,384 tokens, from the same measurement as benchmarks/layer_speedup.py. A real step is longer, by
attention, norms and the optimizer, so the real share is smaller.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import layer_speedup
from benchmarks.common import (
    DTYPES,
    Report,
    benchmark_parser,
    hopper_gpu,
    hopper_gpu_with_kernels,
    make_layers,
    parse_benchmark_flags,
    run_on_kernels,
)
from benchmarks.timing import GpuWatch, Spread, Timer, host_seconds
from configuration import BertConfig
from kernels import build
from kernels.ops import gather
from modeling import BertForPreTraining, BertLayer, encoder_blocks, input_projections
from sparse_ops import OperandRefresh, add_adapters, named_layers, sparsify
from training.errors import UsageError
from training.flags import run_door
from training.sparsity import SparsityConfig

CONFIG = Path(__file__).resolve().parent.parent / "config" / "bert_large_uncased_config.json"
TOKENS = 16384
ADAPTER_RANK = 64
CALLS, CALL_TOKENS, CALL_WIDTH = 50, 128, 1024  # so few tokens that the GPU keeps up with the host


# ----------------------------------------------------------------------------------------------------------------- once
def fill_cache(args, folder: Path) -> None:
    """Let this process use the cache `folder`, empty but for the kernels themselves with --quick.

    Raises:
        UsageError: when it is not empty, or the kernels cannot be compiled.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--cache {folder}: must be an empty folder or none yet, since a cold cache is measured")
    if args.quick:
        with usage_errors():
            ready = build.build_all()
        folder.mkdir(parents=True, exist_ok=True)
        for library in ready.values():
            shutil.copy2(library, folder)
    os.environ["SLOPE_KERNEL_CACHE"] = str(folder)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Kernels that cannot be had are one line."""
    try:
        yield
    except build.KernelsUnavailable as error:
        raise UsageError(str(error)) from error


def seconds_of(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def report_compilation(report: Report) -> None:
    for name, library in build.LIBRARIES.items():
        with usage_errors():
            seconds = seconds_of(partial(build.library, name))
        units = f"{len(library.units)} unit{'s' if len(library.units) > 1 else ''}"
        report.row({"what": f"compiling {name} ({units}, {os.cpu_count()} processors)", "seconds": seconds})


def pruned_model(config: BertConfig, device: torch.device, dtype: torch.dtype, report: Report) -> nn.Module:
    """BERT-Large on the kernels; each part of its start is a row."""
    description, block = SparsityConfig("static-weight"), BertLayer(config)
    one_block = seconds_of(partial(sparsify, block, description, [("block", block)]))
    name = f"choosing all masks on the processor, {torch.get_num_threads()} threads (one block times the blocks)"
    report.row({"what": name, "seconds": one_block * config.num_hidden_layers})
    with torch.device(device):
        model = BertForPreTraining(config)
    prune = partial(sparsify, model, description, encoder_blocks(model), input_projections(model))
    report.row({"what": "choosing all masks on the GPU", "seconds": seconds_of(prune, torch.cuda.synchronize)})
    select = partial(run_on_kernels, model, dtype, TOKENS)
    for known in ("nothing in the cache", "tiles in the cache"):
        what = f"tuning for {TOKENS} tokens and making all operands, {known}"
        report.row({"what": what, "seconds": seconds_of(select, torch.cuda.synchronize)})
    return model


# --------------------------------------------------------------------------------------------------------------- a step
def gather_of(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """The gather of the kept gradients of all layers, from random dense ones."""
    layers = [layer for _, layer in named_layers(model)]
    gradients = [torch.randn(x.out_features, x.in_features, device=x.values.device, dtype=dtype) for x in layers]

    def gather_all() -> None:
        for layer, gradient in zip(layers, gradients, strict=True):
            gather(gradient, layer.mask_bits, layer.m)

    return gather_all


def rounding_of(model: nn.Module) -> Callable[[], None]:
    """What the forward products of all layers begin with."""
    layers = [layer for _, layer in named_layers(model)]

    def round_all() -> None:
        for layer in layers:
            layer.operands.forward_kept(layer)

    return round_all


def products_seconds(config: BertConfig, args, device: torch.device) -> float:
    """Forward and backward products of all blocks in a micro-step of `TOKENS` tokens, on the kernels."""
    setting = layer_speedup.Setting("bert-large", TOKENS, (0,))
    flags = argparse.Namespace(**vars(args), bias=False, passes=("training",))
    return layer_speedup.measure(setting, flags, device)["training"].seconds("rank 0") * config.num_hidden_layers


def report_steps(model: nn.Module, products: float, args, report: Report) -> None:
    """Refresh and gather without adapters, and the refresh with them."""

    def row(what: str, run: Callable[[], object]) -> float:
        timer = Timer(run, args.sample_ms / 1e3)
        with GpuWatch() as watch:
            gpu = Spread.of([timer.seconds() for _ in range(args.rounds)])
        host = host_seconds(run, torch.cuda.synchronize, args.rounds)
        record = {"what": what, "gpu": gpu, "host": host, "share": gpu.median / products, "gpu_state": watch.state}
        report.row(record)
        return gpu.median

    refresh, layers = OperandRefresh(model, interval=1).after_step, len(named_layers(model))
    parts = (
        row(f"operands of {layers} layers from their values", refresh),
        row(f"values of {layers} layers, rounded", rounding_of(model)),
        row(f"gradients of {layers} layers, gathered", gather_of(model, DTYPES[args.dtype])),
    )
    total = {"what": "together", "gpu": None, "host": None, "share": sum(parts) / products, "gpu_state": None}
    report.row(total)
    add_adapters(model, ADAPTER_RANK, seed=0)
    row(f"operands of {layers} layers with adapters of rank {ADAPTER_RANK}", refresh)


# --------------------------------------------------------------------------------------------------------------- a call
def report_calls(args, device: torch.device, report: Report) -> None:
    """One square layer with bias."""
    dtype = DTYPES[args.dtype]
    for rank in (0, ADAPTER_RANK):
        dense, sparse = make_layers([(CALL_WIDTH, CALL_WIDTH)], device, rank, bias=True)
        run_on_kernels(sparse, dtype, CALL_TOKENS)
        x = torch.randn(CALL_TOKENS, CALL_WIDTH, device=device, dtype=dtype, requires_grad=True)
        layers = {"SparseLinear" + (f", rank {rank}" if rank else ""): sparse[0]}
        if not rank:
            layers = {"nn.Linear": dense[0].to(dtype), **layers}
        for name, layer in layers.items():
            report.row({"what": name, **call_seconds(layer, x, args.rounds)})


def call_seconds(layer: nn.Module, x: Tensor, rounds: int) -> dict[str, Spread]:
    """Host time of a call for inference, for training, and with its backward pass."""
    grad_y = torch.randn_like(layer(x))
    inputs = (x, *layer.parameters())

    @torch.no_grad()
    def inference() -> None:
        for _ in range(CALLS):
            layer(x)

    def forward() -> None:
        for _ in range(CALLS):
            layer(x)

    def backward() -> None:
        for _ in range(CALLS):
            torch.autograd.grad(layer(x), inputs, grad_y)

    timed = {"inference": inference, "training": forward, "with_backward": backward}
    found = {name: host_seconds(run, torch.cuda.synchronize, rounds) for name, run in timed.items()}
    return {name: Spread(*(part / CALLS for part in (s.median, s.low, s.high))) for name, s in found.items()}


# ---------------------------------------------------------------------------------------------------------------- table
def _time(key: str, unit: float, digits: int) -> Callable[[dict], str]:
    return lambda record: "–" if record[key] is None else record[key].text(digits, unit)


ONCE_COLUMNS = {"once": lambda r: r["what"], "seconds": lambda r: f"{r['seconds']:.2f}"}
STEP_COLUMNS = {
    "in each step": lambda r: r["what"],
    "GPU ms (least–greatest)": _time("gpu", 1e3, 3),
    "host ms": _time("host", 1e3, 3),
    "share of the step's products": lambda r: f"{r['share']:.2%}",
    "SM clock, power, share capped": lambda r: "–" if r["gpu_state"] is None else r["gpu_state"].text(),
}
CALL_COLUMNS = {
    "host µs of a call (least–greatest)": lambda r: r["what"],
    "inference": _time("inference", 1e6, 1),
    "training, forward": _time("training", 1e6, 1),
    "forward and backward": _time("with_backward", 1e6, 1),
}


def main() -> None:
    parser = benchmark_parser("Cost of the 2:4 kernels beside the products: set-up, and refresh in each step.")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="an empty folder to compile into, which stays: SLOPE_KERNEL_CACHE of later commands (default: a "
        "temporary one; with --quick the kernels come from the present cache, and only tuning is cold)",
    )
    args = parse_benchmark_flags(parser)
    device = hopper_gpu()
    with tempfile.TemporaryDirectory(prefix="slope-kernels-") as temporary:
        fill_cache(args, Path(args.cache or temporary))
        measure(args, device)


def measure(args, device: torch.device) -> None:
    config = BertConfig.from_json_file(CONFIG)
    report = Report("setup_overhead", args)
    report.table("once, BERT-Large", ONCE_COLUMNS)
    if not args.quick:
        report_compilation(report)
    hopper_gpu_with_kernels()
    model = pruned_model(config, device, DTYPES[args.dtype], report)
    products = products_seconds(config, args, device)
    title = f"in each step, {args.dtype}, beside {products * 1e3:.2f} ms of products at {TOKENS} tokens"
    report.table(title, STEP_COLUMNS)
    report_steps(model, products, args, report)
    sizes = f"{CALL_TOKENS} tokens, {CALL_WIDTH} → {CALL_WIDTH} with bias"
    report.table(f"host time of a call, {args.dtype}, {sizes}", CALL_COLUMNS)
    report_calls(args, device, report)
    report.end()


if __name__ == "__main__":
    run_door(main)
