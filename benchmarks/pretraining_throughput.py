#!/usr/bin/env python3
"""Speed and memory of the whole pretraining step: our dense BERT-Large, our SLoPe, and Hugging Face's dense one.

    python3 benchmarks/pretraining_throughput.py --output step.json --picture step.png
    python3 benchmarks/pretraining_throughput.py --largest_batch --output largest.json
    python3 benchmarks/pretraining_throughput.py --input_dir DATA/phase2/train --output shards.json   # real lengths

A step is one optimizer step of run_pretraining.py (`PretrainingRun.give_step`): forward and backward pass of all
micro-steps, LAMB, the operands' refresh, and the host's work for them. The variants take turns, a sample each a round;
ratios are taken round by round, and their medians, least and greatest are shown.

dense, slope       random sequences of full length, 15% of the tokens predicted, learning rate 0
slope-16, -64      with adapters of that rank, as in the last 1% of the recipe's steps
huggingface        BertForPreTraining: compiled whole, SDPA, fused AdamW, replayed as a CUDA graph as ours; it scores
                   all tokens. It takes turns with dense apart from the others; where `transformers` is installed

Variants that are compared are on the GPU at once, with one pool of memory for all their activations. Peak memory is
that of one variant by itself: what it holds, and what its micro-step needs beyond that. The profiler slows the gaps
between kernels down, so its idle time is an upper bound.

With --input_dir: the run's own loader, with masking, reads real shards, and the step that computes padding takes turns
with the one that does not.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import huggingface_step, shard_throughput
from benchmarks.common import benchmark_parser, names_among, parse_benchmark_flags
from benchmarks.step_candidates import HUGGINGFACE, OURS, Setting, allocated, largest, measure, peak_alone
from benchmarks.step_profile import KIND_COLUMNS
from benchmarks.throughput_picture import draw
from benchmarks.timing import Spread
from benchmarks.training_step import MachineReport, machine
from configuration import BertConfig
from training.distributed import World, process_group, this_process
from training.errors import UsageError
from training.flags import Parser, add_attention_flag, add_dense_kernels_flag, add_switch, real, run_door, whole

CONFIG = Path(__file__).resolve().parent.parent / "config" / "bert_large_uncased_config.json"
VARIANTS = (*OURS, HUGGINGFACE)
SHAPES, QUICK_SHAPES = "128x64,128x256,128x512,512x16,512x64,512x128", "128x256,512x64"
COMPARED, QUICK_COMPARED = "128x256,512x64", "128x256"  # of these, with Hugging Face's
ROUNDS, QUICK_ROUNDS = 5, 3


# ---------------------------------------------------------------------------------------------------------------- flags
def settings_of(word: str) -> tuple[Setting, ...]:
    """A flag's type: 128x256 is 256 sequences of 128 tokens."""
    found = []
    for part in word.split(","):
        length, times, sequences = part.partition("x")
        if not times:
            raise argparse.ArgumentTypeError(f"must be like 128x256, not {part}")
        found.append(Setting(whole(8)(length), whole(1)(sequences)))
    return tuple(dict.fromkeys(found))


