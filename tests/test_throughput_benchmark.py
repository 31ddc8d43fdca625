"""benchmarks/pretraining_throughput.py on a tiny BERT: what takes turns, what is counted, and what its tables say.

What is not tried here is what only a GPU has: graphs, the allocator, a profiler trace.
"""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from pretraining_runs import LENGTH, MODEL, NO_DROPOUT

from benchmarks import (
    huggingface_step,
    pretraining_throughput,
    step_candidates,
    step_profile,
    throughput_picture,
    training_step,
)
from benchmarks.step_candidates import OURS, Candidate, Setting
from benchmarks.timing import Spread
from benchmarks.training_step import TrainingStep, run_flags
from configuration import BertConfig
from data.packing import prediction_places
from modeling import BertForPreTraining
from sparse_ops import SparseLinear, named_layers
from training.distributed import World
from training.errors import UsageError
from training.graphs import MicroStepGraphs
from training.throughput import useful_flops

ALONE = World(0, 1, 0, torch.device("cpu"))
PNG = b"\x89PNG\r\n"


@pytest.fixture
def config() -> BertConfig:
    return BertConfig.from_dict(MODEL | NO_DROPOUT)


def make_step(files, config, model="dense", rank=0, **flags) -> TrainingStep:
    flags = {"precision": "fp32", "local_batch_size": 2} | flags
    args = run_flags(model, model_config_file=files.model_without_dropout, **flags)
    step = TrainingStep(args, config, ALONE, LENGTH, rank)
    step.repeat(3)
    step.connect()
    return step


# ------------------------------------------------------------------------------------------------------------- the step
def test_random_batches_are_what_the_model_takes(config):
    batches = [training_step.random_batch(config, 3, 2, LENGTH, seed) for seed in (0, 1)]
    for batch in batches:
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), (3, 2, LENGTH)),
            **dict.fromkeys(("masked_positions", "masked_labels"), (3, 2, 4)),
            "next_sentence_labels": (3, 2),
        }
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        positions = batch["masked_positions"]
        assert (positions.diff(dim=-1) > 0).all() and positions.max() < LENGTH
        for name in ("input_ids", "masked_labels"):
            assert batch[name].min() >= 0 and batch[name].max() < config.vocab_size
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert [training_step.predictions_of(length) for length in (128, 512)] == [20, 80]


def losses(step: TrainingStep, monkeypatch, count: int = 1) -> list[tuple[float, float]]:
    found = []
    own = TrainingStep.losses_of

    def losses_of(self, taken):
        found.append(own(self, taken))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "losses_of", losses_of)
        step.take(count)
    return found


def test_a_variant_has_places_for_the_predictions_of_its_batch(read):
    """The largest batch, which an unpadded step has captured first, is made by the flag."""
    step = step_candidates.make_step("dense", Setting(LENGTH, 2), read("--shapes", f"{LENGTH}x2"), ALONE)
    assert step.args.max_predictions_per_seq == next(step.loader)["masked_labels"].shape[-1] == 4
    for length in (128, 512):  # 20 of 128 and 80 of 512 are more than 15%
        flags, tokens = training_step.prediction_flags(length), 2**15
        used = tokens // length * flags["max_predictions_per_seq"]
        assert prediction_places(tokens, flags["masked_token_fraction"], tokens) == used


def test_unpadded_and_padded_steps_have_the_same_losses(files, config, monkeypatch):
    padded, unpadded = (make_step(files, config, unpad=word) for word in ("False", "True"))
    assert "boundaries" in next(unpadded.loader) and "attention_mask" in next(padded.loader)
    found = losses(padded, monkeypatch)[0]
    assert losses(unpadded, monkeypatch)[0] == pytest.approx(found, rel=1e-5)
    assert found[0] == pytest.approx(math.log(config.vocab_size), rel=0.05)  # a mean over all micro-steps
    assert padded.tokens == unpadded.tokens == 3 * 2 * LENGTH


