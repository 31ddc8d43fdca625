"""`SparseLinear` against `sparse_reference.MaskedDense` in float64: products, gradients, parameter, training."""

import inspect

import pytest
import sparse_reference
import torch
from sparse_layers import (
    CASES,
    IN,
    OUT,
    assert_fresh,
    check_products,
    every_case,
    executed,
    make_layer,
    name_of,
    reference_of,
    sample,
    some_cases,
    twice_pruned,
    weights_of,
    with_adapters,
)
from sparse_reference import MaskedDense, kept_of_every_group, lamb_steps, stored_values
from torch import nn
from torch.utils.checkpoint import checkpoint

from optimization import Lamb
from sparse_ops import DenseOperands, N, OperandRefresh, SparseLinear, nm_mask

# ----------------------------------------------------------------------------------------------------------- products
INPUT_AND_GRADIENT = [
    *[(kind, kind) for kind in ("1d", "2d", "3d", "4d", "empty")],
    *[("2d-transposed", "2d"), ("2d", "2d-transposed"), ("strided", "expanded"), ("expanded", "strided")],
    *[("3d-transposed", "3d"), ("3d", "3d-transposed")],
]


@every_case
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [0, 3])
def test_products_and_gradients(case, bias, rank):
    for kinds in INPUT_AND_GRADIENT:
        layer, mask, weight = make_layer(case, bias=bias)
        if rank:
            with_adapters(layer, rank)
        reference = reference_of(case, layer, mask, weight)
        check_products(layer, reference, sample(kinds[0], IN, 1), sample(kinds[1], OUT, 2), rtol=1e-11, atol=1e-11)


