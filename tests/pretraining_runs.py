"""Runs of run_pretraining.py on a tiny BERT, each a real process or several, forked from one that has imported torch.

A run takes milliseconds to start, can be killed, and has an exit code and standard streams of its own.
"""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shard_factory import write_premasked_shard, write_shard
from tqdm import tqdm

tqdm.get_lock()  # made before any fork: a run that made its own and was killed would leak it

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE, LENGTH = 61, 16
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LENGTH,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPOKEN = "run_pretraining.py: error: "  # how its one line begins
TIMEOUT = 120  # seconds; a run takes about one


# --------------------------------------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class TrainingFiles:
    """Paths of shards and model configurations, and the flags of a run on them."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout"

    @property
    def single(self) -> Path:
        """Shards of single sequences, without next-sentence labels."""
        return self.folder / "single"

    @property
    def premasked(self) -> Path:
        return self.folder / "premasked"

    @property
    def model(self) -> Path:
        """With dropout."""
        return self.folder / "model.json"

    @property
    def model_without_dropout(self) -> Path:
        return self.folder / "model_without_dropout.json"

    def flags(self, output: Path, **changes) -> list[str]:
        """The command line of the standard run; a change to None leaves the flag out."""
        flags = {
            "model_config_file": self.model,
            "input_dir": self.train,
            "output_dir": output,
            "max_steps": 20,
            "global_batch_size": 12,
            "local_batch_size": 3,
            "learning_rate": 4e-3,
            "max_predictions_per_seq": 4,
            "pruned_matrix": "static-weight",
            "add_lora": "lazy",
            "lazy_lora_fraction": 0.3,
            "num_steps_per_checkpoint": 5,
            "num_workers": 0,
            "disable_progress_bar": True,
        }
        return [
            word for name, value in (flags | changes).items() if value is not None for word in (f"--{name}", f"{value}")
        ]


def make_files(folder: Path) -> TrainingFiles:
    files = TrainingFiles(folder)
    for number in range(3):
        options = {"count": 20 + number, "length": LENGTH, "vocab_size": VOCAB_SIZE, "seed": number}
        write_shard(files.train / f"shard_{number}.hdf5", **options)
        write_shard(files.single / f"shard_{number}.hdf5", **options, next_sentence=False)
        write_premasked_shard(files.premasked / f"shard_{number}.hdf5", **options)
    write_shard(files.heldout / "shard_0.hdf5", count=11, length=LENGTH, vocab_size=VOCAB_SIZE, seed=9)
    write_model(files.model)
    write_model(files.model_without_dropout, **NO_DROPOUT)
    return files


def write_model(path: Path, **changes) -> Path:
    path.write_text(json.dumps(MODEL | changes))
    return path


# ---------------------------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Finished:
    """How a process ended. `code` is negative for a signal."""

    code: int
    stdout: str
    stderr: str


class Run:
    """A process that runs run_pretraining.py."""

    def __init__(self, flags: Sequence[str], environment: dict[str, str], prepare: Sequence[Callable[[], None]]):
        self.streams = Path(tempfile.mkdtemp(prefix="run-"))
        arguments = (list(flags), environment, self.streams, list(prepare))
        self.process = _context().Process(target=_run_pretraining, args=arguments)
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = TIMEOUT) -> Finished:
        """Wait for the end; a process that hangs is killed, and its code is then -9."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        streams = [(self.streams / name).read_text() for name in ("stdout", "stderr")]
        return Finished(self.process.exitcode, *streams)


def begin_run(flags: Sequence[str], *prepare: Callable[[], None]) -> Run:
    """Start a single process. `prepare` are functions that it calls first; they must be importable."""
    return Run(flags, {}, prepare)


def begin_ranks(flags: Sequence[str], ranks: int, *prepare: Callable[[], None]) -> list[Run]:
    """Start one process a rank, as a launcher would, but with nothing that watches over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [Run(flags, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare) for rank in range(ranks)]


def send_small_buckets() -> None:
    """So that a small model's gradients fill dozens; to be called in each rank, as `prepare`."""
    from training import gradients

    gradients.BUCKET_BYTES = 1024


def run(flags: Sequence[str], *prepare: Callable[[], None], ranks: int = 1, timeout: float = TIMEOUT) -> Finished:
    """Run to the end, which must be a good one; what rank 0 said."""
    runs = begin_ranks(flags, ranks, *prepare) if ranks > 1 else [begin_run(flags, *prepare)]
    ended = [process.finish(timeout) for process in runs]
    assert [end.code for end in ended] == [0] * ranks, ended
    return ended[0]