@pytest.mark.parametrize(("name", "layers", "adapters"), [("dense", 0, 0), ("slope", 9, 0), ("slope-16", 9, 9)])
def test_a_variant_is_what_its_name_says_and_stays_as_it_is(files, config, name, layers, adapters):
    model, rank = OURS[name]
    step = make_step(files, config, model, rank)
    sparse = [layer for _, layer in named_layers(step.model, SparseLinear)]
    assert len(sparse) == layers
    assert [layer.lora_left.shape[1] for layer in sparse if layer.lora_left is not None] == [rank] * adapters
    assert all(layer.lora_right.abs().min() > 0 for layer in sparse if adapters)
    before = {key: tensor.clone() for key, tensor in step.model.state_dict().items()}
    step.take(2)
    assert step.step == 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in step.model.state_dict().items())
    assert all(state["exp_avg"].any() for state in step.optimizer.state.values() if state["exp_avg"].numel() > 64)


@pytest.mark.parametrize(
    ("device", "order"),
    [("cpu", "give1 wait1 give2 wait2 give3 wait3"), ("cuda", "give1 give2 wait1 give3 wait2 wait3")],
)
def test_a_gpu_is_given_a_step_before_the_last_one_s_losses_are_read(device, order):
    done = []

    class Scripted(training_step.Stepping):
        def __init__(self):
            self.world, self.step = SimpleNamespace(device=torch.device(device)), 0
            self.loader = SimpleNamespace(wait_seconds=0.5)

        def next_batch(self, loader, stop):
            return {}, SimpleNamespace(tokens=7.0)

        def give_step(self, step, *_):
            self.step = step
            done.append(f"give{step}")
            return step

        def losses_of(self, taken):
            done.append(f"wait{taken}")

    step = Scripted()
    step.take(3)
    assert done == order.split()
    assert (step.tokens, step.waited) == (21.0, 1.5)


def test_candidates_take_turns(monkeypatch):
    turns = []

    def seconds_of(step, count, world):
        turns.append((step, count))
        return {"a": 0.5, "b": 0.1}[step]

    monkeypatch.setattr(training_step, "seconds_of", seconds_of)
    samples = training_step.take_turns({"dense": "a", "slope": "b"}, 2, 1.0, ALONE)
    assert turns == [("a", 1), ("a", 1), ("b", 1), ("b", 1)] + [("a", 2), ("b", 10)] * 2
    assert samples == {"dense": [0.5, 0.5], "slope": [0.1, 0.1]}


def test_a_time_is_that_of_one_step(monkeypatch):
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(training_step.time, "perf_counter", lambda: next(clock))
    taken = []
    assert training_step.seconds_of(SimpleNamespace(take=taken.append), 4, ALONE) == 0.5
    assert taken == [4]


def test_shared_graphs_rehearse_until_told_and_never_again(monkeypatch):
    done, seen = [], []
    monkeypatch.setattr(MicroStepGraphs, "rehearse", lambda self, batch: (seen.append(batch), done.append("rehearse")))
    monkeypatch.setattr(MicroStepGraphs, "__call__", lambda *a: (a[0].rehearse(a[1]), done.append("graph")))
    assert MicroStepGraphs(None, []).pool is None  # the place that the shared pool takes
    graphs = training_step.SharedGraphs(None, [], (0, 1))
    batch = {"x": torch.ones(4)[:2]}
    assert graphs(batch) == 0.0
    assert not seen[0]["x"]._is_view(), "compiled for a view, which the captured inputs are not"
    graphs.rehearsing = False
    graphs(batch)
    assert done == ["rehearse", "graph"]
    assert graphs.pool == (0, 1)


def test_nothing_is_captured_while_rehearsing_not_even_the_largest_batch(files, config, monkeypatch):
    """An unpadded step has the largest batch captured before its own: that would be compiled while capturing."""
    done = []
    monkeypatch.setattr(MicroStepGraphs, "rehearse", lambda self, batch: done.append("rehearse"))
    monkeypatch.setattr(MicroStepGraphs, "capture", lambda self, batch, *_: done.append("capture"))
    step = make_step(files, config, unpad="True")
    step.engine.captured = True
    graphs = step.connect((0, 1))
    step.engine.step = lambda rate: None
    step.take()
    assert set(done) == {"rehearse"}
    graphs.rehearsing = False
    step.engine.prepare(lambda: {}, 1)
    assert done[-1] == "capture"


