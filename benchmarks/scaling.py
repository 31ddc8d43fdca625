#!/usr/bin/env python3
"""Weak scaling of BERT-Large pretraining over the GPUs of one host, dense and SLoPe: what more processes cost a step.

    python3 benchmarks/scaling.py --output scaling.json --picture scaling.png         # 1, 2, 4, ... up to all GPUs
    torchrun --standalone --nproc_per_node 8 benchmarks/scaling.py --output 8.json    # one of these launches alone
    python3 benchmarks/scaling.py --processes 8 --earlier 4.json --output 8.json      # after a command with 1,2,4

The step is run_pretraining.py's own (`PretrainingRun.give_step`: LAMB, losses summed over all processes, CUDA graphs),
with random sequences, as many for each process whatever their number. Its learning rate is 0: the processes stay alike,
also where their gradients are not averaged. In each launch three ways of taking it take turns, a sample each a round:

    together    as in training: the last micro-step's backward pass averages the gradients over all processes
    apart       as together, but no gradient is averaged
    alone       the first process takes the step by itself, while the others wait

tokens/s      of all processes, together
efficiency    alone / together: the time of a step on one GPU over that on all, the same work for each
not hidden    together - apart: what averaging the gradients adds to a step, beyond what the backward pass hides
all-reduced   bytes of the gradients that each process hands over in a step: of the buckets they lie in

Times are the slowest process's, from all processes being idle until all are again. Medians of rounds; differences and
ratios are taken round by round.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import benchmark_parser, names_among, parse_benchmark_flags
from benchmarks.scaling_picture import draw
from benchmarks.timing import GpuState, GpuWatch, Spread
from benchmarks.training_step import (
    MODELS,
    MachineReport,
    TrainingStep,
    machine,
    own_command,
    prediction_flags,
    run_flags,
)
from configuration import BertConfig
from training.distributed import World, gather_objects, process_group, sum_over_ranks, this_process
from training.errors import UsageError
from training.flags import Parser, add_graph_flag, read_json, real, run_door, whole

CONFIG = Path(__file__).resolve().parent.parent / "config" / "bert_large_uncased_config.json"
COMMUNICATIONS = ("fp32", "bf16")
# Flags that a launch takes over from the command that starts it, besides --rounds.
FORWARDED = (
    *("models", "accumulations", "gradient_communication", "dtype", "local_batch_size", "sequence_length"),
    *("model_config_file", "optimizer", "cuda_graphs", "sample_seconds"),
)


# ---------------------------------------------------------------------------------------------------------------- flags
def whole_numbers(word: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(whole(1)(part) for part in word.split(",")))


def make_parser() -> Parser:
    parser = benchmark_parser("Weak scaling of BERT pretraining over processes, dense and SLoPe.", timed=False)
    parser.add_argument(
        "--processes",
        type=whole_numbers,
        metavar="N,N",
        help="launch torchrun with each number of processes (default: 1, 2, 4, ... up to the GPUs; without one 1,2)",
    )
    parser.add_argument(
        "--earlier", metavar="JSON", help="an --output of other numbers of processes, whose rows come first"
    )
    parser.add_argument("--picture", metavar="PNG", help="draw tokens/s and efficiency, after the last launch")
    parser.add_argument("--models", type=names_among(tuple(MODELS)), default=",".join(MODELS), metavar="A,B")
    parser.add_argument(
        "--accumulations", type=whole_numbers, default="1,8", metavar="N,N", help="micro-steps of a step"
    )
    parser.add_argument(
        "--gradient_communication",
        type=names_among(COMMUNICATIONS),
        default=",".join(COMMUNICATIONS),
        metavar="A,B",
        help="what gradients are averaged in",
    )
    parser.add_argument("--model_config_file", default=str(CONFIG), metavar="JSON", help="the model's sizes")
    parser.add_argument("--local_batch_size", default=64, type=whole(1), help="sequences of a process's micro-step")
    parser.add_argument("--sequence_length", default=128, type=whole(8), help="tokens of a sequence")
    parser.add_argument("--optimizer", default="fused-lamb", choices=("lamb", "fused-lamb"))
    add_graph_flag(parser)
    parser.add_argument("--rounds", type=whole(1), help="samples of each way (default: 11; with --quick 5)")
    parser.add_argument("--sample_seconds", default=0.2, type=real(0), help="of a sample; at least one step")
    return parser


def read_flags() -> argparse.Namespace:
    """The flags, checked as far as they can be before anything is started."""
    args = parse_benchmark_flags(make_parser())
    config = BertConfig.from_json_file(args.model_config_file)
    if args.sequence_length > config.max_position_embeddings:
        raise UsageError(
            f"--sequence_length {args.sequence_length}: the model has {config.max_position_embeddings} positions"
        )
    if "WORLD_SIZE" in os.environ:
        for flag in ("processes", "earlier", "picture"):
            if getattr(args, flag):
                raise UsageError(f"--{flag}: not under torchrun, which says how many processes there are")
        return args
    gpus = torch.cuda.device_count()
    if args.processes is None:
        args.processes = tuple(2**power for power in range(gpus.bit_length())) if gpus else (1, 2)
    if gpus and max(args.processes) > gpus:
        raise UsageError(f"--processes {max(args.processes)}: this machine has {gpus} GPUs, and each takes one process")
    if args.picture and (Path(args.picture).suffix != ".png" or not Path(args.picture).resolve().parent.is_dir()):
        raise UsageError(f"--picture {args.picture}: must end in .png and lie in an existing folder")
    return args


def training_flags(args, model: str) -> SimpleNamespace:
    """The flags of run_pretraining.py that stand for the rest of the training."""
    names = ("model_config_file", "local_batch_size", "optimizer", "cuda_graphs")
    shared = {name: getattr(args, name) for name in names}
    return run_flags(model, precision=args.dtype, **prediction_flags(args.sequence_length), **shared)


# ------------------------------------------------------------------------------------------------------------- the step
def ways_of(step: TrainingStep) -> dict[str, TrainingStep]:
    """The step as it is, without averaging, and as the only process's; all three share model and optimizer."""
    if step.world.size == 1:
        return {"together": step}
    apart, alone = copy.copy(step), copy.copy(step)
    apart.engine, alone.engine = copy.copy(step.engine), copy.copy(step.engine)
    apart.engine.sums_gradients = alone.engine.sums_gradients = False
    alone.world = alone.engine.world = replace(step.world, size=1)
    return {"together": step, "apart": apart, "alone": alone}


