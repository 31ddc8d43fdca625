"""For the tests of scripts/reproduce.py: data in its layout, small, and processes forked from one that has torch."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pretraining_runs
from pretraining_runs import LENGTH
from shard_factory import write_shard
from squad_factory import write_vocabulary

from training.flags import run_door

HIDDEN = 32


def make_data(folder: Path) -> Path:
    """Vocabulary, shards and `model.json`; 63 training sequences. What is fine-tuned on is the test's own."""
    size = len(write_vocabulary(folder / "vocab.txt").read_text().splitlines())
    options = {"length": LENGTH, "vocab_size": size}
    for number in range(3):
        write_shard(folder / f"phase1/train/shard_{number}.hdf5", count=20 + number, seed=number, **options)
    write_shard(folder / "phase1/heldout/shard_0.hdf5", count=11, seed=9, **options)
    # Positions for run_squad.py's windows; dropout as it is by default, so that a branch has to draw it right.
    sizes = {"vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": 64, "max_position_embeddings": 384}
    (folder / "model.json").write_text(json.dumps(pretraining_runs.MODEL | sizes))
    return folder


class Forked:
    """Stands for `subprocess.Popen` of one of the doors; `prepare` are importable functions that it calls first."""

    def __init__(
        self,
        command: Sequence[str],
        place: Mapping[str, str],
        log: Path | None = None,
        prepare: Sequence[Callable[[], None]] = (),
    ):
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        arguments = (Path(command[1]).stem, list(command[2:]), list(prepare), log)
        self.process = pretraining_runs._context().Process(target=_run, args=arguments)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def _run(door: str, flags: list[str], prepare: list, log: Path | None) -> None:
    if log is not None:
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [f"{door}.py", *flags]
    for function in prepare:
        function()
    run_door(importlib.import_module(door).main)
