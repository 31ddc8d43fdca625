"""benchmarks/scaling.py on processes of a tiny BERT: what takes turns, what is counted, and what its table says."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from pretraining_runs import LENGTH, MODEL, ROOT, begin_ranks, write_model

from benchmarks import scaling, scaling_picture
from benchmarks.timing import GpuState, Spread
from benchmarks.training_step import NOT_STOPPED, predictions_of
from configuration import BertConfig
from modeling import BertForPreTraining
from sparse_ops import SparseLinear, named_layers
from training import pretraining
from training.distributed import World

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n"


def flags_of(model_file, *more: str) -> list[str]:
    """A small benchmark: two sequences a micro-step, a step a sample."""
    small = ("--local_batch_size", "2", "--sequence_length", f"{LENGTH}", "--sample_seconds", "0", "--rounds", "2")
    return ["--model_config_file", f"{model_file}", *small, *more]


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Parse flags as one process of several would."""
    model = write_model(tmp_path / "tiny_config.json")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def parse(*more: str):
        monkeypatch.setattr(sys, "argv", ["benchmarks/scaling.py", *flags_of(model, *more)])
        return scaling.read_flags()

    return parse


# ------------------------------------------------------------------------------------------------------------- the ways
def record_traffic(words: list[str], result) -> None:
    """Called in each rank in place of a run: what each way communicates in one step of two micro-steps."""
    sys.argv = ["benchmarks/scaling.py", *words]
    args = scaling.read_flags()
    world, config = scaling.this_process(), BertConfig.from_json_file(args.model_config_file)
    flags = scaling.training_flags(args, "slope")
    host, buckets, found = [], [], {}
    sums = torch.distributed.all_reduce

    def count(tensor, **options):
        if options.get("async_op"):
            buckets.append(tensor.numel() * tensor.element_size())
        else:
            host.append(tensor.numel())
        return sums(tensor, **options)

    with scaling.process_group(world):
        step = scaling.TrainingStep(flags, config, world, LENGTH)
        step.connect()
        torch.distributed.all_reduce = count
        step.repeat(2)
        before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
        for way, variant in scaling.ways_of(step).items():
            host.clear()
            buckets.clear()
            if way != "alone" or world.is_main:
                variant.take()
            found[way] = {"host": len(host), "bytes": sum(buckets)}
        same = all(torch.equal(tensor, before[name]) for name, tensor in step.model.state_dict().items())
        layers = len(named_layers(step.model, SparseLinear))
        gradients = sum(4 * parameter.numel() for parameter in step.model.parameters())
        found |= {"counted": step.engine.buckets.bytes, "gradients": gradients, "same": same, "layers": layers}
        step.engine.disconnect()
        del variant
    torch.save(found, f"{result}.{world.rank}")
    sys.exit(0)


def test_only_together_averages_gradients_and_only_alone_needs_nobody(tmp_path):
    """The bytes that go out are those that are counted, each gradient's once."""
    words = flags_of(write_model(tmp_path / "tiny.json"))
    prepare = functools.partial(record_traffic, words, tmp_path / "result")
    for rank in begin_ranks([], 2, prepare):
        ended = rank.finish()
        assert ended.code == 0, ended
    for rank in range(2):
        found = torch.load(f"{tmp_path / 'result'}.{rank}")
        assert found["gradients"] <= found["counted"] < 1.001 * found["gradients"]  # aligned
        assert found["together"] == {"host": 2, "bytes": found["counted"]}  # counts before the step, losses after it
        assert found["apart"] == {"host": 2, "bytes": 0}
        assert found["alone"] == {"host": 0, "bytes": 0}
        assert found["same"], "the weights moved, though the learning rate is 0"
        assert found["layers"] == 9  # of 12: query, key and value of the first block stay dense


