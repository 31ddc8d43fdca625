#!/usr/bin/env python3
"""Speed of the 2:4 product X (W^R)^T of one layer against the dense one, product by product.

    python3 benchmarks/spmm_speedup.py --output spmm.json                # bf16, BERT-Large and OPT-2.6B to 66B
    python3 benchmarks/spmm_speedup.py --dtype fp16 --shapes bert-large

A row is one product: [tokens, in] times [out, in]^T. Forward and input gradient of a layer in -> out are the rows
in -> out and out -> in. What is compared takes turns (benchmarks/timing.py), each as a replayed CUDA graph:

    cuBLAS       torch.mm with the dense weight: what a dense model runs
    2:4          SparseLinear on the kernels, its weight rounded before as cuBLAS's is (the layer is frozen), with the
                 tile that the start of a training run would choose
    cuSPARSELt   PyTorch's torch._cslt_sparse_mm of the same pruned weight, with its output as [out, tokens] and as
                 [tokens, out] (bf16 only)

The limit of the method is x2. With adapters the 2:4 side also computes (X L) R / r; the dense side does not.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    DTYPES,
    Report,
    benchmark_parser,
    check,
    hopper_gpu_with_kernels,
    make_layers,
    parse_benchmark_flags,
    run_on_kernels,
)
from benchmarks.timing import Spread, Timer, Timings, interleave
from kernels.autotune import choice_of
from sparse_ops import SparseLinear
from training.flags import run_door

LIMIT = 2.0
BERT_LARGE = ((1024, 3072), (3072, 1024), (1024, 1024), (1024, 4096), (4096, 1024))  # the fused q, k, v both ways
BERT_TOKENS = (16384, 32768, 65536)
OPT_HIDDEN = {"opt-2.6b": 2560, "opt-6.6b": 4096, "opt-13b": 5120, "opt-30b": 7168, "opt-66b": 9216}
OPT_TOKENS = 8192
ADAPTED_HIDDEN = (4096, 5120)
RANK_SHARE = 64  # rank hidden/64: adapters of 1.56%
GROUPS = ("bert-large", *OPT_HIDDEN, "adapters")


@dataclass(frozen=True)
class Product:
    group: str
    tokens: int
    columns: int
    out: int
    rank: int = 0


def _of_hidden(group: str, hidden: int, rank: int = 0) -> list[Product]:
    sizes = ((hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
    return [Product(group, OPT_TOKENS, *size, rank) for size in sizes]


def all_products() -> list[Product]:
    products = [Product("bert-large", tokens, *size) for tokens in BERT_TOKENS for size in BERT_LARGE]
    for group, hidden in OPT_HIDDEN.items():
        products += _of_hidden(group, hidden)
    for hidden in ADAPTED_HIDDEN:
        products += _of_hidden("adapters", hidden, hidden // RANK_SHARE)
    return products


def _in_quick(product: Product) -> bool:
    return (product.group == "bert-large" and product.tokens == 16384) or (
        product.group in ("opt-6.6b", "adapters") and product.columns == 4096 < product.out
    )


def _beside_cusparselt(product: Product) -> bool:
    """A few products: capturing a call takes cuSPARSELt a third of a millisecond of host time."""
    return not product.rank and (
        (product.group == "bert-large" and product.tokens == 16384) or product.group == "opt-6.6b"
    )


def select(shapes: tuple[str, ...] | None, quick: bool) -> list[Product]:
    """The products that the flags ask for; all of a group that is named."""
    if shapes is not None:
        return [product for product in all_products() if product.group in shapes]
    return [product for product in all_products() if not quick or _in_quick(product)]


# ---------------------------------------------------------------------------------------------------------- measurement
def cusparselt_calls(x: Tensor, pruned: Tensor) -> dict[str, Callable[[], Tensor]]:
    """x [tokens, in] times pruned [out, in]^T in both layouts; each returns a view [tokens, out]."""
    compressed, tokens = torch._cslt_compress(pruned), x.shape[0]

    def as_rows(result: Tensor) -> Tensor:
        return result if result.shape[0] == tokens else result.t()

    return {
        "cusparselt_out_tokens": lambda: as_rows(torch._cslt_sparse_mm(compressed, x.t())),
        "cusparselt_tokens_out": lambda: as_rows(torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True)),
    }


def cusparselt_timers(x: Tensor, pruned: Tensor, expected: Tensor, sample_seconds: float) -> tuple[dict, dict]:
    """Timers of the layouts that work, and the reasons why others do not."""
    if x.dtype is not torch.bfloat16:
        return {}, {"cusparselt": "compared in bf16 only"}
    if not torch.backends.cusparselt.is_available():
        return {}, {"cusparselt": "this torch has no cuSPARSELt"}
    timers, reasons = {}, {}
    for name, call in cusparselt_calls(x, pruned).items():
        try:
            check(name, call(), expected)
            timers[name] = Timer(call, sample_seconds)
        except RuntimeError as error:
            reasons[name] = str(error).splitlines()[0]
    return timers, reasons


@torch.no_grad()
def measure(product: Product, args, device: torch.device) -> dict:
    dtype, sample_seconds = DTYPES[args.dtype], args.sample_ms / 1e3
    dense_layers, sparse_layers = make_layers([(product.columns, product.out)], device, product.rank, frozen=True)
    weight, layer = dense_layers[0].weight.to(dtype), sparse_layers[0]
    run_on_kernels(sparse_layers, dtype, product.tokens)
    x = torch.randn(product.tokens, product.columns, device=device, dtype=dtype)
    pruned = (layer.dense_weight() + layer.adapter_weight()).to(dtype)
    expected = torch.mm(x, pruned.t())
    check(f"the 2:4 product {product}", layer(x), expected)
    del dense_layers
    timers = {
        "dense": Timer(lambda: torch.mm(x, weight.t()), sample_seconds),
        "sparse": Timer(lambda: layer(x), sample_seconds),
    }
    reasons = {}
    if args.cusparselt == "all" or (args.cusparselt == "few" and _beside_cusparselt(product)):
        more, reasons = cusparselt_timers(x, pruned, expected, sample_seconds)
        timers |= more
    return record_of(product, interleave(timers, args.rounds), reasons, layer)


def record_of(product: Product, timings: Timings, reasons: dict[str, str], layer: SparseLinear) -> dict:
    floating_point_operations = 2 * product.tokens * product.columns * product.out
    choice = choice_of(product.tokens, product.out, product.columns // 2, layer.operands.dtype)
    return {
        **asdict(product),
        "dense_ms": timings.seconds("dense") * 1e3,
        "dense_tflops": floating_point_operations / timings.seconds("dense") / 1e12,
        "sparse_ms": timings.seconds("sparse") * 1e3,
        "speedup": timings.speedup("sparse"),
        "tile": {"variant": choice.variant, "group": choice.group},
        "cusparselt": {name: timings.speedup(name) for name in timings.samples if name.startswith("cusparselt")},
        "not_run": reasons,
        "gpu_state": timings.gpu,
    }


# ---------------------------------------------------------------------------------------------------------------- table
def _cusparselt_cell(layout: str) -> Callable[[dict], str]:
    def cell(record: dict) -> str:
        spread: Spread | None = record["cusparselt"].get(f"cusparselt_{layout}")
        return "–" if spread is None else f"×{spread.median:.2f}"

    return cell


COLUMNS = {
    "model": lambda r: r["group"] + (f", rank {r['rank']}" if r["rank"] else ""),
    "tokens": lambda r: str(r["tokens"]),
    "in → out": lambda r: f"{r['columns']} → {r['out']}",
    "cuBLAS ms": lambda r: f"{r['dense_ms']:.3f}",
    "TFLOP/s": lambda r: f"{r['dense_tflops']:.0f}",
    "2:4 ms": lambda r: f"{r['sparse_ms']:.3f}",
    "speed-up (least–greatest)": lambda r: f"×{r['speedup'].text()}",
    "of the ×2 limit": lambda r: f"{r['speedup'].median / LIMIT:.0%}",
    "tile": lambda r: f"{r['tile']['variant']}, group {r['tile']['group']}",
    "cuSPARSELt [out, tokens]": _cusparselt_cell("out_tokens"),
    "[tokens, out]": _cusparselt_cell("tokens_out"),
    "SM clock, power, share capped": lambda r: r["gpu_state"].text(),
}


def main() -> None:
    parser = benchmark_parser("Speed of the 2:4 products against cuBLAS and cuSPARSELt, product by product.", GROUPS)
    parser.add_argument(
        "--cusparselt",
        choices=("few", "all", "none"),
        default="few",
        help="at which products PyTorch's cuSPARSELt is timed too; few: BERT-Large at 16,384 tokens, and OPT-6.6B",
    )
    args = parse_benchmark_flags(parser)
    device = hopper_gpu_with_kernels()
    report = Report("spmm_speedup", args)
    report.table(f"2:4 products against dense ones, {args.dtype}", COLUMNS)
    missing = {}
    for product in select(args.shapes, args.quick):
        record = measure(product, args, device)
        report.row(record)
        missing |= record["not_run"]
        torch.cuda.empty_cache()
    for name, reason in missing.items():
        report.note(f"{name.replace('_', ' ')}: not run ({reason})")
    report.end()


if __name__ == "__main__":
    run_door(main)