# --------------------------------------------------------------------------------------------------------------- timing
@dataclass
class Sampler:
    """Times the ways of taking a step, on all processes at once."""

    world: World
    steps: Mapping[str, TrainingStep]
    """By way, the base first."""
    repeats: int = 1
    """Steps of a sample."""

    def seconds(self, way: str) -> float:
        """Of one step, on the slowest process."""
        sum_over_ranks(self.world, [0.0])  # all begin at once
        elapsed = 0.0
        if way != "alone" or self.world.is_main:
            began = time.perf_counter()
            self.steps[way].take(self.repeats)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - began
        return max(gather_objects(self.world, elapsed)) / self.repeats

    def rounds(self, count: int, sample_seconds: float) -> list[dict[str, float]]:
        """Seconds of a step by way, of each round; first every way is warmed up, and the length of a sample settled."""
        for _ in range(2):  # the first allocates, and opens connections
            warm = {way: self.seconds(way) for way in self.steps}
        self.repeats = max(1, round(sample_seconds / warm["together"]))
        return [{way: self.seconds(way) for way in self.steps} for _ in range(count)]


def summary(rounds: list[dict[str, float]], tokens: int) -> dict:
    """What the rounds say; `tokens` of one step of all processes."""
    several = "alone" in rounds[0]
    together = Spread.of([way["together"] for way in rounds])
    return {
        "tokens_per_second": tokens / together.median,
        "step": together,
        "efficiency": Spread.of([way["alone"] / way["together"] for way in rounds] if several else [1.0]),
        "not_hidden": Spread.of([way["together"] - way["apart"] for way in rounds]) if several else None,
        "rounds": rounds,
    }


# ------------------------------------------------------------------------------------------------------------ a launch
def measure_model(model: str, args, world: World, report) -> list[str]:
    """All rows of one model, with every accumulation and communication; lines about what ran its sparse products."""
    config, flags = BertConfig.from_json_file(args.model_config_file), training_flags(args, model)
    step = TrainingStep(flags, config, world, args.sequence_length)
    for communication in args.gradient_communication if world.size > 1 else args.gradient_communication[:1]:
        flags.gradient_communication = communication
        step.connect()
        for accumulation in args.accumulations:
            step.repeat(accumulation)
            watching = GpuWatch() if world.device.type == "cuda" and world.is_main else None
            with watching or nullcontext():
                rounds = Sampler(world, ways_of(step)).rounds(args.rounds, args.sample_seconds)
            cell = {
                "processes": world.size,
                "model": model,
                "accumulation": accumulation,
                "gradients": communication if world.size > 1 else None,
                **summary(rounds, flags.global_batch_size * args.sequence_length),
                "all_reduced_bytes": step.engine.buckets.bytes if world.size > 1 else 0,
                "gpu": watching.state if watching else GpuState(None, None, None),
            }
            report.row(cell)
    step.engine.disconnect()
    return step.notes


def measure(args) -> None:
    """One process of a launch by torchrun, or the only one there is."""
    world = this_process()
    with process_group(world):
        report = ScalingReport("scaling", args, machines(world)) if world.is_main else SILENT
        report.table(title(args), COLUMNS)
        for note in [note for model in args.models for note in measure_model(model, args, world, report)]:
            report.note(note)
        report.end()


# -------------------------------------------------------------------------------------------------------------- results
def machines(world: World) -> dict:
    """What a reader has to know of the machine, with its number of GPUs."""
    known = machine(world)
    return known | {"gpu": f"{torch.cuda.device_count()} x {known['gpu']}"} if world.device.type == "cuda" else known


