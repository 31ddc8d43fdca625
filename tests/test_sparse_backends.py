"""Which layer runs on which backend, and what is said of it: refusals, measured ratios, flags. No GPU is needed."""

import importlib
import sys
from types import SimpleNamespace

import emulated_kernels
import finetuning_runs
import pretraining_runs
import pytest
import torch
from torch import nn

from kernels import autotune, backends
from kernels.build import KernelsUnavailable
from sparse_ops import DenseOperands, N, SparseLinear, nm_mask
from training.errors import UsageError
from training.flags import run_door

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")


@pytest.fixture
def emulated(monkeypatch):
    library = emulated_kernels.install(monkeypatch)
    yield
    library._destroy()


# -------------------------------------------------------------------------------------------------------------- choice
def a_layer(m=4, by_input=True, size=(64, 64), cuda=True, double_pruned=True):
    """As much of a layer as a refusal looks at."""
    sizes = {"out_features": size[0], "in_features": size[1]}
    values = SimpleNamespace(is_cuda=cuda, device="cuda:0")
    return SimpleNamespace(values=values, m=m, by_input=by_input, double_pruned=double_pruned, **sizes)


REFUSALS = [
    # capability, dtype, layer; why cutlass and why cusparselt cannot run it
    ((9, 0), BF16, {}, None, None),
    ((9, 0), FP16, {"m": 8}, None, "2:8"),
    ((9, 0), BF16, {"m": 16}, None, "2:16"),
    ((9, 0), BF16, {"size": (48, 80)}, None, "sizes that are no multiples of 32"),
    ((9, 0), BF16, {"size": (64, 40)}, "sizes that are no multiples of 16", "sizes that are no multiples of 32"),
    ((9, 0), BF16, {"size": (40, 64)}, "sizes that are no multiples of 16", "sizes that are no multiples of 32"),
    ((9, 0), FP32, {}, "--precision fp32", "--precision fp32"),
    ((9, 0), BF16, {"by_input": False}, "--reduction_dim False", "--reduction_dim False"),
    ((9, 0), FP16, {"m": None}, "an unstructured mask", "an unstructured mask"),
    ((9, 0), BF16, {"double_pruned": False}, "--double_prune False", "--double_prune False"),
    ((8, 0), BF16, {}, "compute capability 8.0", None),
    ((8, 9), BF16, {}, "compute capability 8.9", None),
    ((7, 5), BF16, {}, "compute capability 7.5", "compute capability 7.5"),
    ((10, 0), BF16, {}, "compute capability 10.0", None),
    ((9, 0), BF16, {"cuda": False}, "no CUDA device", "no CUDA device"),
]


@pytest.mark.parametrize(("capability", "dtype", "changes", "cutlass", "cusparselt"), REFUSALS)
def test_refusals(monkeypatch, capability, dtype, changes, cutlass, cusparselt):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    for backend, reason in (("cutlass", cutlass), ("cusparselt", cusparselt)):
        found = backends.refusal(backend, a_layer(**changes), dtype)
        assert found is None if reason is None else found.startswith(reason), found
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert backends.refusal("cusparselt", a_layer(**changes), dtype) is not None


def linear_layer(m=4, size=(64, 64), reduction_dim=True) -> SparseLinear:
    linear = nn.Linear(size[1], size[0])
    weight = linear.weight.detach()
    mask = weight > 0 if m is None else nm_mask(weight.abs(), N, m, dim=int(reduction_dim))
    return SparseLinear(linear, mask, m, reduction_dim)


def model_of(**layers: SparseLinear) -> nn.Module:
    return nn.ModuleDict({"block": nn.ModuleDict(layers)})


@pytest.fixture
def hopper(emulated, monkeypatch) -> SimpleNamespace:
    """A machine where cutlass runs what it can: `ratios` of [out, in] are what a tune would measure, `step` a step."""
    machine = SimpleNamespace(ratios={}, step=1.5, tuned=[], named=[])
    refusal = backends.refusal

    def refused(backend, layer, dtype):
        return refusal(backend, a_layer(layer.m, layer.by_input, (layer.out_features, layer.in_features)), dtype)

    def tune(tokens, out, columns, dtype, device):
        machine.tuned.append((tokens, out, columns, dtype))
        return autotune.Choice(ratio=machine.ratios.get((out, columns), 1.25))

    def measured_once(name, device, fields, measure):
        machine.named.append(name)
        found = measure()
        assert found.keys() == set(fields)
        return found

    def compared(dense, sparse):
        dense()
        sparse()
        return machine.step

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "refusal", refused)
    monkeypatch.setattr(backends, "loaded", lambda library: None)
    for stand_in in (tune, measured_once, compared):
        monkeypatch.setattr(autotune, stand_in.__name__, stand_in)
    return machine


