"""kernels/joint.py: query, key and value as one product, on stand-ins for the kernels, and where that cannot be."""

import pytest
import torch
from emulated_kernels import install
from joint_checks import DTYPE, IN, OUTS, assert_same, each_alone, results_of, sparse_layers, together
from product_checks import make_layer, normal, on_cutlass, on_dense
from torch import nn

from kernels import autotune, joint
from kernels.backends import CutlassOperands
from kernels.joint import join, products


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The stand-ins; what was tuned."""
    tuned, library = [], install(monkeypatch)
    monkeypatch.setattr(autotune, "tune", lambda tokens, rows, columns, *_: tuned.append((tokens, rows, columns)))
    monkeypatch.setattr(autotune, "choice_of", lambda *_: autotune.Choice(0, 1, 1.0))
    monkeypatch.setattr("kernels.ops.choice_of", autotune.choice_of)
    yield tuned
    del library


@pytest.mark.parametrize("m", [4, 8])
def test_joined_products_and_gradients_are_those_of_the_layers(m, kernels, monkeypatch):
    layers = sparse_layers(m)
    expected = results_of(layers, each_alone)
    assert join(layers, [40, 20])
    assert kernels == [(n, *sizes) for n in (40, 20) for sizes in ((sum(OUTS), IN), (IN, sum(OUTS)))]
    assert_same(results_of(layers, each_alone), expected)  # a layer alone runs on its slices
    products = []
    monkeypatch.setattr(joint, "sparse_mm", lambda *given, plain=joint.sparse_mm: products.append(1) or plain(*given))
    assert_same(results_of(layers, together), expected)
    assert len(products) == 2, "one forward, one input gradient"


@pytest.mark.parametrize("make", [sparse_layers, lambda: [nn.Linear(IN, out) for out in OUTS]], ids=["2:4", "dense"])
def test_compiled_it_is_one_graph_and_the_same(make):
    layers = make()
    join(layers, [40])
    expected = results_of(layers, together)
    torch.compiler.reset()
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    assert_same(results_of(layers, compiled), expected)


def test_joint_operands_follow_values_masks_and_the_second_choice():
    layers = sparse_layers()
    join(layers, [40])
    earlier = layers[2].second_kept
    with torch.no_grad():
        for layer in layers:
            layer.values.mul_(torch.linspace(-1, 2, layer.values.numel()).view_as(layer.values))
    for rechoose in (False, True):
        with torch.no_grad():
            CutlassOperands.refresh_all(layers, rechoose)
        assert_same(results_of(layers, together), results_of(layers, each_alone))
    other = make_layer("cpu", 4, seed=9, sizes=(OUTS[1], IN))
    layers[1].load_state_dict(other.state_dict())
    assert_same(
        results_of(layers, together)[:1], results_of([layers[0], on_cutlass(other, DTYPE), layers[2]], each_alone)[:1]
    )
    assert not torch.equal(layers[2].second_kept, earlier)
    layers[2].set_second_kept(earlier)
    assert torch.equal(layers[2].second_kept, earlier)
    assert_same(results_of(layers, together), results_of(layers, each_alone))


def assert_apart(layers) -> None:
    with torch.autocast("cpu", DTYPE):
        outputs, _ = products(normal("cpu", 3, IN, seed=7, dtype=DTYPE), layers)
    assert [output.shape for output in outputs] == [(3, layer.out_features) for layer in layers]


def test_adapters_that_join_leave_the_layers_to_themselves():
    layers = sparse_layers()
    join(layers, [40])
    for layer in layers:
        layer.add_adapters(4, torch.Generator().manual_seed(1))
        with torch.no_grad():
            layer.lora_right.normal_()
        layer.refresh(rechoose=False)
    assert_apart(layers)
    assert_same(results_of(layers, together), results_of(layers, each_alone))


def test_dense_layers_are_one_product():
    layers = [nn.Linear(IN, out) for out in OUTS]
    assert not join(layers, [40])
    assert_same(results_of(layers, together), results_of(layers, each_alone))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: sparse_layers(make=on_dense),
        lambda: sparse_layers(rank=4),
        lambda: [*sparse_layers()[:2], on_cutlass(make_layer("cpu", 8, sizes=(256, IN)), DTYPE)],
        lambda: [*sparse_layers()[:2], on_cutlass(make_layer("cpu", 4, sizes=(256, IN)), torch.float16)],
        lambda: [*sparse_layers()[:2], on_cutlass(make_layer("cpu", 4, sizes=(320, IN)), DTYPE)],
        lambda: [*sparse_layers()[:2], nn.Linear(IN, 256)],
    ],
    ids=["dense operands", "adapters", "another M", "another dtype", "no whole metadata", "a dense layer"],
)
def test_what_cannot_be_joined_runs_apart(layers, kernels):
    made = layers()
    assert not join(made, [40]) and not kernels
    assert_apart(made)