class ScalingReport(MachineReport):
    """A report of what other processes measured: it is told which machine they ran on, and adds shares of dense."""

    def row(self, record: dict) -> None:
        """Add a result; its bytes also as a share of those of the dense model, averaged in fp32."""
        reduced = record["all_reduced_bytes"]
        dense = [row["all_reduced_bytes"] for row in [*self.content["rows"], record] if is_base(row)]
        super().row({**record, "share_of_dense": reduced / dense[0] if dense and reduced else None})


def is_base(row: dict) -> bool:
    return row["model"] == "dense" and row["gradients"] == "fp32"


SILENT = SimpleNamespace(table=lambda *_: None, row=lambda _: None, note=lambda _: None, end=lambda: None)


def title(args) -> str:
    model = Path(args.model_config_file).stem.removesuffix("_config")
    return (
        f"{model}, {args.local_batch_size} x {args.sequence_length} tokens a process and micro-step, "
        f"{args.dtype}, {args.optimizer}, --cuda_graphs {args.cuda_graphs}"
    )


def _spread(name: str, digits: int, unit: float = 1.0) -> Callable[[dict], str]:
    return lambda record: "–" if record[name] is None else record[name].text(digits, unit)


COLUMNS = {
    "processes": lambda r: f"{r['processes']}",
    "model": lambda r: r["model"],
    "accumulation": lambda r: f"{r['accumulation']}",
    "gradients in": lambda r: r["gradients"] or "–",
    "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
    "ms a step (least–greatest)": _spread("step", 2, 1e3),
    "efficiency": _spread("efficiency", 3),
    "not hidden, ms": _spread("not_hidden", 2, 1e3),
    "all-reduced MB": lambda r: f"{r['all_reduced_bytes'] / 1e6:.1f}" if r["all_reduced_bytes"] else "–",
    "of dense in fp32": lambda r: "–" if r["share_of_dense"] is None else f"{r['share_of_dense']:.3f}",
    "SM clock, power, share capped": lambda r: r["gpu"].text(),
}


# -------------------------------------------------------------------------------------------------------- all launches
def launch(processes: int, args, folder: Path) -> dict:
    """Let torchrun run this script with so many processes; what they wrote. Its rows are shown as they come, on stderr.

    Raises:
        UsageError: when they failed; they have said why.
    """
    output = folder / f"{processes}.json"
    flags = {name: getattr(args, name) for name in (*FORWARDED, "rounds")} | {"output": output}
    words = [
        word
        for name, value in flags.items()
        for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}")
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    variables = {"OMP_NUM_THREADS": "1"} | os.environ  # torchrun's own default, which it would talk about
    code = subprocess.run([*torchrun, __file__, *words], env=variables, stdout=sys.stderr).returncode
    if code:
        raise UsageError(f"--processes {processes}: torchrun ended with exit code {code}; the reason stands above")
    return json.loads(output.read_text())


def read_earlier(args) -> dict:
    """What an earlier command wrote, of the same step on the same kind of GPU.

    Raises:
        UsageError: the file has no such results.
    """
    found = read_json(args.earlier, "--earlier")
    try:
        rows = [restored(row) for row in found["rows"]]
        tables, counts = {row["table"] for row in rows}, {row["processes"] for row in rows}
        gpu, version = found["environment"]["gpu"], found["environment"]["torch"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--earlier {args.earlier}: holds no rows of this benchmark") from error
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else gpu
    if tables != {title(args)}:
        raise UsageError(f"--earlier {args.earlier}: is of {', '.join(sorted(tables))}, not of {title(args)}")
    if not gpu.endswith(here) or version != torch.__version__:
        raise UsageError(f"--earlier {args.earlier}: is of {gpu} and torch {version}: not this machine's")
    if counts & set(args.processes):
        raise UsageError(f"--earlier {args.earlier}: holds {min(counts & set(args.processes))} processes already")
    return found


def restored(row: dict) -> dict:
    """A row of JSON with its quantities as objects again."""
    spreads = {name: Spread(**row[name]) for name in ("step", "efficiency", "not_hidden") if row[name]}
    clock = row["gpu"]["sm_mhz"]
    return row | spreads | {"gpu": GpuState(**row["gpu"] | {"sm_mhz": clock and Spread(**clock)})}


def compare(args) -> None:
    """Launch each number of processes in turn; their rows, after earlier ones, make one table, file and picture."""
    report, rows, notes = None, [], []
    earlier = [read_earlier(args)] if args.earlier else []
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for found in chain(earlier, (launch(processes, args, Path(folder)) for processes in args.processes)):
            if report is None:
                report = ScalingReport("scaling", args, found["environment"] | {"command": own_command()})
                report.table(title(args), COLUMNS)
            for row in found["rows"]:
                rows.append(restored(row))
                report.row(rows[-1])
            notes += found["notes"][:-1]  # the last is how long it took
    for note in dict.fromkeys(notes):
        report.note(note)
    report.end()
    if args.picture:
        draw(rows, title(args), Path(args.picture))
        print(f"wrote {args.picture}")


def main() -> None:
    args = read_flags()
    (measure if "WORLD_SIZE" in os.environ else compare)(args)


if __name__ == "__main__":
    run_door(main)
