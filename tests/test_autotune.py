"""Which tile a product is given: measured once, kept in a file, looked up by the nearest number of tokens.

No GPU is needed: times are scripted, and emulated_kernels.py computes the products.
"""

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import emulated_kernels
import pytest
import torch

from kernels import autotune, build
from kernels.autotune import Choice, choice_of, tune

BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
ANOTHERS = {"variant": 2, "group": 16, "ratio": 1.5}  # what another process measured


# ----------------------------------------------------------------------------------------------------- cache and lookup
@pytest.fixture
def machine(monkeypatch, tmp_path) -> SimpleNamespace:
    """A machine on which nothing was measured yet; `measured` lists what is, `restart` forgets all but the file."""
    machine = SimpleNamespace(path=tmp_path / "choices.json", measured=[])

    def measure(tokens, out, columns, dtype, device):
        machine.measured.append((tokens, out, columns, dtype))
        return Choice(len(machine.measured) % 3, 4, tokens / 1000)

    def restart():
        monkeypatch.setattr(autotune, "_choices", {})
        monkeypatch.setattr(autotune, "_nearest", {})

    machine.restart = restart
    restart()
    monkeypatch.setattr(autotune, "_cache_file", lambda device: machine.path)
    monkeypatch.setattr(autotune, "_measure", measure)
    return machine


def test_a_product_is_measured_once_for_all_processes(machine):
    first = tune(100, 96, 64, BF16, CPU)
    assert first == Choice(1, 4, 0.1) and tune(100, 96, 64, BF16, CPU) == first
    machine.restart()
    assert choice_of(100, 96, 32, BF16) == Choice(), "a lookup reads no file"
    assert tune(100, 96, 64, BF16, CPU) == first == choice_of(100, 96, 32, BF16)
    assert machine.measured == [(100, 96, 64, BF16)]


def test_products_that_differ_in_anything_are_measured_apart(machine):
    products = [
        (100, 96, 64, BF16),
        (101, 96, 64, BF16),
        (100, 64, 96, BF16),
        (100, 96, 128, BF16),
        (100, 96, 64, FP16),
    ]
    choices = [tune(*product, CPU) for product in products]
    assert machine.measured == products
    machine.restart()
    assert [tune(*product, CPU) for product in products] == choices
    assert machine.measured == products
    assert len(json.loads(machine.path.read_text())) == len(products)


def test_lookup_takes_the_nearest_number_of_tokens(machine):
    assert choice_of(128, 96, 32, BF16) == Choice(variant=1, group=1, ratio=0.0), "where nothing was measured"
    tune(100, 96, 64, BF16, CPU)
    assert choice_of(128, 96, 32, BF16).ratio == 0.1, "what was looked up before is looked up anew"
    tune(1000, 96, 64, BF16, CPU)
    assert [choice_of(tokens, 96, 32, BF16).ratio for tokens in (1, 100, 549, 551, 1000, 70000)] == [
        0.1, 0.1, 0.1, 1.0, 1.0, 1.0]  # fmt: skip
    tune(600, 96, 64, BF16, CPU)
    assert [choice_of(tokens, 96, 32, BF16).ratio for tokens in (349, 351, 551, 801)] == [0.1, 0.6, 0.6, 1.0]
    assert choice_of(100, 96, 32, FP16) == choice_of(100, 32, 96, BF16) == Choice()
    assert len(machine.measured) == 3, "a lookup measures nothing"


EARLIER_VERSION = '{"100x96x64 bfloat16": {"variant": 2, "group": 16, "ratio": 1.5, "rounding_ratio": 1.4}}'


@pytest.mark.parametrize("content", ["", "{", "[]", '{"100x96x64 bfloat16": {"vari', "\x00\x00", EARLIER_VERSION])
def test_a_broken_file_is_measured_and_written_anew(machine, content):
    machine.path.write_text(content)
    choice = tune(100, 96, 64, BF16, CPU)
    assert machine.measured
    machine.restart()
    assert tune(100, 96, 64, BF16, CPU) == choice and len(machine.measured) == 1


def test_what_another_process_measured_meanwhile_stays(machine, monkeypatch):
    measure = autotune._measure

    def measured_beside_another(*product):
        autotune._write(machine.path, {"7x96x64 bfloat16": ANOTHERS})
        return measure(*product)

    monkeypatch.setattr(autotune, "_measure", measured_beside_another)
    tune(100, 96, 64, BF16, CPU)
    assert tune(7, 96, 64, BF16, CPU) == Choice(**ANOTHERS)
    assert machine.measured == [(100, 96, 64, BF16)]
    names = sorted(path.name for path in machine.path.parent.iterdir())
    assert names == ["choices.json", "choices.lock"], "no temporary file stays"
    assert machine.path.stat().st_mode & 0o044 == 0o044, "others may read a shared cache"


def test_the_second_of_two_waits_for_the_first_ones_choice(machine):
    """Ranks of one machine that start together must not choose apart."""
    with ThreadPoolExecutor() as pool:
        with build.locked(machine.path.with_suffix(".lock")):
            second = pool.submit(tune, 100, 96, 64, BF16, CPU)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.5)
            machine.path.write_text(json.dumps({"100x96x64 bfloat16": ANOTHERS}))
        assert second.result(timeout=60) == Choice(**ANOTHERS)
    assert not machine.measured


