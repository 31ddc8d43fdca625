"""LAMB of optimization.py against an independent float64 reference."""

import math

import numpy as np
import pytest
import torch
from optimizer_toys import Toy, assert_equal, build, entries, put_gradients, train, weights

import optimization
from optimization import (
    Lamb,
    add_adapter_group,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
)


def reference_lamb(weights, gradients_of_step, decay_of, lr, *, averaging=True, correction=True, max_norm=1.0):
    """FusedLAMB's steps in numpy float64, written from its published kernels, one scalar rule a line.

    Adapters (by their names) have no trust ratio, whatever their decay: that rule is this suite's.
    """
    weights = {name: w.astype(np.float64) for name, w in weights.items()}
    first = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    for t, gradients in enumerate(gradients_of_step, start=1):
        total = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
        divisor = total / max_norm if total > max_norm else 1.0
        for name, w in weights.items():
            g = gradients[name].astype(np.float64) / divisor
            first[name] = 0.9 * first[name] + (0.1 if averaging else 1.0) * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            m = first[name] / (1 - 0.9**t) if correction else first[name]
            v = second[name] / (1 - 0.999**t) if correction else second[name]
            update = m / (np.sqrt(v) + 1e-6) + decay_of[name] * w
            w_norm, u_norm = np.linalg.norm(w.ravel()), np.linalg.norm(update.ravel())
            adaptive = decay_of[name] != 0 and "lora_" not in name
            ratio = w_norm / u_norm if adaptive and w_norm > 0 and u_norm > 0 else 1.0
            weights[name] = w - lr * ratio * update
    return weights


DECAY_OF = {
    "embeddings.weight": 0.01,
    "layer.values": 0.01,
    "layer.bias": 0.0,
    "layer.lora_left": 1e-4,
    "layer.lora_right": 1e-4,
    "unstructured.values": 0.01,
    "LayerNorm.weight": 0.0,
    "LayerNorm.bias": 0.0,
    "decoder.bias": 0.0,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["below the clipping norm", "above"])
