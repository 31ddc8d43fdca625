"""benchmarks/shard_throughput.py on shards of a tiny BERT: what takes turns, what is counted, what padding allows."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import pretraining_throughput, shard_throughput
from benchmarks.timing import GpuState, Spread
from training.distributed import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_real_shards_padded_and_unpadded(read, files, tmp_path, capsys, monkeypatch):
    class Watch(nullcontext):
        made = 0

        def __init__(self):
            super().__init__()
            Watch.made += 1
            self.state = GpuState(Spread.of([Watch.made]), None, None)

    monkeypatch.setattr(shard_throughput, "nullcontext", Watch)
    file = tmp_path / "shards.json"
    read("--input_dir", f"{files.train}", "--local_batch_size", "4", "--num_workers", "0", "--output", f"{file}")
    pretraining_throughput.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["way"]) for row in rows] == [
        (model, way) for model in ("dense", "slope") for way in ("padded", "unpadded")
    ]
    assert [row["gpu"]["sm_mhz"]["median"] for row in rows] == [1, 2, 3, 4], "each way's own"
    for padded, unpadded in zip(rows[::2], rows[1::2], strict=True):
        assert padded["steps"] == unpadded["steps"]
        assert 0.1 < padded["padding_share"] < 0.5
        assert padded["speedup"]["median"] == padded["limit"]["median"] == padded["reached"]["median"] == 1
        assert all(0 < row["data_wait_share"] < 1 for row in (padded, unpadded))
        real = [(1 - row["padding_share"]) for row in (padded, unpadded)]
        limit = unpadded["limit"]
        assert limit["low"] <= real[1] / real[0] <= limit["high"]  # the same tokens, in fewer places
    assert "63 sequences of at most 16 tokens, 1 x 4 a step" in capsys.readouterr().out


def test_a_model_is_gone_before_the_next_one_is_made(read, files, monkeypatch):
    made, there = [], []

    class Watched(shard_throughput.ShardSteps):
        def __init__(self, *given):
            there.append(sum(run() is not None for run in made))
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(shard_throughput, "ShardSteps", Watched)
    read("--input_dir", f"{files.train}", "--local_batch_size", "4", "--num_workers", "0")
    pretraining_throughput.main()
    assert there == [0, 1, 0, 1]


def test_a_sample_is_of_all_its_steps(monkeypatch):
    run = SimpleNamespace(tokens=5.0, slots=7, waited=0.5)

    def seconds_of(run, count, world):
        run.tokens, run.slots, run.waited = run.tokens + 10, run.slots + 20, run.waited + 0.25
        return 0.1

    monkeypatch.setattr(shard_throughput, "seconds_of", seconds_of)
    assert shard_throughput.take_sample(run, 4, ALONE) == shard_throughput.Sample(0.4, 10.0, 20, 0.25, 4)


def test_the_loader_that_was_is_closed(monkeypatch):
    closed, run = [], shard_throughput.ShardSteps.__new__(shard_throughput.ShardSteps)
    run.loader = SimpleNamespace(close=lambda: closed.append(True))
    run.new_loader = lambda: "new"
    run.begin_again()
    assert closed == [True] and run.loader == "new"


def test_what_the_padding_allows():
    def sample(seconds, slots, waited):
        return shard_throughput.Sample(seconds, 60.0, slots, waited, 2)

    rounds = [
        {"padded": sample(4.0, 100, 0.4), "unpadded": sample(2.0, 40, 0.0)},
        {"padded": sample(6.0, 100, 0.0), "unpadded": sample(4.0, 80, 0.3)},
    ]
    padded, unpadded = shard_throughput.records("dense", 16, rounds)
    assert padded["padding_share"] == pytest.approx(0.4) and unpadded["padding_share"] == pytest.approx(0.0)
    assert unpadded["speedup"] == Spread(1.75, 1.5, 2.0)
    assert unpadded["limit"] == Spread(1.875, 1.25, 2.5)
    assert unpadded["reached"] == Spread(1.0, 0.8, 1.2), "each round against its own"
    assert [row["data_wait_share"] for row in (padded, unpadded)] == pytest.approx([0.04, 0.05])
    assert unpadded["tokens_per_second"] == Spread(22.5, 15.0, 30.0)
    assert unpadded["step"] == Spread(1.5, 1.0, 2.0)


def test_all_steps_that_count_were_taken_once_before(monkeypatch):
    """So every CUDA graph of theirs is there."""
    log = []

    class Run:
        def __init__(self, way):
            self.way, self.at, self.known, self.new = way, 0, 0, 0

        def take(self, count):
            self.at += count
            self.new, self.known = max(0, self.at - self.known), max(self.at, self.known)

        def begin_again(self):
            self.at = 0

    class Watch(nullcontext):
        def __enter__(self):
            log.append((self.enter_result,))

    def seconds_of(run, count, world):
        run.take(count)
        return 1.0 if run.way == "unpadded" or run.at == 1 else 0.1  # the first one, and unpadded ones, capture

    def take_sample(run, count, world):
        run.take(count)
        log.append((run.way, count, run.at, run.new))
        return shard_throughput.Sample(run.at, 1.0, 1, 0.0, count)

    monkeypatch.setattr(shard_throughput, "seconds_of", seconds_of)
    monkeypatch.setattr(shard_throughput, "take_sample", take_sample)
    args = SimpleNamespace(num_workers=2, rounds=2, sample_seconds=0.5)
    ways, watches = shard_throughput.WAYS, {way: Watch(way) for way in shard_throughput.WAYS}
    rounds = shard_throughput.take_rounds({way: Run(way) for way in ways}, args, ALONE, watches)
    shortest = 2 * 2 * shard_throughput.AT_LEAST  # data are waited for only once what was made ahead is used up
    assert [samples[way].seconds for samples in rounds for way in samples] == [2 * shortest] * 2 + [3 * shortest] * 2
    counted = [(way, shortest, at * shortest, 0) for at in (2, 3) for way in ("padded", "unpadded")]
    assert [entry for entry in log[2:] if len(entry) == 4] == counted
    assert [entry for entry in log if len(entry) == 1] == [("padded",), ("unpadded",)] * 2, "watched while they count"
    args.sample_seconds = 5.0
    shard_throughput.take_rounds({way: Run(way) for way in ways}, args, ALONE, watches)
    assert log[-1][1] == 50


def test_profiles_are_of_the_same_steps(monkeypatch):
    log = []
    names = shard_throughput.WAYS
    runs = {way: SimpleNamespace(begin_again=lambda way=way: log.append(f"{way} begins"), take=way) for way in names}
    monkeypatch.setattr(shard_throughput, "profile", lambda take, steps: (log.append(take), ({"idle": steps}, []))[1])
    assert shard_throughput.profiles(runs, 3) == dict.fromkeys(names, {"idle": 3})
    assert log == ["padded begins", "padded", "unpadded begins", "unpadded"]
    assert shard_throughput.profiles(runs, 0) == {}


def test_both_ways_mask_as_the_recipe_does(read, files):
    args = read("--input_dir", f"{files.train}", "--accumulation", "3")
    padded, unpadded = (shard_throughput.flags_for("slope", way, args, 512, 4) for way in shard_throughput.WAYS)
    assert (padded.unpad, unpadded.unpad) == ("False", "True")
    assert (padded.max_predictions_per_seq, padded.masked_token_fraction) == (80, 0.15)
    assert (padded.local_batch_size, padded.global_batch_size, padded.pruned_matrix) == (4, 12, "static-weight")
    state = GpuState(None, None, None)
    assert all(cell(dict(rows, gpu=state)) for rows in [EXAMPLE] for cell in shard_throughput.COLUMNS.values())


EXAMPLE = shard_throughput.records(
    "dense", 16, [dict.fromkeys(shard_throughput.WAYS, shard_throughput.Sample(1.0, 10.0, 16, 0.1, 2))]
)[0]
