"""Runs of several processes that are cut short: resumed by hand, also on other numbers of them, and by torchrun."""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pretraining_runs import (
    ROOT,
    SPOKEN,
    Run,
    begin_ranks,
    kill_after,
    losses,
    metrics,
    run,
)

from training.checkpoint import saved_steps


# ------------------------------------------------------------------------------------------- on other numbers of ranks
def record_samples(folder: Path) -> None:
    """Called in each rank before a run: writes down the original token ids of the samples of each step it takes."""
    from training.pretraining import PretrainingRun

    give_step = PretrainingRun.give_step

    def record(self, step, batch, counts, *others):
        labels, ids = batch["masked_labels"], batch["input_ids"]
        restored = torch.where(labels >= 0, labels, ids.gather(-1, batch["masked_positions"]))
        # Unused predictions point to position 0, which is never masked.
        original = ids.scatter(-1, batch["masked_positions"], restored).flatten(0, 1)
        real = batch["attention_mask"].flatten(0, 1).sum(-1) > 1  # the rest is padding
        folder.mkdir(exist_ok=True)
        with (folder / f"rank{self.world.rank}").open("a") as file:
            file.write(json.dumps([step, original[real].tolist()]) + "\n")
        return give_step(self, step, batch, counts, *others)

    PretrainingRun.give_step = record


def recorded(folder: Path) -> dict[int, list[tuple[int, ...]]]:
    """The samples that all ranks together took in each step."""
    steps: dict[int, list[tuple[int, ...]]] = {}
    for path in folder.glob("rank*"):
        for step, samples in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(step, []).extend(map(tuple, samples))
    return {step: sorted(samples) for step, samples in steps.items()}


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_then_with_three(files, tmp_path):
    """No sample is lost or repeated but those of steps that no checkpoint holds; rates and losses are one run's."""
    changes = {"model_config_file": files.model_without_dropout, "global_batch_size": 21}  # an epoch is 3 steps
    run(files.flags(tmp_path / "whole", **changes), functools.partial(record_samples, tmp_path / "samples"))
    whole = recorded(tmp_path / "samples")
    for first in range(1, 19, 3):
        assert len(set(whole[first] + whole[first + 1] + whole[first + 2])) == 63, "an epoch has every sample once"

    flags = files.flags(tmp_path / "moved", **changes)
    attempts = [(2, [kill_after(7)], range(1, 8)), (1, [kill_after(12)], range(6, 13)), (3, [], range(11, 21))]
    for ranks, prepare, steps in attempts:
        record = functools.partial(record_samples, tmp_path / f"samples{ranks}")
        for rank in begin_ranks(flags, ranks, record, *prepare):
            assert rank.finish().code == (-signal.SIGKILL if prepare else 0)
        assert recorded(tmp_path / f"samples{ranks}") == {step: whole[step] for step in steps}
    moved, uninterrupted = metrics(tmp_path / "moved"), metrics(tmp_path / "whole")
    for name in ("step", "learning_rate", "epoch"):
        assert [row[name] for row in moved] == [row[name] for row in uninterrupted], name
    for before, after in zip(uninterrupted, moved, strict=True):
        assert float(after["step_loss"]) == pytest.approx(float(before["step_loss"]), rel=1e-4)


@pytest.fixture(scope="module")
def losses_of_two(files, tmp_path_factory) -> list[tuple[int, str]]:
    """Of the standard run, with dropout, on two ranks without an interruption."""
    output = tmp_path_factory.mktemp("two")
    run(files.flags(output), ranks=2)
    return losses(output)


def test_two_ranks_killed_and_resumed_give_the_very_same_losses(files, tmp_path, losses_of_two):
    """Dropout on, before and after the adapter switch."""
    flags = files.flags(tmp_path)
    for step in (8, 17):
        assert {rank.finish().code for rank in begin_ranks(flags, 2, kill_after(step))} != {0}
    run(flags, ranks=2)
    assert losses(tmp_path) == losses_of_two


