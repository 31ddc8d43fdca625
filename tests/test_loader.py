"""The iterator of batches: the same for any number of workers, and workers that live as long as they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import pytest
import torch
from shard_factory import MASK, write_shard
from torch.utils.data import Dataset

from data.shards import ShardSet, StepDataset, step_loader
from training.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def steps(folder, **changes):
    options = {
        "global_batch_size": 10,
        "local_batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "seed": 42,
        "masked_token_fraction": 0.2,
        "max_predictions_per_seq": 4,
        "vocab_size": 50,
        "mask_token_id": MASK,
        "steps": 7,
    }
    return StepDataset(ShardSet(folder), **options | changes)


@pytest.fixture
def folder(tmp_path):
    for number, count in enumerate((7, 5, 9)):
        write_shard(tmp_path / f"shard_{number}.hdf5", count=count, seed=number)
    return tmp_path


class Slow(Dataset):
    """Takes `seconds` for an item, which is its number and the process that made it."""

    def __init__(self, seconds, count=4):
        self.seconds = seconds
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"index": torch.tensor(index), "process": torch.tensor(os.getpid())}


def is_running(pid):
    """Whether the process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition, seconds):
    """Whether `condition()` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_order_and_do_not_depend_on_the_workers(folder, num_workers):
    dataset = steps(folder)
    loader = step_loader(dataset, num_workers)
    assert len(loader) == 7
    batches = list(loader)
    assert len(batches) == 7
    for step, batch in enumerate(batches):
        expected = dataset[step]
        assert batch.keys() == expected.keys()
        for name in batch:
            assert torch.equal(batch[name], expected[name]) and batch[name].dtype == torch.int64
    assert list(loader) == []


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_usage_error_arrives_as_one_line(folder, num_workers):
    with h5py.File(folder / "shard_1.hdf5", "a") as file:
        file["input_ids"][2, 3] = 50
        del file.attrs["max_token_id"]
    loader = step_loader(steps(folder), num_workers)
    with pytest.raises(UsageError) as error:
        list(loader)
    line = str(error.value)
    assert "\n" not in line and "shard_1.hdf5" in line and "token id 50" in line
    assert list(loader) == []


def test_the_wait_is_measured_and_prefetching_shortens_it():
    inline = step_loader(Slow(0.1), 0)
    next(inline)
    assert inline.wait_seconds == pytest.approx(0.1, abs=0.05)
    ahead = step_loader(Slow(0.1), 1, prefetch=4)
    next(ahead)
    time.sleep(0.6)
    next(ahead)
    assert ahead.wait_seconds < 0.05
    ahead.close()


def test_the_global_generator_is_left_alone(folder):
    for num_workers in (0, 1):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        list(step_loader(steps(folder, steps=2), num_workers))
        assert torch.equal(torch.get_rng_state(), before)


def test_workers_start_with_the_first_batch_and_end_with_close():
    loader = step_loader(Slow(0), 1)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    assert children.read_text() == before
    worker = int(next(loader)["process"])
    assert str(worker) in children.read_text() and worker != os.getpid()
    loader.close()
    assert not is_running(worker)


def test_a_parent_can_end_its_worker():
    """Torch's way out where an orderly end fails, and the interpreter's at exit."""
    loader = step_loader(Slow(0), 1)
    worker = int(next(loader)["process"])
    os.kill(worker, signal.SIGTERM)
    assert wait_for(lambda: not is_running(worker), 1.0)
    loader.close()


def test_stop_signals_to_the_whole_job_do_not_stop_the_workers():
    loader = step_loader(Slow(0.05, count=8), 1, prefetch=1)
    worker = int(next(loader)["process"])
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["bash", "-c", f"kill -{name} {worker}"], check=True)
        next(loader)
    assert [int(batch["index"]) for batch in loader] == [4, 5, 6, 7]


def run_script(body):
    """Start a process that uses a loader of slow items; its first line of output is its worker's id."""
    source = "import sys, time\nsys.path[:0] = ['.', 'tests']\nfrom test_loader import Slow, step_loader\n"
    command = [sys.executable, "-c", source + textwrap.dedent(body)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_workers_die_with_a_parent_that_is_killed():
    process = run_script("""
        loader = step_loader(Slow(0.01, count=10**6), 2)
        workers = [int(next(loader)["process"]) for _ in range(2)]
        time.sleep(0.5)  # until they are idle, with all that they may prefetch made
        print(*workers, flush=True)
        time.sleep(60)
    """)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(set(workers)) == 2 and all(map(is_running, workers))
    process.kill()
    # Not communicate(): the workers hold the ends of its pipes, so it would wait for them.
    process.wait()
    # Well below the five seconds in which torch's own workers look for their parent.
    assert wait_for(lambda: not any(map(is_running, workers)), 1.0)
    process.communicate()


def test_an_error_that_is_no_usage_error_ends_the_parent_at_once():
    """Its traceback keeps the loader alive, so the interpreter has to end the worker at exit."""
    process = run_script("""
        class Broken(Slow):
            def __getitem__(self, index):
                return {"zero": 1 // 0} if index == 3 else super().__getitem__(index)

        loader = step_loader(Broken(0.01, count=10**6), 1)
        print(int(next(loader)["process"]), flush=True)
        list(loader)
    """)
    worker = int(process.stdout.readline())
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - started < 4
    assert process.returncode == 1 and "ZeroDivisionError" in stderr
    assert not is_running(worker)
