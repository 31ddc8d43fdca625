"""Low-rank adapters of sparse layers: how they start, how they join, what they reach."""

import pytest
import torch
from sparse_layers import IN, OUT, every_case, make_layer, sample, with_adapters
from torch import nn

from sparse_ops import add_adapters, seeded_generator


# ----------------------------------------------------------------------------------------------------------- adapters
def small_model(names=("first", "second")):
    layers = {"first": (4, True), "second": (60, None)}
    return nn.ModuleDict({name: make_layer(layers[name], dtype=torch.float32)[0] for name in names})


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_new_adapters_change_no_output(case, dtype):
    layer, _, _ = make_layer(case, dtype=torch.float32)
    layer.set_operand_dtype(dtype)
    x = sample("3d", IN, 1).float()
    before, values = layer(x), layer.values
    new = add_adapters(layer, rank=4, seed=0)
    assert torch.equal(layer(x), before)
    assert layer.values is values, "an optimizer must find its parameters again"
    assert [id(p) for p in new] == [id(layer.lora_left), id(layer.lora_right)]
    assert layer.lora_left.shape == (IN, 4) and layer.lora_right.shape == (4, OUT)
    assert not layer.lora_right.any() and layer.lora_left.dtype == torch.float32


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_adapters_are_scaled_by_one_over_rank(rank):
    layer, _, _ = make_layer((4, True), bias=False)
    x = sample("2d", IN, 1)
    plain = layer(x)
    with_adapters(layer, rank)
    torch.testing.assert_close(layer(x) - plain, x @ layer.lora_left @ layer.lora_right / rank, rtol=1e-9, atol=1e-9)


def test_adapters_reach_every_sequence_of_the_batch():
    layer, _, _ = make_layer((4, True))
    with_adapters(layer, 3)
    x = sample("3d", IN, 1)
    y = layer(x)
    for sequence in range(3):
        torch.testing.assert_close(y[sequence], layer(x[sequence]), rtol=1e-12, atol=1e-12)
    moved = layer(x[[1, 2, 0]])
    torch.testing.assert_close(moved, y[[1, 2, 0]], rtol=1e-12, atol=1e-12)


def test_adapter_initialisation_depends_on_seed_and_name_alone():
    model = small_model()
    add_adapters(model, rank=8, seed=1)
    turned, alone, double = small_model(("second", "first")), small_model(("second",)), small_model().double()
    torch.rand(3)
    for other in (turned, alone, double):
        add_adapters(other, rank=8, seed=1)
        assert torch.equal(other["second"].lora_left.float(), model["second"].lora_left)
    assert torch.equal(turned["first"].lora_left, model["first"].lora_left)
    assert not torch.equal(model["first"].lora_left, model["second"].lora_left)
    add_adapters(alone, rank=8, seed=2)
    assert not torch.equal(alone["second"].lora_left, model["second"].lora_left)


def test_adapters_start_from_the_standard_normal_distribution():
    layer, _, _ = make_layer((4, True))
    layer.add_adapters(256, seeded_generator(0, "any"))
    assert layer.lora_left.mean().abs() < 0.03 and (layer.lora_left.std() - 1).abs() < 0.03


def test_adapters_travel_with_the_checkpoint():
    model = small_model()
    add_adapters(model, rank=2, seed=1)
    for layer in model.values():
        nn.init.normal_(layer.lora_right)
    other = small_model()
    add_adapters(other, rank=2, seed=9)
    other.load_state_dict(model.state_dict(), strict=True)
    x = sample("2d", IN, 1).float()
    assert all(torch.equal(other[name](x), model[name](x)) for name in model)