@pytest.mark.parametrize("averaging,correction", [(True, True), (False, True), (True, False)])
def test_lamb_is_fused_lamb_step_by_step(fused, scale, averaging, correction):
    model = Toy(adapters=True)
    start = {name: w.numpy() for name, w in weights(model).items()}
    gradients = []
    optimizer = Lamb(
        parameter_groups(model, 0.01, 1e-4), 0.05, fused=fused, grad_averaging=averaging, bias_correction=correction
    )
    for seed in range(12):
        put_gradients(model, seed, scale)
        gradients.append({name: p.grad.numpy().copy() for name, p in model.named_parameters()})
        optimizer.step()
    expected = reference_lamb(start, gradients, DECAY_OF, 0.05, averaging=averaging, correction=correction)
    for name, w in weights(model).items():
        np.testing.assert_allclose(w.numpy(), expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_lamb_in_float64_is_the_reference_to_the_last_digits(fused):
    model = Toy().double()
    start = {name: w.numpy() for name, w in weights(model).items()}
    gradients, optimizer = [], Lamb(parameter_groups(model, 0.01, 1e-4), 0.05, fused=fused)
    for seed in range(12):
        put_gradients(model, seed)
        gradients.append({name: p.grad.numpy().copy() for name, p in model.named_parameters()})
        optimizer.step()
    expected = reference_lamb(start, gradients, DECAY_OF, 0.05)
    for name, w in weights(model).items():
        np.testing.assert_allclose(w.numpy(), expected[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["lamb", "fused-lamb"])
def test_lamb_agrees_with_its_definition_and_leaves_the_gradients_alone(name):
    plain, fused = Toy(adapters=True), Toy(adapters=True)
    train(plain, Lamb(parameter_groups(plain, 0.01, 1e-4), 0.05, fused=False), range(20))
    train(fused, build(name, fused), range(20))
    assert_equal(weights(fused), weights(plain), rtol=1e-6, atol=1e-7)
    put_gradients(plain, 19)
    for ours, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lamb", "fused-lamb", "apex"])
def test_adapters_leave_zero_as_fast_as_the_learning_rate_lets_them(name, request):
    """Gradients of one sign: Adam's rule moves every number by the rate; a trust ratio would stop at the first step."""
    if name == "apex":
        request.getfixturevalue("apex")
        request.getfixturevalue("cuda")
    model = Toy()
    optimizer = build("fused-lamb" if name == "apex" else name, model, lr=1e-3)
    model.add_adapters()
    add_adapter_group(optimizer, model, 1e-4)
    for _ in range(20):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
    torch.testing.assert_close(model.layer.lora_right, torch.full((2, 4), -0.02), rtol=1e-3, atol=0)


def test_lamb_skips_parameters_without_a_gradient_and_counts_their_steps_apart():
    results = []
    for fused in (False, True):
        model = Toy()
        optimizer = Lamb(parameter_groups(model, 0.01, 1e-4), 0.05, fused=fused)
        before = weights(model)
        put_gradients(model, 0)
        model.layer.values.grad = None
        optimizer.step()
        assert torch.equal(model.layer.values, before["layer.values"])
        assert not torch.equal(model.unstructured.values, before["unstructured.values"])
        train(model, optimizer, range(1, 3))
        steps = {parameter: entry["step"] for parameter, entry in entries(optimizer)}
        assert steps.pop("layer.values") == 2
        assert set(steps.values()) == {3}
        results.append(weights(model))
    assert_equal(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_lamb_takes_its_rate_from_a_tensor(fused):
    by_number, by_tensor = Toy(), Toy()
    train(by_number, Lamb(parameter_groups(by_number, 0.01, 1e-4), 0.05, fused=fused), range(3))
    optimizer = Lamb(parameter_groups(by_tensor, 0.01, 1e-4), torch.tensor(1.0), fused=fused)
    rate = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.05)
    assert optimizer.param_groups[0]["lr"] is rate
    train(by_tensor, optimizer, range(3))
    assert_equal(weights(by_tensor), weights(by_number), rtol=1e-6, atol=1e-7)


def test_the_choices_step_in_the_fast_form(monkeypatch):
    monkeypatch.delattr(Lamb, "_update_each")
    for name in ("lamb", "fused-lamb"):
        model = Toy()
        train(model, build(name, model), range(1))


class Kernels:
    """Kernels of a device, as `Lamb` sees them: they take the step, or leave it to the other form."""

    def __init__(self, takes: bool):
        self.takes, self.steps = takes, []

    def step(self, groups, members, states, max_norm) -> bool:
        self.steps.append(([len(params) for params in members], [own[0]["step"] for own in states], max_norm))
        return self.takes


@pytest.mark.parametrize("takes", [True, False])
def test_lamb_asks_once_for_a_devices_kernels_and_leaves_the_step_to_them_if_they_take_it(monkeypatch, takes):
    kernels, asked = Kernels(takes), []
    monkeypatch.setattr(optimization, "lamb_kernels", lambda device: asked.append(device) or kernels)
    model, twin = Toy(), Toy()
    before = weights(model)
    train(model, Lamb(parameter_groups(model, 0.01, 1e-4), 0.05, max_grad_norm=0.5), range(2))
    train(twin, Lamb(parameter_groups(twin, 0.01, 1e-4), 0.05, max_grad_norm=0.5, fused=False), range(2))
    assert asked == [torch.device("cpu")]
    assert kernels.steps == [([3, 4], [1, 1], 0.5), ([3, 4], [2, 2], 0.5)]
    assert_equal(weights(model), before if takes else weights(twin), rtol=1e-6, atol=1e-7)


def test_lamb_returns_the_closures_loss():
    model = Toy()
    optimizer = build("lamb", model)

    def closure():
        loss = (model.layer.values**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert optimizer_state(optimizer)["state"]["layer.values"]["step"] == 1
