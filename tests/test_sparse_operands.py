"""What the products read always belongs to the present values: steps, loading, adapters, dtypes, compiled graphs."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from sparse_layers import (
    IN,
    OUT,
    assert_fresh,
    check_products,
    every_case,
    every_nm,
    executed,
    make_layer,
    name_of,
    random_gradients,
    reference_of,
    sample,
    some_cases,
    weights_of,
    with_adapters,
)
from sparse_reference import kept_of_every_group, kept_twice, stored_values
from torch import nn

import sparse_ops
from kernels.backends import select_backends
from sparse_ops import OperandRefresh, SparseLinear, add_adapters
from training.errors import UsageError


# -------------------------------------------------------------------------------------- operands are never stale
@every_case
def test_operands_follow_an_optimizer_step(case):
    layer, mask, _ = make_layer(case, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    OperandRefresh(layer).attach(optimizer)
    for seed in range(3):
        before = layer.values.detach().clone()
        random_gradients(layer, seed)
        optimizer.step()
        assert not torch.equal(layer.values, before)
        assert_fresh(layer, mask, case)


@every_case
def test_operands_and_mask_follow_a_loaded_checkpoint(case):
    saved, mask, _ = make_layer(case, seed=1, bias=False)
    layer, other_mask, _ = make_layer(case, seed=2, bias=False)
    assert case[0] == 0 or not torch.equal(mask, other_mask)
    assert set(saved.state_dict()) == {"values", "mask_bits"}, "operands and index are derived, not stored"

    assert layer.load_state_dict(saved.state_dict(), strict=True).missing_keys == []

    assert torch.equal(layer.mask(), mask)
    assert_fresh(layer, mask, case)
    x, grad_y = sample("2d", IN, 1), sample("2d", OUT, 2)
    check_products(layer, reference_of(case, layer, mask, weights_of(saved, mask)), x, grad_y, rtol=1e-11, atol=1e-11)


@every_case
def test_operands_follow_the_adapter_switch(case):
    layer, mask, _ = make_layer(case, bias=False)
    layer.values.data += 1  # as an optimizer of another library writes: past autograd, and past every hook
    layer.refresh(rechoose=True)
    layer.values.data *= 0.5  # the same choice of W^{R,C}
    add_adapters(layer, rank=2, seed=0)
    assert_fresh(layer, mask, case)


@every_nm
def test_layers_that_choose_together_choose_as_each_by_itself(case):
    """On a GPU; here each chooses alone."""
    layers, masks, _ = zip(*(make_layer(case, seed=seed, bias=False) for seed in range(3)), strict=True)
    for layer in layers:
        layer.values.data = layer.values.data.flip(0)
    before = [layer.second_kept.clone() for layer in layers]
    sparse_ops._choose_second(layers)
    for layer, mask, kept in zip(layers, masks, before, strict=True):
        assert not torch.equal(layer.second_kept, kept), "the same choice as before: nothing to see"
        layer.refresh(rechoose=False)
        assert_fresh(layer, mask, case)


def test_layers_choose_together_up_to_a_number_of_weights(monkeypatch):
    monkeypatch.setattr(sparse_ops, "CHOSEN_TOGETHER", 2 * IN * OUT)
    values = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    patterns = ((4, IN), (4, IN), (8, IN), (4, IN), (4, 4 * IN))
    layers = [
        SimpleNamespace(number=number, stored_shape=(OUT, columns), m=m, values=values)
        for number, (m, columns) in enumerate(patterns)
    ]
    groups = [[layer.number for layer in alike] for alike in sparse_ops._alike(layers)]
    assert groups == [[0, 1], [3], [2], [4]]


@every_nm
def test_refresh_writes_into_fixed_storage(case):
    layer, _, _ = make_layer(case)
    saved, _, _ = make_layer(case, seed=1)
    places = [buffer.data_ptr() for buffer in layer.operands.buffers()]
    assert len(places) == 4, "two operands, the places of their values, and which of these W^{R,C} keeps"
    layer.refresh(rechoose=True)
    layer.load_state_dict(saved.state_dict())
    add_adapters(layer, rank=2, seed=0)
    assert [buffer.data_ptr() for buffer in layer.operands.buffers()] == places


@some_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operand_dtype", [None, torch.bfloat16], ids=["same", "bf16-operands"])
def test_operands_follow_a_change_of_dtype(case, dtype, operand_dtype):
    layer, mask, _ = make_layer(case, bias=False)
    if operand_dtype is not None:
        layer.set_operand_dtype(operand_dtype)
    layer.to(dtype)
    assert layer.values.dtype == layer.operands.dtype == dtype
    weight = weights_of(layer, mask)
    forward, backward = executed(layer)
    assert torch.equal(forward, weight)
    assert not backward[weight == 0].any() and torch.equal(backward[backward != 0], weight[backward != 0])


@every_case
def test_operands_can_be_widened_again(case):
    layer, mask, _ = make_layer(case, bias=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.set_operand_dtype(dtype)
    assert_fresh(layer, mask, case)


def test_operand_dtype_of_a_whole_model():
    layers = [make_layer(case, bias=False, dtype=torch.float32)[0] for case in ((4, True), (60, None))]
    model = nn.Sequential(layers[0], nn.Linear(OUT, IN), layers[1])
    select_backends(model, "dense", torch.bfloat16, tokens=8, report=print)
    for layer in layers:
        assert torch.equal(executed(layer)[0], weights_of(layer, layer.mask()).bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@some_cases
def test_deep_copies_are_independent(case):
    layer, mask, _ = make_layer(case, bias=False)
    twin = copy.deepcopy(layer)
    saved, saved_mask, _ = make_layer(case, seed=5, bias=False)
    twin.load_state_dict(saved.state_dict())  # runs the copy's own hook, on the copy
    assert_fresh(twin, saved_mask, case)
    assert_fresh(layer, mask, case)


def test_a_mask_with_another_count_is_refused():
    layer, _, _ = make_layer((60, None))
    other, _, _ = make_layer((50, None))
    state = layer.state_dict() | {"mask_bits": other.state_dict()["mask_bits"]}
    with pytest.raises(UsageError, match=rf"keeps {IN * OUT // 2} weights .* {int(0.4 * IN * OUT)}"):
        layer.load_state_dict(state)


def test_second_choice_is_made_from_the_master_values_not_from_rounded_operands():
    weight = torch.zeros(4, 4)
    weight[:, 0] = torch.tensor([1.0, 1.0 + 2**-12, 1.0 + 2**-11, 1.0 + 2**-10])  # all the same number in bfloat16
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data.copy_(weight)
    layer = SparseLinear(linear, kept_of_every_group(weight.abs(), 2, 4, 1), 4)
    layer.set_operand_dtype(torch.bfloat16)
    assert executed(layer)[1][:, 0].tolist() == [0, 0, 1, 1]
    layer.refresh(rechoose=True)
    assert executed(layer)[1][:, 0].tolist() == [0, 0, 1, 1]


def test_compiled_layer_is_one_graph_and_reads_refreshed_operands():
    layer, mask, _ = make_layer((4, False))
    with_adapters(layer, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    OperandRefresh(layer).attach(optimizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            reference = reference_of((4, False), layer, mask, weights_of(layer, mask))
            optimizer.zero_grad()
            x, grad_y = sample("3d", IN, 1).requires_grad_(), sample("3d", OUT, 2)
            y = compiled(x)
            y.backward(grad_y)
            torch.testing.assert_close(y, reference.output(x.detach()), rtol=1e-11, atol=1e-11)
            expected = reference.gradients(x.detach().reshape(-1, IN), grad_y.reshape(-1, OUT))
            torch.testing.assert_close(x.grad.view(-1, IN), expected["x"], rtol=1e-11, atol=1e-11)
            values_grad = torch.tensor(stored_values(expected["weight"], mask, False), dtype=torch.float64)
            torch.testing.assert_close(layer.values.grad, values_grad, rtol=1e-11, atol=1e-11)
            optimizer.step()


# ---------------------------------------------------------------------------------------------------- OperandRefresh
@pytest.mark.parametrize("case", [(4, True), (8, False)], ids=name_of)
@pytest.mark.parametrize("interval", [0, 1, 3])
def test_interval_between_two_choices(case, interval):
    number, by_input = case
    layer, mask, weight = make_layer(case, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    OperandRefresh(layer, interval).attach(optimizer)

    def choose():
        return kept_twice(weights_of(layer, mask), mask, 2, number, 0 if by_input else 1)

    chosen, kept_an_old_choice = choose(), 0
    for step in range(1, 8):
        random_gradients(layer, step)
        optimizer.step()
        kept_an_old_choice += not torch.equal(chosen, choose())
        if interval and step % interval == 0:
            chosen = choose()
        forward, backward = executed(layer)
        assert torch.equal(forward, weights_of(layer, mask)), "the values are new at every step"
        assert torch.equal(backward, weights_of(layer, mask) * chosen)
    assert kept_an_old_choice == 7, "the choice must change at every step for this test to mean something"


@pytest.mark.parametrize("interval", [0, 1, 3])
def test_resumed_run_is_bit_equal_in_the_middle_of_an_interval(interval):
    cases = [(4, True), (8, False), (60, None)]

    def build(seed):
        layers = [make_layer(case, seed=seed, dtype=torch.float32, sizes=(IN, IN))[0] for case in cases]
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        refresh = OperandRefresh(model, interval)
        refresh.attach(optimizer)
        return model, optimizer, refresh

    def train(model, optimizer, steps):
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = (model(sample("2d", IN, step).float()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    run = build(seed=0)
    train(*run[:2], range(4))
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in run], saved)
    unbroken = train(*run[:2], range(4, 9))

    resumed = build(seed=1)
    saved.seek(0)
    for part, state in zip(resumed, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[2].steps == 4
    assert train(*resumed[:2], range(4, 9)) == unbroken
    for a, b in zip(run[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
