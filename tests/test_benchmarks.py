"""The benchmarks' logic without a GPU: the processor's clock and stand-ins of the kernels take the place of real ones.

What is not tried here is what only a GPU has: graphs, the kernels, clocks, the allocator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import emulated_kernels
import pytest
import torch
from pretraining_runs import ROOT

from benchmarks import common, layer_speedup, memory, setup_overhead, spmm_speedup, timing
from configuration import BertConfig
from kernels import build, ops
from kernels.autotune import Choice
from kernels.backends import CutlassOperands
from modeling import BertForPreTraining
from sparse_ops import SparseLinear, named_layers
from training.errors import UsageError

SCRIPTS = ("spmm_speedup", "layer_speedup", "memory", "setup_overhead")


class ProcessorTimer:
    def __init__(self, run, sample_seconds=0.0):
        self.run = run
        run()

    def seconds(self) -> float:
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began


def run_on_stand_ins(layers, dtype, tokens):
    for _, layer in named_layers(layers):
        layer.set_operands(CutlassOperands(layer, dtype))


@pytest.fixture
def on_processor(monkeypatch):
    """Benchmarks run on this processor, through the kernels' operators and layouts."""
    for module in (common, timing):
        monkeypatch.setattr(module, "nvml", lambda: None)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    stand_ins = {
        "Timer": ProcessorTimer,
        "hopper_gpu": lambda: torch.device("cpu"),
        "hopper_gpu_with_kernels": lambda *_: torch.device("cpu"),
        "run_on_kernels": run_on_stand_ins,
    }
    for module in (spmm_speedup, layer_speedup, memory, setup_overhead):
        for name in stand_ins.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, stand_ins[name])
    for name, result in (("get_device_name", "a processor"), ("memory_allocated", 7 * 2**20)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    asked = []  # by the products, and by the row that names the tile
    monkeypatch.setattr(ops, "choice_of", lambda *product: asked.append(product) or Choice(1, 4))

    def known_choice(*product):
        assert product in asked
        return Choice(1, 4)

    monkeypatch.setattr(spmm_speedup, "choice_of", known_choice)
    library = emulated_kernels.install(monkeypatch)
    yield
    del library


def run_main(module, monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{module.__name__.split('.')[-1]}.py", *flags])
    module.main()


# ---------------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_machines_without_a_gpu(script):
    command = [sys.executable, f"benchmarks/{script}.py"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(flag in shown for flag in ("--output", "--quick", "--dtype"))
    if torch.cuda.is_available():
        return
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == f"{script}.py: error: {common.NO_GPU}\n"
    assert refused.stdout == ""


def test_a_place_that_cannot_be_written_is_found_first(tmp_path):
    parser = common.benchmark_parser("text", ("a", "b"))
    for path in (tmp_path, tmp_path / "missing" / "file.json"):
        with pytest.raises(UsageError, match="--output"):
            common.parse_benchmark_flags(parser, ["--output", str(path)])
    assert common.parse_benchmark_flags(parser, ["--output", str(tmp_path / "file.json")]).rounds == common.ROUNDS


def test_rounds_and_shapes():
    parser = common.benchmark_parser("text", ("a", "b"))
    assert common.parse_benchmark_flags(parser, ["--quick"]).rounds == common.QUICK_ROUNDS
    assert common.parse_benchmark_flags(parser, ["--quick", "--rounds", "7"]).rounds == 7
    assert common.parse_benchmark_flags(parser, ["--shapes", "b,a"]).shapes == ("b", "a")
    with pytest.raises(UsageError, match="--shapes: must be names of a, b with commas, not c"):
        common.parse_benchmark_flags(parser, ["--shapes", "c"])


def test_results_are_on_disk_after_each_row(on_processor, tmp_path, capsys):
    file = tmp_path / "file.json"
    report = common.Report(
        "name", common.parse_benchmark_flags(common.benchmark_parser("text"), ["--output", str(file)])
    )
    report.table("title", {"a": lambda r: str(r["a"]), "b": lambda r: r["b"].text(1, unit=1e3)})
    report.row({"a": 1, "b": timing.Spread(2e-3, 1e-3, 3e-3)})
    content = json.loads(file.read_text())
    assert content["rows"] == [{"table": "title", "a": 1, "b": {"median": 2e-3, "low": 1e-3, "high": 3e-3}}]
    assert content["environment"].keys() >= {"date", "command", "gpu", "driver", "torch", "cuda"}
    assert "| a | b |\n| --- | --- |\n| 1 | 2.0 (1.0–3.0) |\n" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- timing
class Scripted:
    """A timer that gives what a list holds, and writes down its turns."""

    def __init__(self, name, seconds, turns):
        self.name, self.left, self.turns = name, iter(seconds), turns

    def seconds(self) -> float:
        self.turns.append(self.name)
        return next(self.left)


def test_candidates_take_turns_with_the_base(monkeypatch):
    monkeypatch.setattr(timing, "nvml", lambda: None)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    turns: list[str] = []
    timers = {
        "dense": Scripted("dense", [2, 4, 3, 6, 8, 16], turns),
        "a": Scripted("a", [1, 2, 8], turns),
        "b": Scripted("b", [8, 3, 4], turns),
    }
    timings = timing.interleave(timers, rounds=3)
    assert turns == ["dense", "a", "dense", "b"] * 3
    assert timings.speedup("a") == timing.Spread(1.5, 1, 2)  # 2/1, 3/2, 8/8: the base right before each
    assert timings.speedup("b") == timing.Spread(2, 0.5, 4)  # 4/8, 6/3, 16/4
    assert timings.seconds("a") == 2
    assert timings.seconds("dense") == 5
    assert timings.ratio("b", "a") == timing.Spread(1.5, 0.5, 8)
    assert timings.gpu == timing.GpuState(None, None, None)
    assert timings.gpu.text() == "–"


def test_clock_power_and_cap_of_a_row(monkeypatch):
    class Gpu:
        energy = iter((100.0, 107.0, 300.0, 303.0, 400.0, None, 500.0, 501.0))
        mhz = 1500

        def joules(self):
            return next(self.energy)

        def sm_mhz(self):
            return self.mhz

        def power_capped(self):
            return True

    monkeypatch.setattr(timing, "nvml", Gpu)
    began = time.monotonic()
    with timing.GpuWatch() as watch:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    assert watch.state.sm_mhz == timing.Spread(1500, 1500, 1500)
    assert 7 / seconds <= watch.state.watts <= 7 / 0.02
    assert watch.state.text() == f"1500 MHz, {watch.state.watts:.0f} W, 100%"
    time.sleep(0.1)
    Gpu.mhz = 1200
    with watch:
        time.sleep(0.02)
    assert (watch.state.sm_mhz.low, watch.state.sm_mhz.high) == (1200, 1500), "of both times"
    assert 10 / (seconds + 0.05) <= watch.state.watts <= 10 / 0.04, "what lies between does not count"
    for _ in range(2):  # the driver did not say once: what it says later is not of all times
        with watch:
            pass
        assert watch.state.watts is None


# --------------------------------------------------------------------------------------------------------------- layers
def test_the_same_seed_gives_the_same_weights():
    sizes = [(32, 64), (64, 32)]
    dense, sparse = common.make_layers(sizes, torch.device("cpu"))
    again, adapted = common.make_layers(sizes, torch.device("cpu"), rank=4)
    for one, other, pruned in zip(dense, again, sparse, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(pruned.dense_weight(), torch.where(pruned.mask(), one.weight, 0))
    assert all(layer.lora_right.abs().min() > 0 for layer in adapted)


def test_wrong_products_are_no_results():
    right = torch.randn(8, 8)
    common.check("it", right * 1.001, right)
    for wrong in (right * 1.1, torch.full_like(right, float("nan")), right * 0):
        with pytest.raises(RuntimeError, match="it is off"):
            common.check("it", wrong, right)


# ----------------------------------------------------------------------------------------------------------- benchmarks
def test_products(on_processor, monkeypatch, tmp_path, capsys):
    products = [spmm_speedup.Product("bert-large", 16, 32, 64), spmm_speedup.Product("adapters", 16, 64, 32, rank=8)]
    monkeypatch.setattr(spmm_speedup, "all_products", lambda: products)
    file = tmp_path / "spmm.json"
    run_main(spmm_speedup, monkeypatch, "--rounds", "3", "--output", str(file), "--cusparselt", "none")
    content = json.loads(file.read_text())
    assert [(row["columns"], row["out"], row["rank"]) for row in content["rows"]] == [(32, 64, 0), (64, 32, 8)]
    assert content["settings"]["rounds"] == 3
    assert content["environment"]["gpu"] == "a processor"
    for row in content["rows"]:
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
        assert row["tile"] == {"variant": 1, "group": 4}
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "32 → 64" in table[2]
    assert "adapters, rank 8" in table[3]


def test_a_cusparselt_that_fails_is_a_reason(on_processor, monkeypatch):
    x, weight = torch.randn(16, 32).bfloat16(), torch.randn(8, 32).bfloat16()

    def calls(x, pruned):
        def refused():
            raise RuntimeError("no algorithm\nmore")

        return {"good": lambda: x @ pruned.t(), "wrong": lambda: x[:, :8] * 0, "bad": refused}

    monkeypatch.setattr(spmm_speedup, "cusparselt_calls", calls)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    timers, reasons = spmm_speedup.cusparselt_timers(x, weight, x @ weight.t(), 0.01)
    assert list(timers) == ["good"]
    assert set(reasons) == {"wrong", "bad"}
    assert reasons["bad"] == "no algorithm"
    assert spmm_speedup.cusparselt_timers(x.half(), weight, x, 0.01) == ({}, {"cusparselt": "compared in bf16 only"})


def test_the_shapes_that_are_promised():
    products = spmm_speedup.select(None, quick=False)
    sizes = {(p.group, p.tokens, p.columns, p.out) for p in products}
    for tokens in (16384, 32768, 65536):
        for size in ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)):
            assert ("bert-large", tokens, *size) in sizes
    assert ("opt-66b", 8192, 9216, 4 * 9216) in sizes
    assert {(p.columns, p.rank) for p in products if p.rank} == {(4096, 64), (16384, 64), (5120, 80), (20480, 80)}
    assert len(spmm_speedup.select(("opt-30b",), quick=False)) == 3
    assert len(spmm_speedup.select(("opt-30b",), quick=True)) == 3
    assert {p.group for p in spmm_speedup.select(None, quick=True)} == {"bert-large", "opt-6.6b", "adapters"}
    assert len(spmm_speedup.select(None, quick=True)) == 7
    assert [s.tokens for s in layer_speedup.select(None, quick=True)] == [16384]
    assert [s.model for s in layer_speedup.select(("opt-13b",), quick=True)] == ["opt-13b"]
    settings = layer_speedup.select(None, quick=False)
    assert {(s.hidden, s.tokens) for s in settings} >= {(1024, 65536), (2560, 16384), (4096, 8192), (5120, 8192)}
    assert {s.hidden: s.ranks for s in settings} == {1024: (0, 16, 64), 2560: (0, 40), 4096: (0, 64), 5120: (0, 80)}


@pytest.mark.parametrize("bias", [False, True])
def test_layers(on_processor, monkeypatch, tmp_path, capsys, bias):
    monkeypatch.setitem(layer_speedup.HIDDEN, "bert-large", 32)
    monkeypatch.setattr(layer_speedup, "TOKENS", {"bert-large": (16,)})
    file = tmp_path / "layer.json"
    run_main(layer_speedup, monkeypatch, "--rounds", "2", "--output", str(file), "--bias", str(bias))
    rows = json.loads(file.read_text())["rows"]
    expected = [(name, rank) for name in ("training", "inference") for rank in (0, 16, 64)]
    assert [(row["pass"], row["rank"]) for row in rows] == expected
    assert all((row["adapter_cost"] is None) == (row["rank"] == 0) for row in rows)
    assert capsys.readouterr().out.count("bert-large, 32 wide") == 6


@pytest.mark.parametrize("passes", ["training,inference", "inference,training"])
def test_each_pass_has_layers_of_its_own(on_processor, monkeypatch, tmp_path, passes):
    monkeypatch.setitem(layer_speedup.HIDDEN, "bert-large", 32)
    monkeypatch.setattr(layer_speedup, "TOKENS", {"bert-large": (16,)})
    seen = {}
    for name, run in layer_speedup.RUNS.items():

        def watched(layers, data, name=name, run=run):
            if isinstance(layers[0], SparseLinear):
                seen[name] = [(x.values.dtype, x.values.requires_grad, x.operands.kept is None) for x in layers]
            return run(layers, data)

        monkeypatch.setitem(layer_speedup.RUNS, name, watched)
    run_main(layer_speedup, monkeypatch, "--rounds", "1", "--output", str(tmp_path / "out.json"), "--passes", passes)
    assert seen == {"training": [(torch.float32, True, True)] * 4, "inference": [(torch.float32, False, False)] * 4}


def test_training_adds_the_gradients_that_autograd_gives():
    setting = layer_speedup.Setting("bert-large", 8, (0,))
    data = layer_speedup.Data.random(setting, torch.float32, torch.device("cpu"))
    dense, sparse = common.make_layers(setting.sizes, torch.device("cpu"), rank=4)
    for layers in (dense, sparse):
        training = layer_speedup.Training(layers, data)
        training()
        training()
        for layer, x, grad_y, sums in zip(layers, data.inputs, data.grad_outputs, training.sums, strict=True):
            layer(x).backward(grad_y)
            for parameter, total in zip(layer.parameters(), sums, strict=True):
                torch.testing.assert_close(total, 2 * parameter.grad)
    assert all(isinstance(layer, SparseLinear) for layer in sparse)


# --------------------------------------------------------------------------------------------------------------- memory
HIDDEN, INNER = 256, 512  # metadata has whole tiles only


@pytest.fixture
def small_bert(monkeypatch, tmp_path) -> BertConfig:
    """A BERT of two blocks as the model of all benchmarks."""
    config = BertConfig(100, HIDDEN, 2, 4, INNER, max_position_embeddings=16)
    path = tmp_path / "bert.json"
    path.write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(memory, "CONFIGS", tmp_path)
    monkeypatch.setattr(memory, "MODELS", {"bert-large": "bert.json"})
    monkeypatch.setattr(setup_overhead, "CONFIG", path)
    monkeypatch.setitem(layer_speedup.HIDDEN, "bert-large", 32)
    for name, few in (("TOKENS", 16), ("CALLS", 2), ("CALL_TOKENS", 16), ("CALL_WIDTH", 32)):
        monkeypatch.setattr(setup_overhead, name, few)
    return config


def memory_rows(monkeypatch, tmp_path, *flags: str) -> dict[tuple[str, str, int], dict]:
    file = tmp_path / "memory.json"
    run_main(memory, monkeypatch, "--output", str(file), "--models", "bert-large", *flags)
    return {(row["use"], row["scope"], row["rank"]): row for row in json.loads(file.read_text())["rows"]}


def test_bytes_of_a_block(on_processor, small_bert, monkeypatch, tmp_path):
    weights, biases = 4 * HIDDEN**2 + 2 * HIDDEN * INNER, 5 * HIDDEN + INNER
    for rank in (0, 16):
        more = 2 * rank * (5 * HIDDEN + INNER)  # L and R
        rows = memory_rows(monkeypatch, tmp_path, "--ranks", str(rank))
        row = rows["training", "linear layers of a block", rank]
        kept = weights // 2 + biases + more
        assert row["slope_bytes"] == {
            "parameters": 4 * kept,
            "gradients": 4 * kept,
            "optimizer": 8 * kept,
            "operands": weights + 2 * 3 * more,  # W^{R,C} alone; L and R as they are, and spread over twice as much
            "index data": 3 * weights // 8,
        }
        dense = weights + biases
        assert list(row["dense_bytes"].values()) == [4 * dense, 4 * dense, 8 * dense, 2 * weights, 0]
        inference = rows["inference", "linear layers of a block", rank]
        side = rank * (5 * HIDDEN + INNER)  # weights of all L together, and of all R
        assert inference["slope_bytes"]["operands"] == weights + 4 * biases + 2 * (2 * side + side)
        assert inference["slope_bytes"]["index data"] == weights // 8
        assert sum(inference["dense_bytes"].values()) == 2 * (weights + biases)
    assert memory_rows(monkeypatch, tmp_path, "--ranks", "0")["training", "all pruned layers", 0]["ratio"] < 0.53


def test_whole_models_hold_the_rest_alike(on_processor, small_bert, monkeypatch, tmp_path):
    rows = memory_rows(monkeypatch, tmp_path, "--ranks", "0")
    for use in memory.USES:
        layers, whole = (rows[use, scope, 0] for scope in memory.SCOPES[1:])
        rest = {
            side: sum(whole[f"{side}_bytes"].values()) - sum(layers[f"{side}_bytes"].values())
            for side in ("dense", "slope")
        }
        assert rest["dense"] == rest["slope"] > 0
        assert (whole["dense_allocated"], layers["dense_allocated"]) == (0, None)
    numbers = sum(p.numel() for p in BertForPreTraining(small_bert).parameters())
    assert sum(rows["inference", "whole model", 0]["dense_bytes"].values()) == 2 * numbers


# --------------------------------------------------------------------------------------------------------------- set-up
def test_setup(on_processor, small_bert, monkeypatch, tmp_path, capsys):
    asked = []

    def library(name):
        asked.append((name, os.environ["SLOPE_KERNEL_CACHE"]))

    monkeypatch.setenv("SLOPE_KERNEL_CACHE", "present")
    monkeypatch.setattr(build, "library", library)
    file, cache = tmp_path / "setup.json", tmp_path / "cache"
    run_main(setup_overhead, monkeypatch, "--rounds", "2", "--output", str(file), "--cache", str(cache))
    assert asked == [(library, str(cache)) for library in ("operands", "adapters", "sparse_gemm")]
    rows = json.loads(file.read_text())["rows"]
    step = [row for row in rows if "share" in row]
    assert len(step) == 5
    assert step[3]["share"] == pytest.approx(sum(row["share"] for row in step[:3]))
    assert "9 layers" in step[0]["what"]  # of 12; query, key and value of the first block stay dense
    calls = [row for row in rows if "with_backward" in row]
    assert [row["what"] for row in calls] == ["nn.Linear", "SparseLinear", "SparseLinear, rank 64"]
    assert all(row["with_backward"]["low"] > row["inference"]["low"] > 0 for row in calls)
    assert capsys.readouterr().out.count("###") == 3


def test_only_a_cold_cache_is_measured(on_processor, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--cache .*: must be an empty folder"):
        run_main(setup_overhead, monkeypatch, "--cache", str(tmp_path))


def test_kernels_that_do_not_compile_are_one_line(on_processor, monkeypatch, tmp_path):
    def library(name, **_):
        raise build.KernelsUnavailable("no nvcc")

    monkeypatch.setattr(build, "library", library)
    monkeypatch.setenv("SLOPE_KERNEL_CACHE", "present")
    for flags in ((), ("--quick",)):
        with pytest.raises(UsageError, match="^no nvcc$"):
            run_main(setup_overhead, monkeypatch, *flags)


def test_what_lies_within_another_tensor_counts_once():
    whole, other = torch.zeros(100), torch.zeros(7, dtype=torch.int8)
    assert memory.size_of([whole, whole, whole[10:30], other]) == 407
    assert memory.size_of([whole[:20], whole[20:30]]) == 120