def make_parser() -> Parser:
    parser = benchmark_parser("Speed and memory of BERT's whole pretraining step, dense and SLoPe.", timed=False)
    parser.add_argument("--picture", metavar="PNG", help="draw tokens/s, and where the time of a step goes")
    parser.add_argument(
        "--shapes",
        type=settings_of,
        metavar="SxB,SxB",
        help=f"tokens of a sequence x sequences of a micro-step (default: {SHAPES}; with --quick {QUICK_SHAPES})",
    )
    parser.add_argument(
        "--variants",
        type=names_among(VARIANTS),
        metavar="A,B",
        help=f"of {', '.join(VARIANTS)} (default: all that are installed); dense is always measured",
    )
    parser.add_argument(
        "--huggingface_shapes",
        type=settings_of,
        metavar="SxB,SxB",
        help=f"with Hugging Face's, which compiles long (default: {COMPARED}; --quick {QUICK_COMPARED})",
    )
    parser.add_argument("--accumulation", default=1, type=whole(1), help="micro-steps of a step")
    parser.add_argument("--model_config_file", default=str(CONFIG), metavar="JSON", help="the model's sizes")
    parser.add_argument("--optimizer", default="lamb", choices=("lamb", "fused-lamb"), help="of our variants")
    ours = parser.add_argument_group("our variants")
    add_attention_flag(ours)
    add_dense_kernels_flag(ours)
    parser.add_argument("--rounds", type=whole(1), help=f"samples of each (default: {ROUNDS}; --quick {QUICK_ROUNDS})")
    parser.add_argument("--sample_seconds", type=real(0), help="of a sample (default: 0.5; with --input_dir 3)")
    parser.add_argument("--profile_steps", default=3, type=whole(0), help="steps that are profiled; 0: none")
    add_switch(parser, "--largest_batch", "find the largest batch that fits instead, for the lengths in --shapes")
    shards = parser.add_argument_group("real shards")
    shards.add_argument("--input_dir", metavar="DIR", help="shards to train on, padded and unpadded")
    shards.add_argument("--local_batch_size", type=whole(1), help="sequences (default: 16,384 tokens' worth)")
    shards.add_argument("--num_workers", default=4, type=whole(0), help="loader processes of each of both")
    return parser


def read_flags(world: World) -> argparse.Namespace:
    """The flags, checked as far as they can be before anything is started."""
    parser = make_parser()
    given = parser.parse_args().rounds
    args = parse_benchmark_flags(parser)
    args.rounds = given or (QUICK_ROUNDS if args.quick else ROUNDS)  # of long samples, so fewer than elsewhere
    if args.shapes is None:
        args.shapes = settings_of(QUICK_SHAPES if args.quick else SHAPES)
    if args.huggingface_shapes is None:
        args.huggingface_shapes = settings_of(QUICK_COMPARED if args.quick else COMPARED)
    if args.sample_seconds is None:
        args.sample_seconds = 3.0 if args.input_dir else 0.5
    settle_variants(args)
    positions = BertConfig.from_json_file(args.model_config_file).max_position_embeddings
    too_long = [setting for setting in args.shapes if setting.length > positions]
    if too_long and not args.input_dir:
        raise UsageError(f"--shapes {too_long[0]}: the model has {positions} positions")
    if args.largest_batch and world.device.type != "cuda":
        raise UsageError("--largest_batch: needs a GPU, whose memory can be full")
    if args.picture and (Path(args.picture).suffix != ".png" or not Path(args.picture).resolve().parent.is_dir()):
        raise UsageError(f"--picture {args.picture}: must end in .png and lie in an existing folder")
    if args.picture and (args.largest_batch or args.input_dir):
        raise UsageError("--picture: of random sequences alone, not with --largest_batch or --input_dir")
    return args


def settle_variants(args) -> None:
    """Dense first, since all others are compared with it."""
    installed = huggingface_step.available()
    if args.variants is None:
        args.variants = VARIANTS if installed else tuple(OURS)
    elif HUGGINGFACE in args.variants and not installed:
        raise UsageError(f"--variants {HUGGINGFACE}: needs the package transformers, which is not installed")
    args.variants = tuple(dict.fromkeys(("dense", *args.variants)))


# ---------------------------------------------------------------------------------------------------------- measurement
def compare(args, world: World, report: MachineReport) -> None:
    """The table of all shapes, then where the time goes."""
    report.table(title(args), COLUMNS)
    rows, notes = [], []
    ours = [name for name in args.variants if name != HUGGINGFACE]
    for setting in args.shapes:
        groups = [ours]
        if HUGGINGFACE in args.variants and setting in args.huggingface_shapes:
            groups.append(["dense", HUGGINGFACE])
        for group in groups:
            found, said = measure(group, setting, args, world)
            notes += said
            for row in found if group is ours else found[1:]:
                rows.append(row | {"state_of_dense": state_of(row) / state_of(found[0])})
                report.row(rows[-1])
            if group is not ours and found[1:]:
                ratio = Spread.of([other / own for own, other in zip(*(r["samples"] for r in found), strict=True)])
                notes.append(f"{setting}: our dense is ×{ratio.text()} as fast as Hugging Face's")
            allocated(world)  # gives back what these held
    profiled = [row for row in rows if row["kernel_seconds"]]
    if profiled:
        report.table("GPU time of a step, ms (share)", PROFILE_COLUMNS)
        for row in profiled:
            report.row({name: row[name] for name in ("sequence_length", "sequences", "variant", "kernel_seconds")})
    for note in dict.fromkeys(notes):
        report.note(note)
    if args.picture:
        draw(rows, title(args), Path(args.picture))
        print(f"wrote {args.picture}")


