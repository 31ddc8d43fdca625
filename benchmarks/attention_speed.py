#!/usr/bin/env python3
"""Attention of short sequences that lie end to end: torch's flash attention and kernels of ours, up to 128 tokens
kernels/short_attention.py, up to 512 kernels/blockwise_attention.py.

    python3 benchmarks/attention_speed.py --output attention.json

They take turns, as CUDA graphs, over the heads of BERT-Large: `training` is forward and backward pass with dropout of
0.1, `inference` the forward pass without. Ours takes query, key and value as one matrix and adds their bias, flash
attention takes them apart, with their biases in them. Before it is timed, ours without dropout is compared with it. The
bytes are the fewest: query, key and value read, the output written; then these and its gradient read, theirs written.
"""

import itertools
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import DTYPES, Report, benchmark_parser, check, hopper_gpu, parse_benchmark_flags
from benchmarks.timing import Timer, Timings, interleave
from modeling import Packing, packed_attention
from training.flags import run_door

HEADS, SIZE = 16, 64
SEQUENCES = {128: (64, 256, 512), 512: (16, 64, 128)}  # by the most tokens that one has
MEAN_LENGTHS = {128: (128, 112), 512: (512, 272)}  # full, and as a corpus of articles has it
PASSES = {"training": 0.1, "inference": 0.0}  # and their dropout
WAYS = ("flash", "short")


def boundaries_of(sequences: int, longest: int, mean: int, device: torch.device) -> Tensor:
    """Lengths lie evenly around the mean, up to the longest."""
    lengths = torch.linspace(2 * mean - longest, longest, sequences).round().long()
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)


class Attention:
    """A call that computes the output and, in training, the gradients of query, key and value."""

    def __init__(
        self, way: str, qkv: Tensor, grad: Tensor, boundaries: Tensor, longest: int, dropout_p: float, training: bool
    ):
        bias = torch.zeros(3 * HEADS * SIZE, device=qkv.device, requires_grad=True)
        if way == "short":
            from kernels.short_attention import short_attention  # imports Triton, which CPU builds of torch lack

            self.inputs = [qkv.detach().requires_grad_(), bias]
            self.attend = lambda qkv, bias: short_attention([qkv], bias, boundaries, dropout_p, longest)
        else:
            packing = Packing(boundaries, boundaries[:-1], torch.empty(0), longest)
            self.inputs = [part.contiguous().requires_grad_() for part in qkv.detach().unbind(1)]
            self.attend = partial(packed_attention, packing=packing, dropout_p=dropout_p)
        self.grad, self.training = grad, training

    def __call__(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.training):
            out = self.attend(*self.inputs)
        return [out, *(torch.autograd.grad(out, self.inputs, self.grad) if self.training else ())]


def measure(sequences: int, longest: int, mean: int, name: str, args, device: torch.device) -> tuple[int, Timings]:
    """The number of tokens, and timings of both ways."""
    boundaries = boundaries_of(sequences, longest, mean, device)
    tokens, generator = int(boundaries[-1]), torch.Generator(device).manual_seed(0)
    everything = torch.randn(tokens, 4, HEADS, SIZE, generator=generator, device=device).to(DTYPES[args.dtype])
    qkv, grad = everything[:, :3].contiguous(), everything[:, 3].contiguous()
    out, *gradients = Attention("flash", qkv, grad, boundaries, longest, 0.0, training=True)()
    found, grad_qkv, _ = Attention("short", qkv, grad, boundaries, longest, 0.0, training=True)()
    check("output", found, out)
    check("gradient", grad_qkv, torch.stack(gradients, 1))
    given = (qkv, grad, boundaries, longest, PASSES[name], name == "training")
    runs = {way: Attention(way, *given) for way in WAYS}
    return tokens, interleave({way: Timer(run, args.sample_ms / 1e3) for way, run in runs.items()}, args.rounds)


COLUMNS = {
    "at most": lambda r: f"{r['longest']}",
    "sequences": lambda r: f"{r['sequences']}",
    "mean length": lambda r: f"{r['mean_length']}",
    "pass": lambda r: r["pass"],
    "flash ms": lambda r: f"{r['flash_ms']:.3f}",
    "short ms": lambda r: f"{r['short_ms']:.3f}",
    "speed-up (least–greatest)": lambda r: f"×{r['speedup'].text()}",
    "TB/s of the fewest bytes": lambda r: f"{r['terabytes_per_second']:.2f}",
    "SM clock, power, share capped": lambda r: r["gpu_state"].text(),
}


def row(longest: int, sequences: int, mean: int, name: str, tokens: int, timings: Timings) -> dict:
    tensors, seconds = 11 if name == "training" else 4, timings.seconds("short")
    return {
        "longest": longest,
        "sequences": sequences,
        "mean_length": mean,
        "pass": name,
        "flash_ms": timings.seconds("flash") * 1e3,
        "short_ms": seconds * 1e3,
        "speedup": timings.speedup("short"),
        "terabytes_per_second": tensors * tokens * HEADS * SIZE * 2 / seconds / 1e12,
        "gpu_state": timings.gpu,
    }


def main() -> None:
    args = parse_benchmark_flags(benchmark_parser("Speed of attention for short sequences."))
    device = hopper_gpu()
    report = Report("attention_speed", args)
    report.table(f"attention of {HEADS} heads of size {SIZE}, {args.dtype}", COLUMNS)
    for longest, counts in SEQUENCES.items():
        cases = itertools.product(counts[1:2] if args.quick else counts, MEAN_LENGTHS[longest], PASSES)
        for sequences, mean, name in cases:
            measured = measure(sequences, longest, mean, name, args, device)
            report.row(row(longest, sequences, mean, name, *measured))
    report.end()


if __name__ == "__main__":
    run_door(main)