def test_a_model_s_first_step_is_the_rehearsal(files, config, monkeypatch):
    """With graphs that are none: what the step asks of them, and what is there before any is captured."""

    def rehearse(self, batch):
        self.function(batch, False)
        self.reached = [True] * len(self.parameters)

    monkeypatch.setattr(MicroStepGraphs, "rehearse", rehearse)
    monkeypatch.setattr(MicroStepGraphs, "__call__", lambda self, batch, summed, alone: self.function(batch, summed))
    step = make_step(files, config)
    step.engine.captured = True
    graphs = step.connect((0, 1))
    assert graphs is step.engine.graphs and graphs.pool == (0, 1)
    assert losses(step, monkeypatch) == [(0.0, 0.0)]
    states = [state["exp_avg"] for state in step.optimizer.state.values()]
    assert len(states) == len(list(step.model.parameters())) and not any(state.any() for state in states)
    graphs.rehearsing = False
    assert all(loss > 0.1 for loss in losses(step, monkeypatch)[0])
    assert any(state.any() for state in states)


# --------------------------------------------------------------------------------------------------------- Hugging Face
def test_hugging_face_takes_the_same_step(config, monkeypatch):
    pytest.importorskip("transformers")
    step = huggingface_step.HuggingFaceStep(config, ALONE, "bf16", 2, LENGTH)
    step.repeat(3)
    assert step.connect() is None
    waited = []
    own = step._wait_for
    monkeypatch.setattr(step, "_wait_for", lambda loss: (waited.append(loss.read()), own(loss)))
    before = [p.clone() for p in step.model.parameters()]
    step.take(1)
    lone, zeroed = [], []

    def graphs(batch, alone):  # as MicroStepGraphs
        lone.append(alone)
        return step._forward_and_backward(batch, False)

    step.graphs = graphs
    step.graphs.zero = lambda: (zeroed.append(len(lone)), step.optimizer.zero_grad())
    step.take(1)
    assert (lone, zeroed) == ([False] * 3, [3])
    assert waited[0] == waited[1] == pytest.approx(math.log(config.padded_vocab_size) + math.log(2), rel=0.05)
    assert all(map(torch.equal, step.model.parameters(), before))
    step.repeat(1)
    step.take(1)
    assert (lone[3:], zeroed) == ([True], [3, 4])
    ours = sum(p.numel() for p in BertForPreTraining(config).parameters())
    assert sum(p.numel() for p in step.model.parameters()) == ours


def test_labels_stand_where_the_tokens_are_masked():
    batch = {
        "input_ids": torch.zeros(1, 1, 5, dtype=torch.int64),
        "masked_positions": torch.tensor([[[1, 4]]]),
        "masked_labels": torch.tensor([[[7, 9]]]),
    }
    assert huggingface_step.labels_of(batch).tolist() == [[[-100, 7, -100, -100, 9]]]


