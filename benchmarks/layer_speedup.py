#!/usr/bin/env python3
"""Speed of all matrix products of one transformer layer: dense, SLoPe, and SLoPe with adapters.

    python3 benchmarks/layer_speedup.py --output layer.json              # BERT-Large and OPT-2.6B, 6.6B and 13B, bf16
    python3 benchmarks/layer_speedup.py --dtype fp16 --shapes opt-13b

A layer of hidden size h has the products h -> 3h (query, key and value as one), h -> h, h -> 4h and 4h -> h. They run
through the layers that a model runs, nn.Linear with weights of the products' dtype and SparseLinear on the kernels,
with autograd, as one CUDA graph; attention, norms, activations and optimizer are not in it.

    training     forward, input gradient, weight gradient, and the gradient's sum over micro-steps in fp32: dense adds
                 the gradient of all weights, SLoPe gathers that of the kept ones and adds it; SLoPe
                 rounds its fp32 values, too
    inference    forward alone, of layers that are frozen: their weights are rounded before, as the dense ones' are

The limit of the method is x1.5 in training, since one product of three stays dense, and x2 in inference.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    DTYPES,
    Report,
    benchmark_parser,
    check,
    hopper_gpu_with_kernels,
    make_layers,
    names_among,
    parse_benchmark_flags,
    run_on_kernels,
)
from benchmarks.timing import Timer, Timings, interleave
from training.flags import add_switch, run_door

BERT_RANKS = (0, 16, 64)
RANK_SHARE = 64  # rank hidden/64: adapters of 1.56%
HIDDEN = {"bert-large": 1024, "opt-2.6b": 2560, "opt-6.6b": 4096, "opt-13b": 5120}
TOKENS = {"bert-large": (8192, 16384, 32768, 65536), "opt-2.6b": (16384,), "opt-6.6b": (8192,), "opt-13b": (8192,)}
QUICK_TOKENS = {"bert-large": (16384,)}
PASSES = ("training", "inference")


@dataclass(frozen=True)
class Setting:
    model: str
    tokens: int
    ranks: tuple[int, ...]

    @property
    def hidden(self) -> int:
        return HIDDEN[self.model]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(in, out) of the layer's products."""
        return [(self.hidden, 3 * self.hidden), (self.hidden, self.hidden), *self._feed_forward()]

    def _feed_forward(self) -> list[tuple[int, int]]:
        return [(self.hidden, 4 * self.hidden), (4 * self.hidden, self.hidden)]