def selected(model: nn.Module, backend: str, dtype=BF16, tokens: int = 4096) -> list[str]:
    """What is reported."""
    lines = []
    backends.select_backends(model, backend, dtype, tokens, lines.append)
    return lines


@without_gpu
def test_auto_is_dense_without_a_gpu():
    for dtype in (BF16, FP32):
        model = model_of(query=linear_layer())
        assert selected(model, "auto", dtype) == ["1 sparse layers 64 -> 64, 2:4: dense products (no CUDA device)"]
        assert type(model["block"]["query"].operands) is DenseOperands
        assert model["block"]["query"].operands.dtype == dtype


@without_gpu
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_backends_asked_for_by_name_are_errors_without_a_gpu(backend):
    model = model_of(query=linear_layer())
    operands = model["block"]["query"].operands
    with pytest.raises(UsageError, match=f"^--sparse_backend {backend} cannot run block.query: no CUDA device$"):
        selected(model, backend)
    assert model["block"]["query"].operands is operands


def test_dense_is_dense_everywhere(hopper):
    model = model_of(query=linear_layer())
    assert selected(model, "dense", FP16) == ["1 sparse layers 64 -> 64, 2:4: dense products"]
    assert type(model["block"]["query"].operands) is DenseOperands and not hopper.tuned
    assert model["block"]["query"].operands.dtype == FP16


@pytest.mark.parametrize(("step", "faster"), [(1.01, True), (1.0, False), (0.9, False)])
@pytest.mark.parametrize("forward", [0.8, 1.3])
def test_auto_never_loses_to_dense(hopper, forward, step, faster):
    hopper.ratios, hopper.step = {(96, 64): forward}, step
    products = f"x{forward:.2f} forward, x1.25 input gradient"
    measured = f"{products}, x{step:.2f} a step of the layer, against dense at 4096 tokens"
    model = model_of(dense=linear_layer(size=(96, 64)))
    remark = f"cutlass ({measured})" if faster else f"dense products (cutlass {measured})"
    assert selected(model, "auto") == [f"1 sparse layers 64 -> 96, 2:4: {remark}"]
    kind = backends.CutlassOperands if faster else DenseOperands
    assert type(model["block"]["dense"].operands) is kind and model["block"]["dense"].operands.dtype == BF16
    assert hopper.tuned == [(4096, 96, 64, BF16), (4096, 64, 96, BF16)]
    assert hopper.named == ["step 4096x96x64 2:4 rank 0 bfloat16"]
    asked = model_of(dense=linear_layer(size=(96, 64)))
    lines = selected(asked, "cutlass")
    assert lines == [f"1 sparse layers 64 -> 96, 2:4: cutlass ({products}, against dense at 4096 tokens)"]
    assert type(asked["block"]["dense"].operands) is backends.CutlassOperands
    assert len(hopper.named) == 1, "what is asked for by name is not compared"


