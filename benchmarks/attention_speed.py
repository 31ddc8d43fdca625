#!/usr/bin/env python3
"""Attention of short sequences that lie end to end: torch's flash attention and kernels/short_attention.py.

    python3 benchmarks/attention_speed.py --output attention.json

They take turns, as CUDA graphs, over the heads of BERT-Large: `training` is forward and backward pass with dropout of
0.1, `inference` the forward pass without. Before it is timed, ours without dropout is compared with flash attention.
The bytes are the fewest: query, key and value read, the output written; then these and its gradient read, theirs
written.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import DTYPES, Report, benchmark_parser, check, hopper_gpu, parse_benchmark_flags
from benchmarks.timing import Timer, Timings, interleave
from modeling import Packing, packed_attention
from training.flags import run_door

HEADS, SIZE, LONGEST = 16, 64, 128
SEQUENCES = (64, 256, 512)
MEAN_LENGTHS = (128, 112)  # full, and as a corpus of articles has it
PASSES = {"training": 0.1, "inference": 0.0}  # and their dropout
WAYS = ("flash", "short")


def packing_of(sequences: int, mean: int, device: torch.device, short: bool) -> Packing:
    """Three of four sequences full, the rest as short as the mean needs."""
    rest = LONGEST - 4 * (LONGEST - mean)
    lengths = torch.tensor([rest if number % 4 == 0 else LONGEST for number in range(sequences)])
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)
    return Packing(boundaries, boundaries[:-1], torch.empty(0), LONGEST, short)


def run_of(inputs: list[Tensor], grad: Tensor, packing: Packing, dropout_p: float, training: bool):
    """A call that computes the output and, in training, the gradients."""

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(training):
            out = packed_attention(*inputs, packing, dropout_p)
        return (out, *torch.autograd.grad(out, inputs, grad)) if training else (out,)

    return run


def measure(sequences: int, mean: int, name: str, args, device: torch.device) -> tuple[int, Timings]:
    """The number of tokens, and timings of both ways."""
    packings = {way: packing_of(sequences, mean, device, way == "short") for way in WAYS}
    tokens = int(packings["flash"].boundaries[-1])
    generator = torch.Generator(device).manual_seed(0)
    shape = (tokens, HEADS, SIZE)
    *inputs, grad = (torch.randn(shape, generator=generator, device=device).to(DTYPES[args.dtype]) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    flash, ours = (run_of(inputs, grad, packings[way], 0.0, True)() for way in WAYS)
    for what, result, expected in zip(("output", "dQ", "dK", "dV"), ours, flash, strict=True):
        check(what, result, expected)
    runs = {way: run_of(inputs, grad, packings[way], PASSES[name], name == "training") for way in WAYS}
    return tokens, interleave({way: Timer(run, args.sample_ms / 1e3) for way, run in runs.items()}, args.rounds)


COLUMNS = {
    "sequences": lambda r: f"{r['sequences']}",
    "mean length": lambda r: f"{r['mean_length']}",
    "pass": lambda r: r["pass"],
    "flash ms": lambda r: f"{r['flash_ms']:.3f}",
    "short ms": lambda r: f"{r['short_ms']:.3f}",
    "speed-up (least–greatest)": lambda r: f"×{r['speedup'].text()}",
    "TB/s of the fewest bytes": lambda r: f"{r['terabytes_per_second']:.2f}",
    "SM clock, power, share capped": lambda r: r["gpu_state"].text(),
}


def main() -> None:
    args = parse_benchmark_flags(benchmark_parser("Speed of attention for short sequences."))
    device = hopper_gpu()
    report = Report("attention_speed", args)
    report.table(f"attention of {HEADS} heads of size {SIZE}, at most {LONGEST} tokens, {args.dtype}", COLUMNS)
    for sequences in SEQUENCES[1:2] if args.quick else SEQUENCES:
        for mean in MEAN_LENGTHS:
            for name in PASSES:
                tokens, timings = measure(sequences, mean, name, args, device)
                tensors = 11 if name == "training" else 4
                seconds = timings.seconds("short")
                report.row(
                    {
                        "sequences": sequences,
                        "mean_length": mean,
                        "pass": name,
                        "flash_ms": timings.seconds("flash") * 1e3,
                        "short_ms": seconds * 1e3,
                        "speedup": timings.speedup("short"),
                        "terabytes_per_second": tensors * tokens * HEADS * SIZE * 2 / seconds / 1e12,
                        "gpu_state": timings.gpu,
                    }
                )
    report.end()


if __name__ == "__main__":
    run_door(main)