def select(shapes: tuple[str, ...] | None, quick: bool) -> list[Setting]:
    """What the flags ask for; all token counts of a model that is named."""
    counts = QUICK_TOKENS if quick and shapes is None else TOKENS
    return [
        Setting(model, tokens, BERT_RANKS if model == "bert-large" else (0, HIDDEN[model] // RANK_SHARE))
        for model in counts
        if shapes is None or model in shapes
        for tokens in counts[model]
    ]


# ------------------------------------------------------------------------------------------------------------- products
@dataclass
class Data:
    """Inputs [tokens, in] and output gradients [tokens, out] of each product."""

    inputs: list[Tensor]
    grad_outputs: list[Tensor]

    @classmethod
    def random(cls, setting: Setting, dtype: torch.dtype, device: torch.device) -> "Data":
        def matrix(width: int) -> Tensor:
            return torch.randn(setting.tokens, width, device=device, dtype=dtype)

        inputs = [matrix(columns).requires_grad_() for columns, _ in setting.sizes]
        return cls(inputs, [matrix(out) for _, out in setting.sizes])


class Training:
    """Forward and backward of all products; the weights' gradients are added to fp32 sums, as over micro-steps."""

    def __init__(self, layers: Sequence[nn.Module], data: Data):
        self.layers, self.data = layers, data
        self.sums = [[torch.zeros_like(p, dtype=torch.float32) for p in layer.parameters()] for layer in layers]

    def __call__(self) -> None:
        outputs = [layer(x) for layer, x in zip(self.layers, self.data.inputs, strict=True)]
        work = zip(self.layers, self.data.inputs, outputs, self.data.grad_outputs, self.sums, strict=True)
        for layer, x, y, grad_y, sums in reversed(list(work)):
            _, *gradients = torch.autograd.grad(y, (x, *layer.parameters()), grad_y)
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient)


class Inference:
    """Forward of all products."""

    def __init__(self, layers: Sequence[nn.Module], data: Data):
        self.layers, self.data = layers, data

    @torch.no_grad()
    def __call__(self) -> None:
        for layer, x in zip(self.layers, self.data.inputs, strict=True):
            layer(x)


RUNS = dict(zip(PASSES, (Training, Inference), strict=True))


def check_layers(layers: nn.ModuleList, data: Data) -> None:
    """Outputs and input gradients are those of W^R and W^{R,C}."""
    for layer, x, grad_y in zip(layers, data.inputs, data.grad_outputs, strict=True):
        y = layer(x)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        with torch.no_grad():
            adapters, bias = layer.adapter_weight(), 0 if layer.bias is None else layer.bias.to(y.dtype)
            forward, backward = (
                (layer.dense_weight(double_pruned) + adapters).to(y.dtype) for double_pruned in (False, True)
            )
            check(f"output of {layer}", y, x @ forward.t() + bias)
            check(f"input gradient of {layer}", grad_x, grad_y @ backward)


# ---------------------------------------------------------------------------------------------------------- measurement
def build(
    setting: Setting, dtype: torch.dtype, device: torch.device, bias: bool, frozen: bool
) -> dict[str, nn.ModuleList]:
    """The same layer dense and with each rank of adapters."""
    layers = {}
    for rank in setting.ranks:
        dense, sparse = make_layers(setting.sizes, device, rank, bias, frozen=frozen)
        run_on_kernels(sparse, dtype, setting.tokens)
        layers.setdefault("dense", dense.to(dtype))
        layers[f"rank {rank}"] = sparse
    return layers


def measure(setting: Setting, args, device: torch.device) -> dict[str, Timings]:
    """Timings of each pass."""
    dtype = DTYPES[args.dtype]
    data, results = Data.random(setting, dtype, device), {}
    for name in args.passes:
        layers = build(setting, dtype, device, args.bias, frozen=name == "inference")
        for side, modules in layers.items():
            if side != "dense":
                check_layers(modules, data)
        timers = {side: Timer(RUNS[name](modules, data), args.sample_ms / 1e3) for side, modules in layers.items()}
        results[name] = interleave(timers, args.rounds)
    return results


def records(setting: Setting, name: str, timings: Timings) -> list[dict]:
    """A record for each rank."""
    products = 3 if name == "training" else 1
    operations = products * 2 * setting.tokens * sum(columns * out for columns, out in setting.sizes)
    rows = []
    for rank in setting.ranks:
        side = f"rank {rank}"
        rows.append(
            {
                **asdict(setting),
                "hidden": setting.hidden,
                "pass": name,
                "rank": rank,
                "dense_ms": timings.seconds("dense") * 1e3,
                "dense_tflops": operations / timings.seconds("dense") / 1e12,
                "slope_ms": timings.seconds(side) * 1e3,
                "speedup": timings.speedup(side),
                "adapter_cost": timings.ratio(side, "rank 0").median - 1 if rank else None,
                "gpu_state": timings.gpu,
            }
        )
    return rows


COLUMNS = {
    "model": lambda r: f"{r['model']}, {r['hidden']} wide",
    "tokens": lambda r: str(r["tokens"]),
    "pass": lambda r: r["pass"],
    "rank": lambda r: str(r["rank"]),
    "dense ms": lambda r: f"{r['dense_ms']:.3f}",
    "TFLOP/s": lambda r: f"{r['dense_tflops']:.0f}",
    "SLoPe ms": lambda r: f"{r['slope_ms']:.3f}",
    "speed-up (least–greatest)": lambda r: f"×{r['speedup'].text()}",
    "adapters cost": lambda r: "–" if r["adapter_cost"] is None else f"{r['adapter_cost']:+.1%}",
    "SM clock, power, share capped": lambda r: r["gpu_state"].text(),
}


def main() -> None:
    parser = benchmark_parser("Speed of all matrix products of a transformer layer, dense and SLoPe.", HIDDEN)
    parser.add_argument(
        "--passes", type=names_among(PASSES), default=",".join(PASSES), metavar="A,B", help="what is timed"
    )
    add_switch(parser, "--bias", "with biases and their gradients, on both sides; without them, products alone")
    args = parse_benchmark_flags(parser)
    device = hopper_gpu_with_kernels()
    report = Report("layer_speedup", args)
    report.table(f"all products of a layer, {args.dtype}{', with biases' if args.bias else ''}", COLUMNS)
    for setting in select(args.shapes, args.quick):
        for name, timings in measure(setting, args, device).items():
            for record in records(setting, name, timings):
                report.row(record)
        torch.cuda.empty_cache()
    report.end()


if __name__ == "__main__":
    run_door(main)