def test_a_cache_that_cannot_be_written_is_said_and_measured_again(machine, capsys):
    machine.path = machine.path.parent / "missing" / "choices.json"
    assert tune(100, 96, 64, BF16, CPU) == choice_of(100, 96, 32, BF16)
    assert "cannot be kept in" in capsys.readouterr().err
    machine.restart()
    tune(100, 96, 64, BF16, CPU)
    assert len(machine.measured) == 2


def test_a_file_belongs_to_one_gpu_model_one_torch_and_one_build(monkeypatch):
    built, name = ["/cache/sparse_gemm-1a-2b.so"], ["NVIDIA H200"]
    monkeypatch.setattr(build, "library", lambda library: Path(built[0]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    files = {autotune._cache_file(CPU)}
    for change in (
        lambda: name.__setitem__(0, "NVIDIA H100 80GB HBM3"),
        lambda: built.__setitem__(0, "/cache/other.so"),
    ):
        change()
        files.add(autotune._cache_file(CPU))
    monkeypatch.setattr(torch, "__version__", "9.9")
    files.add(autotune._cache_file(CPU))
    assert len(files) == 4 and all(path.parent == Path("/cache") and " " not in path.name for path in files)


# ----------------------------------------------------------------------------------------------------------- measuring
class Bench:
    """Scripted times. `seconds[candidate]` cycles, None being the dense product; `log` lists what was timed.

    With `warming`, the chip is that much slower after each two samples.
    """

    def __init__(self):
        self.warming = 0.0
        self.seconds = defaultdict(lambda: [1.0])
        self.log: list = []
        self.turn = defaultdict(int)

    def stopwatch(self, run, repeats=None):
        run()
        candidate = run.__defaults__  # of a lambda: its tile and group; a method has none

        def seconds() -> float:
            times, turn, heat = self.seconds[candidate], self.turn[candidate], len(self.log) // 2 * self.warming
            self.log.append(candidate)
            self.turn[candidate] += 1
            return times[turn % len(times)] * (1 + heat)

        return SimpleNamespace(seconds=seconds, repeats=repeats or 1)


@pytest.fixture
def bench(monkeypatch) -> Bench:
    bench = Bench()
    monkeypatch.setattr(autotune, "Stopwatch", bench.stopwatch)
    monkeypatch.setattr(autotune, "launch_sparse_mm", emulated_kernels.launch_sparse_mm)
    monkeypatch.setattr(autotune, "variant_count", lambda: emulated_kernels.VARIANTS)
    return bench


def measure() -> Choice:
    return autotune._measure(24, 64, 48, BF16, CPU)


def test_the_best_median_wins(bench):
    bench.seconds[0, 4] = [0.8]
    bench.seconds[2, 4] = [0.5, 9.0, 0.5, 9.0, 0.5]  # the worst mean
    bench.seconds[1, 16] = [0.1, 0.9, 0.9, 0.9, 0.9]  # the best single time
    assert measure() == Choice(2, 4, 2.0)


def test_each_candidate_is_timed_beside_the_dense_product(bench):
    bench.warming = 0.5
    every = [(variant, group) for variant in range(emulated_kernels.VARIANTS) for group in autotune.GROUPS]
    for candidate in every:
        bench.seconds[candidate] = [0.5]
    assert measure().ratio == 2.0, "both of a pair are as warm"
    assert len(bench.log) == 2 * autotune.ROUNDS * len(every)
    assert set(bench.log[::2]) == {None} and None not in bench.log[1::2]
    assert bench.log[1::2] == every * autotune.ROUNDS


def nothing(x, y):
    """Y is left as it was."""


def one_number(x, y):
    y[-1, -1] += 0.1 * y.abs().max()


def one_nan(x, y):
    y[0, 0] = float("nan")


def last_token(x, y):
    y[-1] = 0


@pytest.mark.parametrize("wrong", [nothing, one_number, one_nan, last_token])
def test_a_tile_that_computes_something_else_never_wins(bench, monkeypatch, wrong):
    def launch(variant, group, x, kept, metadata, bias, adapter_x, adapter_kept, y):
        if not (variant == 1 and wrong is nothing):
            emulated_kernels.launch_sparse_mm(variant, group, x, kept, metadata, bias, adapter_x, adapter_kept, y)
        if variant == 1:
            wrong(x, y)

    monkeypatch.setattr(autotune, "launch_sparse_mm", launch)
    bench.seconds[1, 1] = [0.001]
    bench.seconds[2, 1] = [0.5]
    assert measure() == Choice(2, 1, 2.0)
    assert not any(candidate and candidate[0] == 1 for candidate in bench.log), "it is not even timed"


def test_no_right_tile_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(autotune, "launch_sparse_mm", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="no tile of the 2:4 GEMM computes the dense product of 24 x 64 x 48"):
        measure()


def test_two_ways_are_compared_in_turn(bench):
    def first(way=1):
        pass

    def second(way=2):
        pass

    bench.warming, bench.seconds[1,], bench.seconds[2,] = 0.5, [3.0, 3.0, 9.0, 3.0, 3.0], [2.0]
    assert autotune.compared(first, second) == 1.5
    assert bench.log == [(1,), (2,)] * autotune.ROUNDS
