"""Pretraining on real shards with their real lengths: what it gains to compute no padding, and what data costs.

Both ways train on the same samples in the same order, each with a loader of its own, as run_pretraining.py does.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from benchmarks.step_candidates import allocated
from benchmarks.step_profile import KIND_COLUMNS, profile
from benchmarks.timing import GpuState, GpuWatch, Spread
from benchmarks.training_step import (
    MachineReport,
    Stepping,
    machine,
    predictions_of,
    random_model,
    run_flags,
    seconds_of,
)
from configuration import BertConfig
from data.loader import StepLoader, step_loader
from data.shard_files import ShardSet
from run_pretraining import open_shards
from training.distributed import World
from training.phases import Start
from training.sparsity import sparsity_from_flags

TOKENS = 16384  # of a micro-batch, unless --local_batch_size says another size
MANY_STEPS = 10**6  # more than are taken
WAYS = {"padded": "False", "unpadded": "True"}  # and their --unpad
WARM_UPS = 3  # steps, by which the length of a sample is settled
PREFETCHED = 2  # steps that a loader worker makes ahead
AT_LEAST = 4  # times as many steps in a sample as workers may have ready when it begins


class ShardSteps(Stepping):
    """A run from scratch, without its logs and checkpoints; its learning rate is 0."""

    slots = 0
    """Tokens computed by all steps so far, padding among them."""

    def __init__(self, args, config: BertConfig, world: World, shards: ShardSet):
        sparsity = sparsity_from_flags(args)
        model = random_model(config, sparsity, world, args.seed)
        super().__init__(args, config, world, Start(0, 0, MANY_STEPS), sparsity, model, shards, None)
        self.engine.connect()
        self.loader = self.new_loader()

    def new_loader(self) -> StepLoader:
        on_gpu = self.world.device.type == "cuda"
        return step_loader(self.dataset, self.args.num_workers, pin_memory=on_gpu, prefetch=PREFETCHED)

    def begin_again(self) -> None:
        """The next step is the first one of the shards."""
        self.loader.close()
        self.loader = self.new_loader()

    def next_batch(self, loader, stop):
        batch, counts = super().next_batch(loader, stop)
        self.slots += batch["input_ids"].numel()
        return batch, counts


@dataclass(frozen=True)
class Sample:
    """Of several steps, one way."""

    seconds: float
    tokens: float
    slots: int
    waited: float
    steps: int


def take_sample(run: ShardSteps, count: int, world: World) -> Sample:
    before = run.tokens, run.slots, run.waited
    seconds = count * seconds_of(run, count, world)
    after = run.tokens, run.slots, run.waited
    tokens, slots, waited = (late - early for late, early in zip(after, before, strict=True))
    return Sample(seconds, tokens, slots, waited, count)


def take_rounds(
    runs: dict[str, ShardSteps], args, world: World, watches: Mapping[str, AbstractContextManager]
) -> list[dict[str, Sample]]:
    """Rounds of a sample each way, of the same samples of the shards.

    A CUDA graph is captured for each number of tokens that comes up. So all steps are taken once before they count.
    How many make a sample goes by the padded way, whose micro-batches are of one size: behind its first step nothing is
    captured any more.

    Args:
        watches: a context each way, in which its samples are taken.
    """
    step = min(seconds_of(runs["padded"], 1, world) for _ in range(WARM_UPS))
    at_least = AT_LEAST * PREFETCHED * max(1, args.num_workers)
    count = max(at_least, math.ceil(args.sample_seconds / step))
    for run in runs.values():
        run.begin_again()
        run.take((1 + args.rounds) * count)
        run.begin_again()
        take_sample(run, count, world)  # what workers have made ahead is none yet
    rounds: list[dict[str, Sample]] = [{} for _ in range(args.rounds)]
    for samples in rounds:
        for way, run in runs.items():
            with watches[way]:
                samples[way] = take_sample(run, count, world)
    return rounds


def profiles(runs: dict[str, ShardSteps], steps: int) -> dict[str, dict[str, float]]:
    """Seconds of a step by kind of kernel, each way, of the same steps; nothing for no steps."""
    found = {}
    for way, run in runs.items() if steps else ():
        run.begin_again()
        found[way], _ = profile(run.take, steps)
    return found


def records(model: str, length: int, rounds: list[dict[str, Sample]]) -> list[dict]:
    """A record each way.

    `limit` is what the padding share allows: slots of the padded way over those of this one. It differs from round to
    round as much as sequences do, so each round's speed-up is held against its own (`reached`).
    """
    rows = []
    for way in WAYS:
        own = [samples[way] for samples in rounds]
        padded = [samples["padded"] for samples in rounds]
        slots, steps = sum(s.slots for s in own), sum(s.steps for s in own)
        speedups = [p.seconds / s.seconds for p, s in zip(padded, own, strict=True)]
        limits = [p.slots / s.slots for p, s in zip(padded, own, strict=True)]
        rows.append(
            {
                "model": model,
                "way": way,
                "sequence_length": length,
                "tokens_per_second": Spread.of([s.tokens / s.seconds for s in own]),
                "step": Spread.of([s.seconds / s.steps for s in own]),
                "padding_share": 1 - sum(s.tokens for s in own) / slots,
                "speedup": Spread.of(speedups),
                "limit": Spread.of(limits),
                "reached": Spread.of([speedup / limit for speedup, limit in zip(speedups, limits, strict=True)]),
                "data_wait_share": sum(s.waited for s in own) / sum(s.seconds for s in own),
                "steps": steps,
            }
        )
    return rows


COLUMNS = {
    "model": lambda r: r["model"],
    "": lambda r: r["way"],
    "real tokens/s": lambda r: r["tokens_per_second"].text(0),
    "ms a step": lambda r: r["step"].text(2, 1e3),
    "computed but padding": lambda r: f"{r['padding_share']:.1%}",
    "against padded": lambda r: f"×{r['speedup'].text()}",
    "padding allows": lambda r: f"×{r['limit'].text()}",
    "of that": lambda r: r["reached"].text(3),
    "of the step waited for data": lambda r: f"{r['data_wait_share']:.2%}",
    "steps": lambda r: f"{r['steps']}",
    "SM clock, power, share capped": lambda r: r["gpu"].text(),
}

PROFILE_COLUMNS = {"model": COLUMNS["model"], "": COLUMNS[""], **KIND_COLUMNS}

FORWARDED = ("model_config_file", "optimizer", "input_dir", "num_workers", "dense_kernels")


def flags_for(model: str, way: str, args, length: int, sequences: int) -> SimpleNamespace:
    """The run's flags: the recipe's predictions, one process."""
    shared = {name: getattr(args, name) for name in FORWARDED}
    return run_flags(
        model,
        **shared,
        precision=args.dtype,
        local_batch_size=sequences,
        global_batch_size=sequences * args.accumulation,
        max_predictions_per_seq=predictions_of(length),
        masked_token_fraction=0.15,
        unpad=WAYS[way],
        attention=args.attention if way == "unpadded" else "auto",
        max_steps=MANY_STEPS,
    )


def run(args, world: World, models: Sequence[str]) -> None:
    """The table of all models."""
    config = BertConfig.from_json_file(args.model_config_file)
    files = {"model_config_file": args.model_config_file, "input_dir": args.input_dir}
    shards, _ = open_shards(run_flags("dense", **files), config)
    length = shards.sequence_length
    sequences = args.local_batch_size or max(1, TOKENS // length)
    report = MachineReport("pretraining_throughput, real shards", args, machine(world))
    name = Path(args.model_config_file).stem.removesuffix("_config")
    report.table(
        f"{name}, {shards.total:,} sequences of at most {length} tokens, {args.accumulation} x {sequences} a step, "
        f"{args.dtype}, {args.optimizer}",
        COLUMNS,
    )
    on_gpu, kinds = world.device.type == "cuda", {}
    for model in models:
        runs = {way: ShardSteps(flags_for(model, way, args, length, sequences), config, world, shards) for way in WAYS}
        watches = {way: GpuWatch() if on_gpu else nullcontext() for way in WAYS}
        rounds = take_rounds(runs, args, world, watches)
        kinds |= {(model, way): found for way, found in profiles(runs, args.profile_steps if on_gpu else 0).items()}
        for way in WAYS:
            runs[way].loader.close()
        for row in records(model, length, rounds):
            report.row(row | {"gpu": getattr(watches[row["way"]], "state", GpuState(None, None, None))})
        del runs
        allocated(world)  # gives back what these held
    if kinds:
        report.table("GPU time of a step, ms (share)", PROFILE_COLUMNS)
        for (model, way), found in kinds.items():
            report.row({"model": model, "way": way, "kernel_seconds": found})
    report.end()
