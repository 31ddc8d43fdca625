"""The Triton kernels of a block without a GPU: their checks in Triton's interpreter, and where they are refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from interpreter import run_interpreted

import kernels
from kernels.build import KernelsUnavailable
from modeling import BertConfig, BertForPreTraining
from training.distributed import World
from training.errors import UsageError
from training.execution import attends_shortly, run_dense_kernels
from training.pretraining import PretrainingRun

SIZES = {"vocab_size": 61, "num_hidden_layers": 1, "intermediate_size": 64}


def test_the_kernels_in_tritons_interpreter():
    run_interpreted("short_attention_interpreted.py")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"attention": "flash", "device": "cpu"}, None),
        ({"device": "cpu"}, "a CPU"),
        ({"unpadded": False}, r"padding computed \(--unpad\)"),
        ({"longest": 129}, "sequences of 129 tokens"),
        ({"heads": 4}, "attention heads of size 24"),
    ],
)
def test_short_attention_is_refused_where_it_cannot_run(change, reason, monkeypatch):
    monkeypatch.setattr("kernels.lamb.check_device", lambda device: None)
    case = {"attention": "short", "device": "cuda", "unpadded": True, "longest": 128, "heads": 3} | change
    config = BertConfig(**SIZES, hidden_size=96, num_attention_heads=case["heads"])
    args, world = SimpleNamespace(attention=case["attention"]), World(0, 1, 0, torch.device(case["device"]))
    ask = (args, config, case["unpadded"], case["longest"], world)
    if reason is None:
        assert attends_shortly(*ask) == (case["attention"] == "short")
    else:
        with pytest.raises(UsageError, match=f"--attention short: cannot run with {reason}; leave it out"):
            attends_shortly(*ask)


def refuse(device):
    raise KernelsUnavailable("Triton needs a C compiler: install gcc, or set CC")


def test_a_machine_that_cannot_compile_is_told_before_the_first_step(monkeypatch):
    monkeypatch.setattr("kernels.lamb.check_device", refuse)
    config = BertConfig(**SIZES, hidden_size=96, num_attention_heads=3)
    with pytest.raises(UsageError, match="^--attention short: Triton needs a C compiler"):
        attends_shortly(SimpleNamespace(attention="short"), config, True, 128, World(0, 1, 0, torch.device("cuda")))


@pytest.mark.parametrize("short", [False, True])
def test_what_a_run_is_told_reaches_the_model(short):
    seen = []

    def model(ids, types, attention, masked):
        seen.append(attention)
        return None, None

    run = PretrainingRun.__new__(PretrainingRun)
    run.longest, run.short_attention, run.loss_sums = 128, short, lambda *scores: (0, 0)
    names = ("input_ids", "token_type_ids", "positions", "masked_positions", "masked_labels", "next_sentence_labels")
    part = {name: torch.zeros(4, dtype=torch.int64) for name in names}
    run.forward(model, part | {"boundaries": torch.tensor([0, 3, 4])})
    assert (seen[0].short, seen[0].longest) == (short, 128)


def without_triton(monkeypatch) -> None:
    """And none of the modules that import it, but LAMB's, which has checked the device."""
    monkeypatch.setattr("kernels.lamb.check_device", lambda device: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("short_attention", "dense_backward", "dropout"):
        monkeypatch.delitem(sys.modules, f"kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)


def test_without_triton_that_is_the_reason(monkeypatch):
    without_triton(monkeypatch)
    config = BertConfig(**SIZES, hidden_size=96, num_attention_heads=3)
    with pytest.raises(
        UsageError, match=r"^--attention short: no Triton \(.*\): it comes with every CUDA build of torch"
    ):
        attends_shortly(SimpleNamespace(attention="short"), config, True, 128, World(0, 1, 0, torch.device("cuda")))


# --------------------------------------------------------------------------------------------------- the dense kernels
CUDA = World(0, 1, 0, torch.device("cuda"))


def test_the_dense_kernels_in_tritons_interpreter():
    run_interpreted("dense_backward_interpreted.py")


def test_dense_kernels_run_in_the_blocks_alone(monkeypatch):
    monkeypatch.setattr("kernels.lamb.check_device", lambda device: None)
    model = BertForPreTraining(BertConfig(**SIZES, hidden_size=96, num_attention_heads=3))
    run_dense_kernels(model, True, CUDA)
    told = [name for name, module in model.named_modules() if getattr(module, "kernels", False)]
    block = "bert.encoder.layer.0"
    assert told == [f"{block}.attention.output", f"{block}.intermediate", f"{block}.output"]


def test_dense_kernels_are_refused_where_they_cannot_run(monkeypatch):
    model = BertForPreTraining(BertConfig(**SIZES, hidden_size=96, num_attention_heads=3))
    with pytest.raises(UsageError, match="^--dense_kernels True: cannot run without a GPU's compiled blocks"):
        run_dense_kernels(model, False, CUDA)
    without_triton(monkeypatch)
    with pytest.raises(UsageError, match=r"^--dense_kernels True: no Triton \(.*\): it comes with every CUDA build"):
        run_dense_kernels(model, True, CUDA)
    monkeypatch.setattr("kernels.lamb.check_device", refuse)
    with pytest.raises(UsageError, match="^--dense_kernels True: Triton needs a C compiler"):
        run_dense_kernels(model, True, CUDA)