def test_a_process_alone_is_a_whole_world(read, monkeypatch):
    args = read()
    flags, config = scaling.training_flags(args, "dense"), BertConfig.from_json_file(args.model_config_file)
    assert flags.max_predictions_per_seq == predictions_of(args.sequence_length) < 80, "what a batch has"
    step = scaling.TrainingStep(flags, config, World(0, 2, 0, CPU), LENGTH)
    step.repeat(3)
    ways = scaling.ways_of(step)
    assert list(ways) == ["together", "apart", "alone"]
    assert [(way.world.size, way.engine.world.size) for way in ways.values()] == [(2, 2), (2, 2), (1, 1)]
    assert {id(way.model) for way in ways.values()} == {id(step.model)}
    monkeypatch.setattr(pretraining, "sum_over_ranks", lambda world, values: [world.size * value for value in values])
    counts = {name: way.next_batch(way.loader, NOT_STOPPED)[1] for name, way in ways.items()}
    masked, labels, tokens = 3 * 2 * 4, 3 * 2, 3 * 2 * LENGTH
    assert counts["alone"] == pretraining.Counts(masked, labels, tokens, tokens * LENGTH)
    assert counts["together"] == counts["apart"]
    assert counts["together"] == pretraining.Counts(2 * masked, 2 * labels, 2 * tokens, 2 * tokens * LENGTH)
    assert flags.global_batch_size == 3 * 2 * 2
    step.world = World(0, 1, 0, CPU)
    assert list(scaling.ways_of(step)) == ["together"]


# --------------------------------------------------------------------------------------------------------------- timing
def test_the_ways_take_turns(monkeypatch):
    turns: list[tuple[str, int]] = []

    def scripted(self, way):
        turns.append((way, self.repeats))
        return {"together": 0.02, "apart": 0.01, "alone": 0.01}[way]

    monkeypatch.setattr(scaling.Sampler, "seconds", scripted)
    steps = dict.fromkeys(("together", "apart", "alone"))
    rounds = scaling.Sampler(World(0, 2, 0, CPU), steps).rounds(3, sample_seconds=0.1)
    names = ["together", "apart", "alone"]
    assert turns == [(way, 1) for way in names * 2] + [(way, 5) for way in names * 3]
    assert rounds == [{"together": 0.02, "apart": 0.01, "alone": 0.01}] * 3


def test_a_sample_is_the_slowest_process_s(monkeypatch):
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(scaling, "gather_objects", lambda world, own: [own, 6.0])
    taken = []
    step = SimpleNamespace(take=taken.append)
    sampler = scaling.Sampler(World(0, 1, 0, CPU), {"together": step}, repeats=4)
    assert sampler.seconds("together") == 1.5
    assert taken == [4]


def test_ratios_and_differences_are_taken_round_by_round():
    rounds = [
        {"together": 4.0, "apart": 3.0, "alone": 2.0},
        {"together": 5.0, "apart": 2.0, "alone": 4.0},
        {"together": 10.0, "apart": 8.0, "alone": 9.0},
    ]
    found = scaling.summary(rounds, tokens=100)
    assert found["tokens_per_second"] == 20.0
    assert found["step"] == Spread(5.0, 4.0, 10.0)
    assert found["efficiency"] == Spread(0.8, 0.5, 0.9)
    assert found["not_hidden"] == Spread(2.0, 1.0, 3.0)
    alone = scaling.summary([{"together": 4.0}], tokens=100)
    assert (alone["efficiency"], alone["not_hidden"]) == (Spread(1.0, 1.0, 1.0), None)


# --------------------------------------------------------------------------------------------------------- the commands
@pytest.mark.parametrize(
    "words,message",
    [
        (("--sequence_length", "17"), "--sequence_length 17: the model has 16 positions"),
        (("--processes", "2"), "--processes: not under torchrun"),
        (("--picture", "p.png"), "--picture: not under torchrun"),
        (("--earlier", "p.json"), "--earlier: not under torchrun"),
        (("--models", "sparse"), "--models: must be names of dense, slope with commas"),
        (("--accumulations", "0"), "--accumulations: must be a whole number of at least 1"),
    ],
)
def test_wrong_flags(read, words, message):
    with pytest.raises(scaling.UsageError, match=message):
        read(*words)


