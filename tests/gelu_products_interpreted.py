"""kernels/gelu_products.py's arithmetic in Triton's interpreter, with stand-ins for Gluon, and kernels/feed_forward.py
on it and on stand-ins for the 2:4 products; run as tests/dense_kernels_interpreted.py is."""

from dataclasses import replace

import emulated_kernels
import pytest
import torch
from gluon_stand_ins import stand_ins
from product_checks import make_layer, on_cutlass, on_dense
from test_compiled_parts import CONFIG, LENGTHS, batch_of, check_results, results_of
from torch import nn

import modeling
from modeling import BertForPreTraining, compiled_parts, pretraining_loss_sums, use_kernels
from sparse_ops import OperandRefresh, add_adapters, named_layers
from training.assembly import build_model
from training.sparsity import SparsityConfig

with stand_ins():
    import kernels.gelu_products  # noqa: F401 - what the checks import

from gelu_products_checks import (
    INNER,
    OUTER,
    check_equal_bits_and_other_layouts,
    check_feed_forward,
    check_kernels,
    check_operators,
    layers_of,
)

from kernels.feed_forward import feed_forward, runs_together

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("width", [16, 48, 64])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 256), (7, 272), (129, 80)])
def test_gelu_its_gradients_and_narrow_products(tokens, columns, width, dtype):
    check_kernels("cpu", dtype, tokens, columns, width)


def test_equal_bits_and_other_layouts():
    check_equal_bits_and_other_layouts("cpu", torch.float16)


def test_operators_keep_the_rules_of_torch_library():
    check_operators("cpu", torch.float16)


@pytest.fixture
def emulated(monkeypatch):
    library = emulated_kernels.install(monkeypatch)
    yield
    library._destroy()


@pytest.mark.parametrize(("shape", "ranks", "m"), [((45,), (8, 40), 4), ((3, 11), (16, 64), 4), ((1,), (1, 16), 8)])
def test_a_feed_forward_network_is_as_exact_as_its_layers(emulated, shape, ranks, m):
    check_feed_forward("cpu", torch.float16, shape, ranks, m)  # not bf16, which the interpreter cuts off


@pytest.mark.parametrize(
    ("change", "together"),
    [
        (lambda layers: None, True),
        (lambda layers: layers.append(make_layer("cpu", rank=8, sizes=(OUTER, INNER))), False),
        (lambda layers: layers.append(on_cutlass(make_layer("cpu", sizes=(OUTER, INNER)), torch.float16)), False),
        (lambda layers: layers.append(on_cutlass(make_layer("cpu", rank=8, sizes=(OUTER, INNER)))), False),
        (lambda layers: layers.append(layers_of("cpu", torch.float16, (8, 65))[1]), False),
        (lambda layers: layers.append(nn.Linear(INNER, OUTER)), False),
    ],
    ids=["both", "dense operands", "no adapters", "another dtype", "wide adapters", "a dense layer"],
)
def test_which_layers_run_together(emulated, change, together):
    layers = layers_of("cpu", torch.float16)
    change(layers)
    assert runs_together(layers[0], layers[-1]) == together


def test_compiled_it_is_one_graph_for_any_number_of_tokens(emulated):
    torch.compiler.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, dynamic=True)
    for tokens in (45, 30):
        check_feed_forward("cpu", torch.float16, (tokens,), function=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_with_adapters_does_what_it_does_without_kernels(emulated, training, monkeypatch):
    """Blocks whose feed-forward network has no such layers go on as before; without gradients, too."""
    sparsity = SparsityConfig(pruned_matrix="static-weight")
    config = replace(CONFIG, hidden_size=64, intermediate_size=128)
    model = build_model(lambda: BertForPreTraining(config), sparsity, None, seed=1, mask_init="magnitude")
    for name, layer in named_layers(model):
        (on_dense if ".layer.2.output" in name else on_cutlass)(layer, torch.float16)
    for parameter in add_adapters(model, rank=4, seed=1):
        torch.nn.init.normal_(parameter, std=0.5)
    OperandRefresh(model).after_step()
    model.train(training)
    use_kernels(model)
    taken, plain = [], modeling.feed_forward
    monkeypatch.setattr(modeling, "feed_forward", lambda *given: taken.append(given[1]) or plain(*given))
    batches = [batch_of(lengths) for lengths in LENGTHS]
    right = [(results_of if training else losses_of)(model, batch, torch.float16) for batch in batches]
    assert not taken, "eager code runs torch's own operations"
    torch.compiler.reset()
    for part in compiled_parts(model):
        part.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    if training:
        check_results(model, batches, right, torch.float16)
    else:
        for batch, losses in zip(batches, right, strict=True):
            assert losses_of(model, batch, torch.float16) == pytest.approx(losses, rel=2e-3)
    layers = model.bert.encoder.layer
    assert {id(first) for first in taken} <= {id(layers[i].intermediate.dense) for i in (0, 1)} and taken


@torch.no_grad()
def losses_of(model, batch, dtype) -> list[float]:
    with torch.autocast("cpu", dtype):
        scores = model(batch.ids, torch.zeros_like(batch.ids), batch.packing, batch.predicted)
        sums = pretraining_loss_sums(*scores, batch.labels, torch.zeros(len(batch.labels), dtype=torch.int64))
    return [loss.item() for loss in sums]