def test_without_the_second_pruning_the_input_gradient_reads_the_forward_weight():
    linear = nn.Linear(IN, OUT).double()
    mask = nm_mask(linear.weight.detach().abs(), N, 4)
    layer, weight = SparseLinear(linear, mask, 4, double_prune=False), linear.weight.detach() * mask
    refresh = OperandRefresh(layer, interval=2)
    for _ in range(3):
        x, grad_y = sample("3d", IN, 1).requires_grad_(), sample("3d", OUT, 2)
        layer(x).backward(grad_y)
        torch.testing.assert_close(x.grad, grad_y @ weight, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            layer.values.mul_(-2)
        weight = weight * -2
        refresh.after_step()
    assert layer.second_kept is None and refresh.state_dict() == {"steps": 3, "second_masks": {}}


def test_products_in_float32():
    layer, mask, weight = make_layer((4, True), dtype=torch.float32)
    x, grad_y = sample("3d", IN, 1).float(), sample("3d", OUT, 2).float()
    check_products(layer, reference_of((4, True), layer, mask, weight), x, grad_y, rtol=1e-4, atol=1e-4)


@some_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_operands(case, dtype, autocast):
    """Operands and inputs are rounded once; the choice of W^{R,C} and the gradients' own dtype stay the master's."""
    layer, mask, weight = make_layer(case, dtype=torch.float32)
    with_adapters(layer, 3)
    layer.set_operand_dtype(dtype)
    x, grad_y = sample("3d", IN, 1).float().requires_grad_(), sample("3d", OUT, 2).to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = layer(x)
    y.backward(grad_y)

    reference = reference_of(case, layer, mask, weight)
    for field in ("weight", "twice_pruned", "left", "right", "bias"):
        setattr(reference, field, getattr(reference, field).to(dtype).double())
    tokens, grad_tokens = x.detach().to(dtype).double().view(-1, IN), grad_y.double().view(-1, OUT)
    expected = reference.gradients(tokens, grad_tokens)
    expected["y"] = reference.output(tokens)
    by_rows = mask if layer.by_input else mask.t()
    weight_grad = expected["weight"] if layer.by_input else expected["weight"].t()
    expected["values"] = weight_grad[by_rows].view(layer.values.shape)

    actual = {"y": y, "x": x.grad, "values": layer.values.grad, "bias": layer.bias.grad}
    actual |= {"left": layer.lora_left.grad, "right": layer.lora_right.grad}
    assert y.dtype == dtype and layer.values.dtype == torch.float32
    for name, tensor in actual.items():
        # a few roundings of numbers as large as the tensor's largest, but most of them smaller: its root mean square
        error = (tensor.double().view(expected[name].shape) - expected[name]).square().mean().sqrt()
        assert error <= 2 * torch.finfo(dtype).eps * expected[name].square().mean().sqrt(), name


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_activations_give_the_same_gradients(rank):
    def gradients(run):
        layer, _, _ = make_layer((4, True))
        if rank:
            with_adapters(layer, rank)
        x = sample("3d", IN, 1).requires_grad_()
        run(layer, x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    plain = gradients(lambda layer, x: layer(x))
    again = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# --------------------------------------------------------------------------------------------- the stored parameter
@every_case
def test_layout_of_the_values(case):
    layer, mask, weight = make_layer(case)
    number, by_input = case
    lists = stored_values(weight, mask, by_input is not False)
    if by_input is None:
        assert layer.values.tolist() == sum(lists, [])
        assert layer.values.numel() == int((1 - number / 100) * IN * OUT)
    else:
        assert layer.values.tolist() == lists
        assert layer.values.shape == ((OUT, IN * 2 // number) if by_input else (IN, OUT * 2 // number))
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(layer.dense_weight(), weight)
    assert torch.equal(layer.dense_weight(double_pruned=True), twice_pruned(weight, mask, case))


def test_layout_of_a_literal_matrix_with_kept_zeros():
    weight = torch.tensor([[0.0, 3.0, -4.0, 1.0, 0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, -7.0]])
    mask = kept_of_every_group(weight.abs(), 2, 4, 1)
    linear = nn.Linear(8, 2, bias=False)
    linear.weight.data.copy_(weight)
    layer = SparseLinear(linear, mask, None)
    assert layer.values.tolist() == [3, -4, 0, 0, 5, 0, 7, -7]
    linear = nn.Linear(8, 4, bias=False)
    linear.weight.data.copy_(torch.cat([weight, weight]))
    layer = SparseLinear(linear, torch.cat([mask, mask]), 4)
    assert layer.values.tolist() == [[3, -4, 0, 0], [5, 0, 7, -7]] * 2
    linear = nn.Linear(4, 8, bias=False)
    linear.weight.data.copy_(torch.cat([weight, weight]).t())
    layer = SparseLinear(linear, torch.cat([mask, mask]).t(), 4, reduction_dim=False)
    assert layer.values.tolist() == [[3, -4, 0, 0], [5, 0, 7, -7]] * 2


TORCH_OPTIMIZERS = {
    name: kind
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
    and name not in ("SparseAdam", "LBFGS")
}  # SparseAdam takes sparse gradients only, LBFGS evaluates the loss several times within one step


def build_optimizer(kind, layer):
    wanted = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    if kind.__name__ == "Muon":  # matrices only
        return kind([layer.values], **wanted)
    known = inspect.signature(kind).parameters
    return kind(layer.parameters(), **{name: value for name, value in wanted.items() if name in known})


@pytest.mark.parametrize("kind", [*TORCH_OPTIMIZERS.values(), Lamb], ids=lambda kind: kind.__name__)
def test_no_optimizer_moves_the_mask(kind):
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} <= set(TORCH_OPTIMIZERS)
    for case in [(4, True), (8, False)]:
        layer, mask, before = make_layer(case, bias=False)
        with_adapters(layer, 2)
        optimizer = build_optimizer(kind, layer)
        OperandRefresh(layer).attach(optimizer)
        x, target = sample("2d", IN, 1), sample("2d", OUT, 2)

        def closure(layer=layer, optimizer=optimizer, x=x, target=target):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        with torch.no_grad():
            layer.lora_right.zero_()
        after, _ = executed(layer)
        assert not after[~mask].any(), "a pruned weight came back"
        assert not layer.dense_weight()[~mask].any() and torch.equal(layer.mask(), mask)
        assert not torch.equal(after, before), "nothing was trained"
        assert after[mask & (before == 0)].any(), "a kept weight that was 0 must be trained like any other"
        assert_fresh(layer, mask, case)


# --------------------------------------------------------------------------------------------------------------- LAMB
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ten_lamb_steps_are_ten_of_masked_dense_training(case):
    """Two layers, tanh between them, mean squared error; the dense side is written out, backward pass and all."""
    first, first_mask, first_weight = make_layer(case, seed=1)
    second, second_mask, second_weight = make_layer(case, seed=2, sizes=(IN, OUT))
    model = nn.Sequential(first, nn.Tanh(), second)
    settings = {"betas": sparse_reference.LAMB_BETAS, "eps": sparse_reference.LAMB_EPS}
    settings |= {"lr": sparse_reference.LAMB_LR, "weight_decay": sparse_reference.LAMB_DECAY}
    optimizer = Lamb(model.parameters(), max_grad_norm=sparse_reference.LAMB_MAX_NORM, **settings)
    OperandRefresh(model).attach(optimizer)

    dense = {"first": first_weight.clone(), "second": second_weight.clone()}
    dense |= {"bias1": first.bias.detach().clone(), "bias2": second.bias.detach().clone()}
    states = {}
    for step in range(10):
        x, target = sample("2d", IN, 2 * step), sample("2d", IN, 2 * step + 1)
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()

        layers = [
            MaskedDense(dense[name], mask, twice_pruned(dense[name], mask, case), dense[bias])
            for name, mask, bias in (("first", first_mask, "bias1"), ("second", second_mask, "bias2"))
        ]
        hidden = layers[0].output(x).tanh()
        error = layers[1].output(hidden) - target
        upper = layers[1].gradients(hidden, 2 * error / error.numel())
        lower = layers[0].gradients(x, upper["x"] * (1 - hidden.square()))
        gradients = {
            "first": lower["weight"],
            "second": upper["weight"],
            "bias1": lower["bias"],
            "bias2": upper["bias"],
        }
        lamb_steps(states, dense, gradients)
        assert loss.item() == pytest.approx(float(error.square().mean()), rel=1e-9)

    for layer, mask, name, bias in ((first, first_mask, "first", "bias1"), (second, second_mask, "second", "bias2")):
        torch.testing.assert_close(weights_of(layer, mask), dense[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.bias.detach(), dense[bias], rtol=1e-9, atol=1e-11)
        start = first_weight if name == "first" else second_weight
        assert (dense[name] - start).norm() > 0.1 * start.norm(), "the steps must be large enough to mean something"


def test_operands_that_come_later_are_those_of_a_layer_that_began_with_some():
    """Also where a checkpoint is loaded and adapters join before; the layer is moved, too."""
    torch.manual_seed(0)
    linears = [nn.Linear(16, 8), nn.Linear(16, 8)]
    whole, other = (SparseLinear(linear, nm_mask(linear.weight.abs(), 2, 4), 4) for linear in linears)
    late = SparseLinear(linears[1], nm_mask(linears[1].weight.abs(), 2, 4), 4, with_operands=False)
    assert late.operands is None and not list(late.children())
    late.load_state_dict(whole.state_dict())
    for layer in (whole, late):
        layer.add_adapters(4, torch.Generator().manual_seed(1))
        layer.double()
    late.set_operands(DenseOperands(late))
    for name, buffer in whole.operands.named_buffers():
        assert torch.equal(buffer, dict(late.operands.named_buffers())[name]), name
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(late(x), whole(x)) and not torch.equal(late(x), other.double()(x))