def _run_pretraining(flags: list[str], environment: dict[str, str], streams: Path, prepare: list) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(streams / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = ["run_pretraining.py", *flags]
    for function in prepare:
        function()
    from run_pretraining import main
    from training.flags import run_door

    run_door(main)


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretraining_runs", "run_pretraining", "torch.utils.tensorboard", "torch._dynamo"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *([before] if before else [])])
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


# ------------------------------------------------------------------------------------------------------ what goes wrong
def kill_after(step: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """For `prepare`: this signal once `step` is in the logs, before anything else happens."""
    return functools.partial(_signal_after, step, number)


def _signal_after(step: int, sent: signal.Signals) -> None:
    from training.logs import Logger

    log = Logger.step

    def log_and_die(self, number, metrics):
        log(self, number, metrics)
        if number == step:
            os.kill(os.getpid(), sent)

    Logger.step = log_and_die


def dies_after(step: int, flags: list[str]) -> None:
    """Run, and be killed once `step` is in the logs."""
    ended = begin_run(flags, kill_after(step)).finish()
    assert ended.code == -signal.SIGKILL, ended


# -------------------------------------------------------------------------------------------------------------- results
def snapshot(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder with its content; None where there is no folder."""
    if not folder.is_dir():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(flags: list[str], output: Path, *words: str) -> str:
    """Assert that the run is refused in one line with these words, and changes nothing; returns the line."""
    before = snapshot(output)
    ended = begin_run(flags).finish()
    assert ended.code == 2, ended
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(SPOKEN), ended.stderr
    for word in words:
        assert word in lines[0]
    assert snapshot(output) == before
    return lines[0]


def checkpoint(output: Path, step: int) -> dict:
    from training.checkpoint import load_checkpoint

    return load_checkpoint(output / "pretrain_ckpts" / f"ckpt_{step}.pt")


def metrics(output: Path, prefix: str = "logfile") -> list[dict[str, str]]:
    """The rows of the CSV, as written."""
    with (output / f"{prefix}_metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def values(output: Path, column: str = "step_loss") -> list[float]:
    """Of every row that has any."""
    return [float(row[column]) for row in metrics(output) if row[column]]


def losses(output: Path, prefix: str = "logfile") -> list[tuple[int, str]]:
    """(step, step_loss as written) of every row."""
    return [(int(row["step"]), row["step_loss"]) for row in metrics(output, prefix)]


def wait_for_step(output: Path, step: int, prefix: str = "logfile") -> None:
    """Until the run in `output` has logged `step`."""
    deadline = time.monotonic() + TIMEOUT
    path = output / f"{prefix}_metrics.csv"
    while time.monotonic() < deadline:
        if path.exists() and any(line.startswith(f"{step},") for line in path.read_text().splitlines()):
            return
        time.sleep(0.005)
    raise TimeoutError(f"step {step} did not come")


def assembled(flags: Sequence[str]):
    """The `PretrainingRun` of these flags in this process, as `main` builds it, before it takes a step."""
    from run_pretraining import (
        CHECKPOINTS,
        BertConfig,
        BertForPreTraining,
        PretrainingRun,
        build_model,
        find_start,
        open_shards,
        parse_arguments,
        settle_sparsity,
        this_process,
    )

    args, world = parse_arguments(list(flags)), this_process()
    config = BertConfig.from_json_file(args.model_config_file)
    shards, heldout = open_shards(args, config)
    start = find_start(args, Path(args.output_dir) / CHECKPOINTS, print)
    sparsity = settle_sparsity(args, start)
    model = build_model(
        lambda: BertForPreTraining(config), sparsity, start.source, seed=args.seed, mask_init=args.mask_init
    )
    return PretrainingRun(args, config, world, start, sparsity, model, shards, heldout)


def uneven_batch(rank: int = 0, ranks: int = 1):
    """This rank's part of one global batch of three micro-steps whose labels are spread as unevenly as can be.

    Masked tokens of the six samples: 3, 2, 1, 0, 0, 0; sentence labels: 0, 1, 1, none, none, none.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.full((6, 4), -1)
    positions = torch.zeros(6, 4, dtype=torch.int64)
    for sample, count in enumerate((3, 2, 1)):
        positions[sample, :count] = torch.randperm(LENGTH - 1, generator=generator)[:count].sort().values + 1
        labels[sample, :count] = torch.randint(5, VOCAB_SIZE, (count,), generator=generator)
    batch = {
        "input_ids": torch.randint(5, VOCAB_SIZE, (6, LENGTH), generator=generator),
        "token_type_ids": (torch.arange(LENGTH) > 7).long().expand(6, -1),
        "attention_mask": (torch.arange(LENGTH) < torch.tensor([[16], [10], [16], [5], [16], [1]])).long(),
        "masked_positions": positions,
        "masked_labels": labels,
        "next_sentence_labels": torch.tensor([0, 1, 1, -1, -1, -1]),
    }
    # Sample (k * ranks + rank) * B + slot of the global batch, as `StepDataset` deals them out.
    return {name: tensor.unflatten(0, (3, ranks, 2 // ranks))[:, rank] for name, tensor in batch.items()}