# ------------------------------------------------------------------------------------------------------------ restarts
DIES_IN_STEP_8 = """import os, signal, sys
sys.path.insert(0, {root!r})
from run_pretraining import main
from training.engine import Engine
from training.flags import run_door

micro_step, calls = Engine.micro_step, []


def die_between_micro_steps(self, *arguments):
    sums = micro_step(self, *arguments)
    calls.append(sums)
    if len(calls) == 15 and os.environ["RANK"] == "{rank}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return sums


Engine.micro_step = die_between_micro_steps
run_door(main)
"""


def launched(script: Path | str, flags: list[str], *launcher: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(script), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)


@pytest.mark.parametrize("dying", [0, 1])
def test_after_a_rank_was_killed_in_a_step_torchrun_goes_on_from_the_newest_checkpoint(
    files, tmp_path, losses_of_two, dying
):
    """With dropout, and the very same losses as a run that nothing interrupted. Two micro-steps are a step."""
    script = tmp_path / "dies.py"
    script.write_text(DIES_IN_STEP_8.format(root=str(ROOT), rank=dying))
    flags = files.flags(tmp_path / "out")
    ended = launched(script, flags, "--standalone", "--nproc_per_node=2", "--max_restarts=1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("resumed after step 5") == 1
    assert "resumed after step" not in ended.stderr.replace("resumed after step 5", "")
    assert losses(tmp_path / "out") == losses_of_two


def test_after_a_rank_was_killed_both_nodes_start_again(files, tmp_path, losses_of_two):
    """Two torchruns of a process each, as two nodes have them; each of them counts its own restarts."""
    script = tmp_path / "dies.py"
    script.write_text(DIES_IN_STEP_8.format(root=str(ROOT), rank=1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"--rdzv_endpoint=127.0.0.1:{probe.getsockname()[1]}"
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=2", "--rdzv_backend=c10d", "--rdzv_id=1", meeting]
    with ThreadPoolExecutor() as nodes:
        start = functools.partial(launched, script, files.flags(tmp_path / "out"))
        ended = [node.result() for node in [nodes.submit(start, *launcher) for _ in range(2)]]
    assert [end.returncode for end in ended] == [0, 0], ended
    assert losses(tmp_path / "out") == losses_of_two


def test_without_restarts_a_killed_rank_ends_the_job(files, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES_IN_STEP_8.format(root=str(ROOT), rank=1))
    ended = launched(script, files.flags(tmp_path / "out"), "--standalone", "--nproc_per_node=2")
    assert ended.returncode == 1
    assert saved_steps(tmp_path / "out" / "pretrain_ckpts") == [5]


def come_late() -> None:
    time.sleep(1.5)


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_are_started_again_do_not_meet_those_that_are_gone(files, tmp_path, late):
    """torchrun keeps its store over a restart, with the old ranks' addresses; whoever comes first must wait."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # another node's may differ
    flags = files.flags(tmp_path, max_steps=6)

    def start(prepare: dict[int, list]) -> list[Run]:
        return [
            Run(flags, shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}, prepare.get(rank, []))
            for rank in range(2)
        ]

    assert [rank.finish().code for rank in start(dict.fromkeys((0, 1), [kill_after(6)]))] == [-signal.SIGKILL] * 2
    ended = [rank.finish() for rank in start({late: [come_late]})]
    assert [end.code for end in ended] == [0, 0], ended
    assert "resumed after step 5" in ended[0].stderr
    del store


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"input_dir": "/nowhere"}, "--input_dir /nowhere: "),
        ({"optimizer": "sgd", "learning_rate": 1e30, "warmup_proportion": 0}, "--learning_rate 1e+30: "),
    ],
    ids=["before they are joined", "in a step"],
)
def test_a_usage_error_is_not_tried_again(files, tmp_path, ranks, changes, line):
    """Three restarts would not help: one line, once, and the end of torchrun."""
    flags = files.flags(tmp_path / "out", **changes)
    ended = launched("run_pretraining.py", flags, "--standalone", f"--nproc_per_node={ranks}", "--max_restarts=3")
    said = [text for text in ended.stderr.splitlines() if SPOKEN in text]
    assert len(said) == 1 and line in said[0], ended.stderr
    assert ended.returncode == 1