@pytest.mark.parametrize("forward", [0.8, 1.3])
def test_of_a_frozen_layer_the_forward_product_decides(hopper, forward):
    hopper.ratios = {(96, 64): forward}
    layer = linear_layer(size=(96, 64)).requires_grad_(False)
    (line,) = selected(model_of(dense=layer), "auto")
    assert f"x{forward:.2f} forward, x1.25 input gradient, against dense" in line and not hopper.named
    assert type(layer.operands) is (backends.CutlassOperands if forward > 1 else DenseOperands)


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("kind", [DenseOperands, backends.CutlassOperands])
def test_the_step_that_is_compared_is_a_whole_one_of_the_layer(emulated, monkeypatch, kind, rank, m):
    layer = linear_layer(m, size=(96, 64))
    if rank:
        layer.add_adapters(rank, torch.Generator().manual_seed(0))
    before, generator, asked = layer.operands, torch.get_rng_state(), []
    operands, grad = kind(layer, BF16), torch.autograd.grad
    step = backends._training_step(layer, operands, 40)
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: asked.append((given, grad(*given))))
    step()
    assert layer.operands is before and layer.values.grad is None
    ((y, (x, values), grad_y), (grad_x, grad_values)) = asked[0]
    assert x.shape == (40, 64) and x.dtype == y.dtype == BF16 and values is layer.values
    mask = layer.dense_weight() != 0
    layer.operands = operands
    twice = layer.dense_weight(double_pruned=True).bfloat16().float()
    once = layer.dense_weight().bfloat16().float()
    low_rank = layer.adapter_weight() if rank else 0.0
    close = {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(y.float(), x.float() @ (once + low_rank).t(), **close)
    torch.testing.assert_close(grad_x.float(), grad_y.float() @ (twice + low_rank), **close)
    dense = grad_y.float().t() @ x.float()
    torch.testing.assert_close(grad_values.flatten(), dense[mask], rtol=0.02, atol=0.2)
    assert twice.count_nonzero() < once.count_nonzero(), "W^{R,C} is chosen"
    assert torch.equal(torch.get_rng_state(), generator), "random numbers of the run stay its own"


def test_layers_of_a_kind_are_measured_once_and_other_kinds_apart(hopper):
    hopper.ratios = {(96, 64): 0.5}
    layers = {"query": linear_layer(), "key": linear_layer(), "up": linear_layer(size=(96, 64))}
    layers |= {"long": linear_layer(m=8), "free": linear_layer(m=None), "across": linear_layer(reduction_dim=False)}
    model = model_of(**layers)
    slow = "x0.50 forward, x1.25 input gradient, x1.50 a step of the layer, against dense at 64 tokens"
    fast = "cutlass (x1.25 forward, x1.25 input gradient, x1.50 a step of the layer, against dense at 64 tokens)"
    assert selected(model, "auto", tokens=64) == [
        f"2 sparse layers 64 -> 64, 2:4: {fast}",
        f"1 sparse layers 64 -> 96, 2:4: cutlass ({slow})",
        f"1 sparse layers 64 -> 64, 2:8: {fast}",
        "1 sparse layers 64 -> 64, unstructured: dense products (an unstructured mask)",
        "1 sparse layers 64 -> 64, 2:4: dense products (--reduction_dim False)",
    ]
    kinds = {name: type(layer.operands) for name, layer in layers.items()}
    assert {name for name, kind in kinds.items() if kind is backends.CutlassOperands} == {"query", "key", "up", "long"}
    assert len(hopper.named) == len(set(hopper.named)) == 3
    with pytest.raises(UsageError, match="^--sparse_backend cutlass cannot run block.free: an unstructured mask$"):
        selected(model, "cutlass")


def test_micro_batches_of_several_sizes_are_tuned_for(hopper):
    lines, model = [], model_of(query=linear_layer(size=(64, 96)))
    backends.select_backends(model, "cutlass", BF16, 4096, lines.append, other_tokens=[2048, 7296])
    assert hopper.tuned == [(t, *sizes, BF16) for t in (4096, 2048, 7296) for sizes in ((64, 96), (96, 64))]
    assert len(lines) == 1 and lines[0].endswith("against dense at 4096 tokens)")


@pytest.mark.parametrize("where", ["operands", "sparse_gemm"])
def test_kernels_that_cannot_be_compiled(hopper, monkeypatch, where):
    def fail(*_):
        raise KernelsUnavailable("no nvcc: install the CUDA toolkit")

    if where == "operands":
        monkeypatch.setattr(backends, "loaded", fail)
    else:
        monkeypatch.setattr(autotune, "tune", fail)
    model = model_of(query=linear_layer())
    reason = "no nvcc: install the CUDA toolkit"
    assert selected(model, "auto") == [f"1 sparse layers 64 -> 64, 2:4: dense products ({reason})"]
    assert type(model["block"]["query"].operands) is DenseOperands
    with pytest.raises(UsageError, match=f"^--sparse_backend cutlass cannot run block.query: {reason}$"):
        selected(model, "cutlass")


# ----------------------------------------------------------------------------------------------------------- the doors
@without_gpu
def test_pretraining_refuses_cutlass_in_one_line(files, tmp_path):
    line = pretraining_runs.refused(files.flags(tmp_path / "run", sparse_backend="cutlass"), tmp_path / "run")
    assert "--sparse_backend cutlass cannot run bert.encoder.layer.0." in line and line.endswith(": no CUDA device")


@without_gpu
def test_fine_tuning_refuses_cutlass_in_one_line(tmp_path):
    folder = finetuning_runs.make_folder(tmp_path / "model")
    data = finetuning_runs.write_sst2(tmp_path / "data")
    flags = {"pruned_matrix": "static-weight", "sparse_backend": "cutlass"}
    line = finetuning_runs.refused("run_glue", finetuning_runs.glue(folder, data, tmp_path / "run", **flags))
    assert "--sparse_backend cutlass cannot run bert.encoder.layer.0." in line and line.endswith(": no CUDA device")


@without_gpu
def test_log_says_what_runs_the_products(whole_run):
    lines = (whole_run / "logfile.txt").read_text()
    for kind in ("16 -> 16", "16 -> 32", "32 -> 16"):
        assert f" sparse layers {kind}, 2:4: dense products (no CUDA device)" in lines


@pytest.mark.parametrize("door", ["run_pretraining", "run_glue", "run_squad"])
def test_help_lists_the_flag(door, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{door}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        run_door(importlib.import_module(door).main)
    assert end.value.code == 0
    assert "--sparse_backend {auto,cutlass,cusparselt,dense}" in capsys.readouterr().out