def test_as_many_processes_as_gpus(read, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE")
    for gpus, processes in ((0, (1, 2)), (1, (1,)), (2, (1, 2)), (6, (1, 2, 4)), (8, (1, 2, 4, 8))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert read().processes == processes
    assert read("--processes", "8,1").processes == (8, 1)
    with pytest.raises(scaling.UsageError, match="--processes 9: this machine has 8 GPUs"):
        read("--processes", "1,9")
    for wrong in ("picture.jpg", f"{tmp_path}/missing/picture.png"):
        with pytest.raises(scaling.UsageError, match="--picture .*: must end in .png and lie in an existing folder"):
            read("--picture", wrong)


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ["fp32", "bf16"]), (1, ["fp32"])])
def test_each_communication_is_what_the_engine_is_connected_with(monkeypatch, read, ranks, kinds):
    connected, rows = [], []

    def connect(step):
        connected.append(step.engine.args.gradient_communication)
        step.engine.buckets = SimpleNamespace(bytes=1, remove=lambda: None)

    monkeypatch.setattr(scaling.TrainingStep, "connect", connect)
    ways = dict.fromkeys(("together", "apart", "alone") if ranks > 1 else ("together",), 1.0)
    monkeypatch.setattr(scaling.Sampler, "rounds", lambda *_: [ways])
    args = read("--accumulations", "1,4")
    scaling.measure_model("slope", args, World(0, ranks, 0, CPU), SimpleNamespace(row=rows.append))
    assert connected == kinds
    assert [row["accumulation"] for row in rows] == [1, 4] * len(kinds)
    assert [row["gradients"] for row in rows[::2]] == (kinds if ranks > 1 else [None])