def find_largest(args, world: World, report: MachineReport) -> None:
    report.table(f"largest micro-batch that fits, {title(args)}", LARGEST_COLUMNS)
    for length in dict.fromkeys(setting.length for setting in args.shapes):
        found = {}
        for name in args.variants:
            if name in OURS:

                def peak(count: int, name: str = name, length: int = length) -> int | None:
                    bytes_at_most = peak_alone(name, Setting(length, count), args, world)
                    taken = "does not fit" if bytes_at_most is None else f"{bytes_at_most / 1e9:.1f} GB"
                    print(f"{name}, {count} x {length}: {taken}", file=sys.stderr, flush=True)  # each takes a while
                    return bytes_at_most

                found[name] = largest(peak, torch.cuda.mem_get_info()[1])
                ratio = found[name] / found["dense"] if found["dense"] else None
                report.row({"sequence_length": length, "variant": name, "sequences": found[name], "ratio": ratio})
    report.note("Without CUDA graphs.")


# -------------------------------------------------------------------------------------------------------------- results
def title(args) -> str:
    model = Path(args.model_config_file).stem.removesuffix("_config")
    return f"{model}, {args.dtype}, {args.optimizer}, accumulation {args.accumulation}"


def state_of(row: dict) -> int:
    return sum(row["state_bytes"].values())


def _or_dash(text: Callable[[dict], str], *names: str) -> Callable[[dict], str]:
    return lambda row: "–" if any(row[name] is None for name in names) else text(row)


COLUMNS = {
    "sequences x tokens": lambda r: f"{r['sequences']} x {r['sequence_length']}",
    "variant": lambda r: r["variant"],
    "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
    "ms a step (least–greatest)": lambda r: r["step"].text(2, 1e3),
    "against dense": _or_dash(lambda r: f"×{r['against_dense'].text()}", "against_dense"),
    "against slope": _or_dash(lambda r: f"×{r['against_slope'].text()}", "against_slope"),
    "useful TFLOP/s": lambda r: f"{r['tflops']:.1f}",
    "MFU": _or_dash(lambda r: f"{r['mfu']:.1%}", "mfu"),
    "peak GB": _or_dash(lambda r: f"{r['peak_bytes'] / 1e9:.2f}", "peak_bytes"),
    "state GB (of dense)": lambda r: f"{state_of(r) / 1e9:.3f} ({r['state_of_dense']:.3f})",
    "SM clock, power, share capped": lambda r: r["gpu"].text(),
}
PROFILE_COLUMNS = {
    "sequences x tokens": COLUMNS["sequences x tokens"],
    "variant": COLUMNS["variant"],
    **KIND_COLUMNS,
}
LARGEST_COLUMNS = {
    "tokens of a sequence": lambda r: f"{r['sequence_length']}",
    "variant": lambda r: r["variant"],
    "sequences": lambda r: f"{r['sequences']}",
    "of dense": _or_dash(lambda r: f"×{r['ratio']:.2f}", "ratio"),
}


def main() -> None:
    world = this_process()
    args = read_flags(world)
    with process_group(world):
        if args.input_dir:
            shard_throughput.run(args, world, [OURS[name][0] for name in args.variants if name in ("dense", "slope")])
            return
        report = MachineReport("pretraining_throughput", args, machine(world))
        (find_largest if args.largest_batch else compare)(args, world, report)
        report.end()


if __name__ == "__main__":
    run_door(main)
