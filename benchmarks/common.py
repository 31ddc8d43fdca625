"""What the benchmarks share: their flags, the machine, layers to compare, and a table on stdout beside a JSON file."""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import nvml
from kernels.backends import select_backends
from kernels.build import LIBRARIES, KernelsUnavailable
from kernels.native import loaded
from sparse_ops import N, SparseLinear, nm_mask
from training.errors import UsageError
from training.flags import Parser, add_switch, real, whole

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = 2e-2  # of the largest output: two roundings to bf16, and sums in another order
ROUNDS, QUICK_ROUNDS = 11, 5
NO_GPU = "needs a Hopper GPU (compute capability 9.0), and torch sees no CUDA device here"


# ---------------------------------------------------------------------------------------------------------------- flags
def benchmark_parser(description: str, shapes: Iterable[str] = (), timed: bool = True) -> Parser:
    """The flags that every benchmark has.

    Args:
        shapes: names that --shapes takes; no such flag where there are none.
        timed: whether it compares times.
    """
    parser = Parser(description=description)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the products")
    if shapes:
        parser.add_argument(
            "--shapes", type=names_among(tuple(shapes)), metavar="A,B", help=f"of {', '.join(shapes)} (default: all)"
        )
    if timed:
        parser.add_argument(
            "--rounds", type=whole(1), help=f"samples of each side (default: {ROUNDS}; with --quick {QUICK_ROUNDS})"
        )
        parser.add_argument(
            "--sample_ms", type=real(0.1, 1000), default=10.0, help="GPU time of a sample, in milliseconds"
        )
    add_switch(parser, "--quick", "a part of it, for a first look")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results, written after each row")
    return parser


def names_among(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A flag's type: some of the known names, with commas."""

    def parse(word: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(word.split(",")))
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"must be names of {', '.join(known)} with commas, not {word}")
        return names

    return parse


def parse_benchmark_flags(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, and find out before anything is measured whether the results can be written."""
    args = parser.parse_args(argv)
    if getattr(args, "rounds", 0) is None:
        args.rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.output:
        path = Path(args.output)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"--output {path}: cannot be written; give a file in an existing folder")
    return args


# -------------------------------------------------------------------------------------------------------------- machine
def hopper_gpu() -> torch.device:
    """The GPU that is measured.

    Raises:
        UsageError: when this machine has none that the kernels are for.
    """
    if not torch.cuda.is_available():
        raise UsageError(NO_GPU)
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        name = torch.cuda.get_device_name()
        raise UsageError(f"needs a Hopper GPU (compute capability 9.0), and {name} has {capability[0]}.{capability[1]}")
    return torch.device("cuda", torch.cuda.current_device())


def hopper_gpu_with_kernels(libraries: Iterable[str] = LIBRARIES) -> torch.device:
    """`hopper_gpu`, with the kernels compiled and loaded.

    Raises:
        UsageError: as `hopper_gpu`, and when the kernels cannot be had.
    """
    device = hopper_gpu()
    try:
        for library in libraries:
            loaded(library)
    except KernelsUnavailable as error:
        raise UsageError(str(error)) from error
    return device


def environment() -> dict:
    """What a reader has to know beside the numbers."""
    gpu = nvml()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python3", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "driver": None if gpu is None else gpu.driver(),
        **({"power_limit_watts": None, "max_sm_mhz": None} if gpu is None else gpu.limits()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
    }


# --------------------------------------------------------------------------------------------------------------- layers
def make_layers(
    sizes: Iterable[tuple[int, int]],
    device: torch.device,
    rank: int = 0,
    bias: bool = False,
    seed: int = 0,
    frozen: bool = False,
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Dense layers of (in, out) features, and the same ones pruned 2:4; the same seed gives the same weights.

    `frozen` is how a model stands for inference alone (`kernels.backends.rounds_values`).

    The weights are drawn from N(0, 0.02^2) as BERT's, and the adapters, if rank > 0, have outputs of that order too:
    zeros would take less power, and so less time, than what is trained.
    """
    generator, adapters = (torch.Generator(device).manual_seed(number) for number in (seed, seed + 1))
    dense, sparse = nn.ModuleList(), nn.ModuleList()
    for columns, out in sizes:
        linear = nn.Linear(columns, out, bias=bias, device=device)
        nn.init.normal_(linear.weight, std=0.02, generator=generator)
        dense.append(linear)
        pruned = SparseLinear(linear, nm_mask(linear.weight.detach().abs(), N, 4), m=4)
        if rank:
            pruned.add_adapters(rank, torch.Generator().manual_seed(seed))
            nn.init.normal_(pruned.lora_right, std=0.1, generator=adapters)
        sparse.append(pruned)
    return dense, sparse.requires_grad_(not frozen)


def run_on_kernels(layers: nn.Module, dtype: torch.dtype, tokens: int) -> None:
    """Let the sparse layers run on the 2:4 kernels, each product with the tile that is measured to be its fastest."""
    select_backends(layers, "cutlass", dtype, tokens, report=lambda line: None)


def check(what: str, result: Tensor, expected: Tensor) -> None:
    """No time is reported for a product that is wrong.

    Raises:
        RuntimeError: when `result` is not `expected` up to rounding.
    """
    error = ((result - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:  # a NaN is not
        raise RuntimeError(f"{what} is off by {error:.2g} of its largest element")


# -------------------------------------------------------------------------------------------------------------- results
class Report:
    """Rows of results: printed as Markdown tables as they come, and kept in a JSON file.

    Args:
        name: of the benchmark.
        args: its flags, kept with the results.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        self.output, self.began = args.output, time.monotonic()
        self.content = {"benchmark": name, "environment": environment(), "settings": vars(args), "rows": []}
        print(self._heading(), flush=True)

    def _heading(self) -> str:
        machine = self.content["environment"]
        limits = ", ".join(
            f"{machine[key]:.0f} {unit}"
            for key, unit in (("power_limit_watts", "W"), ("max_sm_mhz", "MHz at most"))
            if machine[key] is not None
        )
        known = (f"{key} {machine[key]}" for key in ("driver", "torch", "cuda", "cusparselt") if machine[key])
        gpu = (
            f"{machine['gpu']} ({limits})" if limits else f"{machine['gpu']} (clock and power: the driver does not say)"
        )
        return f"{machine['date']}, {gpu}, {', '.join(known)}\n\n    {machine['command']}"

    def table(self, title: str, columns: Mapping[str, Callable[[dict], str]]) -> None:
        """Begin a table: a column's heading, and what stands there in a row."""
        self.title, self.columns = title, columns
        print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)

    def row(self, record: dict) -> None:
        """Add a result to the present table and to the file."""
        self.content["rows"].append({"table": self.title, **record})
        print(f"| {' | '.join(cell(record) for cell in self.columns.values())} |", flush=True)
        self.write()

    def note(self, line: str) -> None:
        """A sentence about the results, under the table and in the file."""
        self.content.setdefault("notes", []).append(line)
        print(f"\n{line}", flush=True)
        self.write()

    def end(self) -> None:
        self.note(f"Measured in {time.monotonic() - self.began:.0f} s.")

    def write(self) -> None:
        if self.output:
            Path(self.output).write_text(json.dumps(self.content, indent=1, default=_plain) + "\n")


def _plain(value) -> dict:
    """Dataclasses of a record, for JSON."""
    if is_dataclass(value):
        return asdict(value)
    raise TypeError(f"{value!r} in a record")