def run_scaling(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/scaling.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_one_command_launches_each_number_of_processes(tmp_path):
    file, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    model = write_model(tmp_path / "tiny_config.json")
    words = flags_of(model, "--processes", "1,2", "--output", f"{file}", "--picture", f"{picture}")
    ended = run_scaling(*words, "--accumulations", "1,2")
    assert ended.returncode == 0, ended.stderr
    content = json.loads(file.read_text())
    shown = [line for line in ended.stderr.splitlines() if line.startswith("| 1 |") or line.startswith("| 2 |")]
    assert len(shown) == len(content["rows"]), "each launch shows its rows as they come"
    assert not [line for line in ended.stderr.splitlines() if "warning" in line.lower() or "error" in line.lower()]
    cells = [(row["processes"], row["model"], row["accumulation"], row["gradients"]) for row in content["rows"]]
    alone = [(1, name, count, None) for name in ("dense", "slope") for count in (1, 2)]
    both = [(2, name, c, g) for name in ("dense", "slope") for g in ("fp32", "bf16") for c in (1, 2)]
    assert cells == alone + both
    assert "benchmarks/scaling.py --model_config_file" in content["environment"]["command"]
    assert "--processes 1,2" in content["environment"]["command"]
    for row in content["rows"]:
        tokens = row["processes"] * row["accumulation"] * 2 * LENGTH
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step"]["median"])
        assert len(row["rounds"]) == 2
    check_bytes({cell: row for cell, row in zip(cells, content["rows"], strict=True) if cell[2] == 1})
    assert picture.read_bytes().startswith(PNG)
    table = [line for line in ended.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(cells)
    assert len({line.count("|") for line in table}) == 1
    for once in ("2 sparse layers 16 -> 32", "Measured in"):  # what runs them, and how long all launches took
        assert ended.stdout.count(once) == 1
    content["rows"] = content["rows"][:4]
    file.write_text(json.dumps(content))
    more, only = tmp_path / "more.json", ("--models", "dense", "--accumulations", "1", "--processes", "2")
    ended = run_scaling(*flags_of(model, *only, "--earlier", f"{file}", "--output", f"{more}"))
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(more.read_text())["rows"]
    assert rows[:4] == content["rows"]
    assert [(row["processes"], row["model"], row["gradients"]) for row in rows[4:]] == [
        (2, "dense", kind) for kind in ("fp32", "bf16")
    ]


EARLIER = {
    "rows": [
        {
            **{"table": "TITLE", "processes": 1, "efficiency": None, "not_hidden": None, "step": None},
            "gpu": {"sm_mhz": None, "watts": None, "power_capped": None},
        }
    ],
    "environment": {"gpu": "a processor", "torch": torch.__version__},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"rows": [EARLIER["rows"][0] | {"table": "another step"}]}, "is of another step, not of tiny, 2 x 16 tokens"),
        ({"rows": [EARLIER["rows"][0] | {"processes": 2}]}, "holds 2 processes already"),
        (
            {"environment": {"gpu": "a processor", "torch": "1.0"}},
            "is of a processor and torch 1.0: not this machine's",
        ),
        ({"rows": [{"a": 1}]}, "holds no rows of this benchmark"),
        ({"rows": 3}, "holds no rows of this benchmark"),
        ({"environment": None}, "holds no rows of this benchmark"),
    ],
)
def test_earlier_rows_must_be_of_the_same_step_and_machine(change, message, read, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE")
    args = read("--processes", "2", "--earlier", f"{tmp_path / 'earlier.json'}")
    text = json.dumps(EARLIER | change).replace("TITLE", scaling.title(args))
    (tmp_path / "earlier.json").write_text(text)
    if message is None:
        assert scaling.read_earlier(args)["rows"][0]["processes"] == 1
    else:
        with pytest.raises(scaling.UsageError, match=f"^--earlier .*: {message}"):
            scaling.read_earlier(args)


def check_bytes(rows: dict) -> None:
    """Against the shapes: half of each pruned weight, all of the rest; each begins at a multiple of 4."""
    hidden, inner = MODEL["hidden_size"], MODEL["intermediate_size"]
    pruned = 2 * (4 * hidden**2 + 2 * hidden * inner) - 3 * hidden**2  # the first query, key and value stay dense
    model = BertForPreTraining(BertConfig.from_dict(MODEL))
    numbers = sum(math.ceil(p.numel() / 4) * 4 for p in model.parameters())
    expected = {"dense": numbers, "slope": numbers - pruned // 2}
    for (processes, name, _, gradients), row in rows.items():
        size = {None: 0, "fp32": 4, "bf16": 2}[gradients]
        assert row["all_reduced_bytes"] == size * expected[name]
        share = size * expected[name] / (4 * numbers)
        assert row["share_of_dense"] == (pytest.approx(share) if processes > 1 else None)


def test_wrong_flags_are_one_line_before_anything_is_launched(tmp_path):
    ended = run_scaling(*flags_of(tmp_path / "missing.json", "--processes", "1"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("scaling.py: error: ") and ended.stderr.count("\n") == 1


def test_a_launch_that_fails_ends_the_command(monkeypatch, tmp_path, read):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(scaling.UsageError, match="--processes 2: torchrun ended with exit code 1"):
        scaling.launch(2, read(), tmp_path)


def test_a_row_comes_back_from_a_file_as_it_was():
    row = {
        **{"step": Spread(1, 0, 2), "efficiency": Spread(1, 1, 1), "not_hidden": None, "model": "dense"},
        "gpu": GpuState(Spread(1500, 1400, 1600), 600.0, 1.0),
    }
    assert scaling.restored(json.loads(json.dumps(row, default=asdict))) == row
    nothing = row | {"gpu": GpuState(None, None, None), "not_hidden": Spread(1, 0, 2)}
    assert scaling.restored(json.loads(json.dumps(nothing, default=asdict))) == nothing


def test_the_lines_of_the_picture():
    def row(processes, gradients, accumulation, speed):
        measured = {"tokens_per_second": speed, "efficiency": Spread(speed / processes, 0, 1)}
        return {
            "processes": processes,
            "model": "slope",
            "accumulation": accumulation,
            "gradients": gradients,
        } | measured

    rows = [row(2, "fp32", 1, 1.8), row(2, "bf16", 1, 1.9), row(1, None, 1, 1.0)]
    (full, full_points, full_style), (half, half_points, half_style) = scaling_picture.curves(rows)
    assert (full, half) == tuple(f"slope, accumulation 1, gradients in {kind}" for kind in ("fp32", "bf16"))
    assert full_points == [(1, 1.0, 1.0), (2, 1.8, 0.9)]
    assert half_points == [(1, 1.0, 1.0), (2, 1.9, 0.95)]
    assert full_style["linestyle"] != half_style["linestyle"]
    assert [label for label, _, _ in scaling_picture.curves(rows[2:])] == ["slope, accumulation 1"]


def test_cpu_threads_are_one_a_process_unless_said_otherwise(monkeypatch, tmp_path, read):
    seen = {}

    def run(command, env, stdout):
        seen.update(command=command, threads=env["OMP_NUM_THREADS"])
        (tmp_path / "2.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    args = read("--models", "slope", "--optimizer", "lamb", "--cuda_graphs", "False")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("OMP_NUM_THREADS")
    scaling.launch(2, args, tmp_path)
    assert seen["threads"] == "1"
    words = seen["command"][seen["command"].index(scaling.__file__) + 1 :]
    assert "--nproc_per_node=2" in seen["command"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    own = {"processes", "earlier", "picture", "output", "quick"}  # the command's; --rounds stands for --quick
    again, asked = (
        {name: value for name, value in vars(flags).items() if name not in own}
        for flags in (scaling.read_flags(), args)
    )
    assert again == asked, "a launch measures something else than the command was asked for"
    assert args.rounds == 2
    assert os.environ.get("OMP_NUM_THREADS") is None