# ----------------------------------------------------------------------------------------------------------- candidates
def test_state_is_counted_by_kind(files, config):
    dense, slope = (make_step(files, config, model) for model in ("dense", "slope"))
    for step in (dense, slope):
        step.take()
    found = step_candidates.state_bytes(dense)
    numbers = sum(p.numel() for p in BertForPreTraining(config).parameters())
    assert [found[kind] for kind in ("parameters", "gradients", "optimizer")] == [4 * numbers, 4 * numbers, 8 * numbers]
    assert found["operands"] == found["index data"] == 0
    pruned = sum(layer.in_features * layer.out_features for _, layer in named_layers(slope.model, SparseLinear))
    found = step_candidates.state_bytes(slope)
    assert found["parameters"] == 4 * (numbers - pruned // 2)
    assert found["operands"] > 0 and found["index data"] > 0


def test_ratios_are_taken_round_by_round(read, files, config):
    args = read("--accumulation", "3", "--shapes", f"{LENGTH}x2")
    candidate = Candidate("slope-16", make_step(files, config), None)
    samples = {"dense": [4.0, 6.0, 9.0], "slope": [3.0, 2.0, 3.0], "slope-16": [2.0, 4.0, 3.0]}
    row = step_candidates.record(candidate, Setting(LENGTH, 2), samples, args, ALONE)
    tokens = 3 * 2 * LENGTH
    assert row["tokens_per_second"] == tokens / 3.0
    assert row["step"] == Spread(3.0, 2.0, 4.0)
    assert row["against_dense"] == Spread(2.0, 1.5, 3.0)
    assert row["against_slope"] == Spread(1.0, 0.5, 1.5)
    flops = useful_flops(config, tokens, tokens * LENGTH, 3 * 2 * 4, 3 * 2)
    assert row["tflops"] == pytest.approx(flops / 3.0 / 1e12)
    for name in ("dense", "slope"):
        candidate.name = name
        row = step_candidates.record(candidate, Setting(LENGTH, 2), samples, args, ALONE)
        assert (row["against_dense"] is None) == (name == "dense") and row["against_slope"] is None


@pytest.mark.parametrize("when", ["rehearsing", "capturing"])
def test_what_does_not_fit_is_left_out_and_said(read, monkeypatch, when):
    own = step_candidates.make_step

    def make(name, *rest):
        step = own(name, *rest)
        take, calls = step.take, []

        def run_out(count=1):
            calls.append(count)
            if name == "slope" and len(calls) == (1 if when == "rehearsing" else 2):
                raise torch.OutOfMemoryError
            take(count)

        step.take = run_out
        return step

    monkeypatch.setattr(step_candidates, "make_step", make)
    args = read("--shapes", f"{LENGTH}x2", "--variants", "slope,slope-16")
    rows, notes = step_candidates.measure(args.variants, args.shapes[0], args, ALONE)
    assert [row["variant"] for row in rows] == ["dense", "slope-16"]
    assert notes[0] == f"{LENGTH}x2: slope does not fit into memory beside the others"
    assert rows[1]["against_slope"] is None
    rows, notes = step_candidates.measure(("slope", "dense"), args.shapes[0], args, ALONE)
    assert rows == [] and len(notes) == 1  # nothing to compare with


@pytest.mark.parametrize("off", [0.5, 0.97, 1.0, 1.03, 2.0])
@pytest.mark.parametrize("most", [0, 7, 8, 63, 64, 72, 200, 1203, 4095])
def test_the_largest_batch_is_found(most, off):
    """Also where the memory of two small batches says little; where it says much, at once."""
    tried = []

    def peak_of(count):
        tried.append(count)
        return 5000 + 100 * count if count <= most else None

    assert step_candidates.largest(peak_of, memory=int(5000 + 100 * off * most)) == most // 8 * 8
    assert len(tried) == len(set(tried)) <= (9 if 0.97 <= off <= 1.03 and most < 2000 else 22)
    assert all(count % 8 == 0 for count in tried)


def test_a_batch_that_takes_no_memory_ends_the_search():
    assert step_candidates.largest(lambda count: 1, memory=100, limit=1000) == 1000


def test_a_batch_that_runs_out_of_memory_does_not_fit(read, monkeypatch):
    args, made = read("--shapes", f"{LENGTH}x2"), []

    def make(name, setting, args, world, **more):
        def take(count):
            if setting.sequences > 24:
                raise torch.OutOfMemoryError

        made.append((name, count := setting.sequences, more))
        return SimpleNamespace(connect=lambda: None, take=take, count=count)

    monkeypatch.setattr(step_candidates, "make_step", make)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**20))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    rows = []
    report = SimpleNamespace(table=lambda *_: None, row=rows.append, note=lambda _: None)
    args.variants = ("dense", "slope", "huggingface")
    pretraining_throughput.find_largest(args, ALONE, report)
    assert [(row["variant"], row["sequences"], row["ratio"]) for row in rows] == [("dense", 24, 1), ("slope", 24, 1)]
    assert all(more == {"cuda_graphs": "False"} for _, _, more in made)


# ---------------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shapes", "17x2"), "--shapes 17x2: the model has 16 positions"),
        (("--shapes", "16"), "--shapes: must be like 128x256, not 16"),
        (("--shapes", "16x0"), "--shapes: must be a whole number of at least 1, not 0"),
        (("--variants", "sparse"), "--variants: must be names of dense, slope"),
        (("--largest_batch", "--shapes", "16x2"), "--largest_batch: needs a GPU"),
        (("--picture", "p.jpg", "--shapes", "16x2"), "--picture p.jpg: must end in .png"),
        (("--picture", "p.png", "--input_dir", "x"), "--picture: of random sequences alone"),
    ],
)
def test_wrong_flags(read, words, message):
    with pytest.raises(UsageError, match=message):
        read(*words)


def test_what_the_flags_leave_open(read, monkeypatch):
    small = ("--shapes", "16x2")
    args = read(*small)
    monkeypatch.setattr(huggingface_step, "available", lambda: False)
    assert read(*small).variants == tuple(OURS)
    with pytest.raises(UsageError, match="--variants huggingface: needs the package transformers"):
        read(*small, "--variants", "slope,huggingface")
    monkeypatch.setattr(huggingface_step, "available", lambda: True)
    assert read(*small).variants == pretraining_throughput.VARIANTS
    assert read(*small, "--variants", "slope-64").variants == ("dense", "slope-64")
    assert (args.rounds, args.sample_seconds) == (2, 0)
    rounds = pretraining_throughput.QUICK_ROUNDS, pretraining_throughput.ROUNDS
    for word, count in zip(("True", "False"), rounds, strict=True):
        monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "--shapes", "16x2", "--quick", word])
        assert pretraining_throughput.read_flags(ALONE).rounds == count


def test_one_command_makes_table_file_and_picture(read, tmp_path, capsys):
    pytest.importorskip("transformers")
    file, picture = tmp_path / "step.json", tmp_path / "step.png"
    variants = "slope,slope-16,huggingface"
    read("--shapes", "16x2,8x3", "--huggingface_shapes", "8x3", "--variants", variants, "--output", f"{file}")
    sys.argv += ["--picture", f"{picture}"]
    pretraining_throughput.main()
    content, printed = json.loads(file.read_text()), capsys.readouterr().out
    cells = [(row["sequence_length"], row["sequences"], row["variant"]) for row in content["rows"]]
    ours = ["dense", "slope", "slope-16"]
    assert cells == [(16, 2, name) for name in ours] + [(8, 3, name) for name in (*ours, "huggingface")]
    for row in content["rows"]:
        tokens = row["sequence_length"] * row["sequences"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step"]["median"])
        assert len(row["samples"]) == 2
        assert row["peak_bytes"] is row["mfu"] is row["kernel_seconds"] is None
        assert (row["against_dense"] is None) == (row["variant"] == "dense")
    shares = [row["state_of_dense"] for row in content["rows"][:3]]
    assert shares[0] == 1 and all(0 < share < 2 for share in shares)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(cells)
    assert len({line.count("|") for line in table}) == 1
    assert printed.count("8x3: our dense is ×") == 1
    assert picture.read_bytes().startswith(PNG)


def test_the_picture_of_a_profile(tmp_path):
    def row(variant, tokens):
        kinds = dict.fromkeys(step_profile.KINDS, 1e-3)
        sizes = {"sequences": 2, "sequence_length": 8, "accumulation": 5}
        return sizes | {"variant": variant, "tokens_per_second": tokens, "kernel_seconds": kinds}

    rows = [row("dense", 1e5), row("slope", 1.2e5)]
    throughput_picture.draw(rows, "heading", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    assert throughput_picture.nanoseconds_a_token(rows[0], step_profile.IDLE) == pytest.approx(1e6 / (2 * 8 * 5))
    cells = pretraining_throughput.PROFILE_COLUMNS
    assert cells["attention"](rows[0]) == f"1.00 ({1 / len(step_profile.KINDS):.1%})"
