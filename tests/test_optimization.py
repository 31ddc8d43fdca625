"""optimization.py: groups, the choice of the optimizer, checkpoint layout, schedules. LAMB: test_lamb.py."""

import copy
import io
import math
import sys

import pytest
import torch
from optimizer_toys import FusedLAMB, Toy, assert_equal, build, entries, put_gradients, train, weights

import optimization
from optimization import (
    DECAYS,
    OPTIMIZERS,
    Lamb,
    add_adapter_group,
    clip_gradients,
    clips_gradients,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    reset_steps,
    set_learning_rate,
)
from training.errors import UsageError

# ---------------------------------------------------------------- groups, choice, clipping


def test_groups_go_by_name_and_list_a_tied_weight_once():
    groups = {group["name"]: group for group in parameter_groups(Toy(adapters=True), 0.01, 1e-4)}
    names = {name: set(group["param_names"]) for name, group in groups.items()}
    assert names == {
        "decay": {"embeddings.weight", "layer.values", "unstructured.values"},
        "no_decay": {"layer.bias", "LayerNorm.weight", "LayerNorm.bias", "decoder.bias"},
        "adapters": {"layer.lora_left", "layer.lora_right"},
    }
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "decay": 0.01,
        "no_decay": 0.0,
        "adapters": 1e-4,
    }
    assert [name for name, group in groups.items() if group["trust_ratio"]] == ["decay"]
    named = dict(Toy(adapters=True).named_parameters())
    for group in groups.values():
        assert [p.shape for p in group["params"]] == [named[name].shape for name in group["param_names"]]


def test_groups_leave_out_what_is_empty_or_frozen():
    model = Toy()
    model.layer.values.requires_grad_(False)
    groups = parameter_groups(model, 0.01, 1e-4)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert all("layer.values" not in group["param_names"] for group in groups)


def test_an_unknown_optimizer_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"--optimizer lion: .*lamb, fused-lamb, adamw, adam, sgd"):
        build("lion", Toy())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_to_nothing_is_refused(name):
    with pytest.raises(UsageError, match="--max_grad_norm 0: must be above 0"):
        build(name, Toy(), max_grad_norm=0.0)


def test_adamw_decouples_its_decay_adam_does_not_and_sgd_is_plain():
    """With a gradient of 0 only decay moves a weight: by lr * decay * w, by one whole Adam step, by lr * decay * w."""
    moved = {}
    for name in ("adamw", "adam", "sgd"):
        model = Toy()
        start = weights(model)
        train(model, build(name, model), range(1), scale=0.0)
        moved[name] = (start["layer.values"] - model.layer.values.detach()) / start["layer.values"]
        assert torch.equal(model.layer.bias, start["layer.bias"]), name
    torch.testing.assert_close(moved["adamw"], torch.full((4, 2), 0.05 * 0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["sgd"], torch.full((4, 2), 0.05 * 0.01), rtol=1e-3, atol=0)
    assert (moved["adam"] > 0.01).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_sees_a_global_gradient_norm_of_at_most_one(name):
    """Gradients ten times too large and a hundred times too large lead to the same step."""
    results = []
    for scale in (10.0, 100.0):
        model = Toy()
        optimizer = build(name, model, max_grad_norm=1.0)
        put_gradients(model, 3, scale)
        if not clips_gradients(optimizer):
            norm = clip_gradients(optimizer, 1.0)
            assert norm.item() > 10
        optimizer.step()
        results.append(weights(model))
    assert clips_gradients(optimizer) == (name in ("lamb", "fused-lamb"))
    assert_equal(results[0], results[1], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- apex


def test_fused_lamb_is_apexs_where_apex_is_nvidias(apex, cuda):
    model, ours = Toy(), Toy()
    optimizer = build("fused-lamb", model)
    assert type(optimizer) is FusedLAMB
    assert clips_gradients(optimizer)
    train(model, optimizer, range(10))
    train(ours, build("lamb", ours), range(10))
    assert_equal(weights(model), weights(ours), rtol=1e-5, atol=1e-6)
    decays = [group["weight_decay"] for group in build("fused-lamb", Toy(adapters=True)).param_groups]
    assert decays == [0.01, 0.0, 0.0], "apex would give adapters a trust ratio"


def test_fused_lamb_is_ours_without_cuda_kernels(apex, cuda, monkeypatch):
    monkeypatch.setattr(sys.modules["apex.multi_tensor_apply"].multi_tensor_applier, "available", False)
    assert isinstance(build("fused-lamb", Toy()), Lamb)


def test_fused_lamb_is_ours_for_a_model_on_the_cpu(apex):
    assert isinstance(build("fused-lamb", Toy()), Lamb)


@pytest.mark.parametrize("source", ["", "from pyramid.session import no_such_name"], ids=["empty", "breaks on import"])
def test_the_unrelated_apex_of_pypi_is_not_taken(source, tmp_path, cuda, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    optimizer = build("fused-lamb", Toy())
    assert isinstance(optimizer, Lamb)
    assert optimizer.fused


# ---------------------------------------------------------------- checkpoint layout


def through_a_file(saved: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copy_of(model: Toy) -> Toy:
    twin = Toy(adapters=hasattr(model.layer, "lora_left"))
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    "writer,reader",
    [(name, name) for name in OPTIMIZERS] + [("lamb", "fused-lamb"), ("fused-lamb", "lamb")],
)
def test_a_reloaded_optimizer_goes_on_as_if_nothing_had_happened(writer, reader):
    model = Toy(adapters=True)
    optimizer = build(writer, model)
    train(model, optimizer, range(5))
    twin = copy_of(model)
    reloaded = build(reader, twin)
    load_optimizer_state(reloaded, through_a_file(optimizer_state(optimizer)))
    train(model, optimizer, range(5, 8))
    train(twin, reloaded, range(5, 8))
    tolerance = {"rtol": 0, "atol": 0} if writer == reader else {"rtol": 1e-6, "atol": 1e-7}
    assert_equal(weights(twin), weights(model), **tolerance)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
def test_the_layout_is_the_same_whichever_optimizer_wrote_it(name):
    model = Toy(adapters=True)
    optimizer = build(name, model)
    train(model, optimizer, range(3))
    saved = optimizer_state(optimizer)
    assert saved["optimizer"] == {"fused-lamb": "lamb"}.get(name, name)
    parameters = dict(model.named_parameters())
    assert saved["state"].keys() == parameters.keys()
    for parameter, entry in saved["state"].items():
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert (type(entry["step"]), entry["step"]) == (int, 3)
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameters[parameter].shape
        assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == torch.float32


def test_state_passes_through_lamb_fused_lamb_and_apex_and_back_bit_for_bit(apex, cuda, monkeypatch):
    model = Toy()
    optimizer = build("lamb", model)
    train(model, optimizer, range(4))
    saved = through_a_file(optimizer_state(optimizer))
    through_apex = build("fused-lamb", copy_of(model))
    monkeypatch.setattr(optimization, "_on_cuda", lambda groups: False)
    through_fused = build("fused-lamb", copy_of(model))
    assert (type(through_apex), type(through_fused)) == (FusedLAMB, Lamb)
    current = saved
    for holder in (through_apex, through_fused, build("lamb", copy_of(model))):
        load_optimizer_state(holder, current)
        current = through_a_file(optimizer_state(holder))
    assert current["optimizer"] == saved["optimizer"] == "lamb"
    torch.testing.assert_close(current["state"], saved["state"], rtol=0, atol=0)


def test_apex_goes_on_from_our_checkpoint(apex, cuda):
    model = Toy()
    optimizer = build("lamb", model)
    train(model, optimizer, range(4))
    twin = copy_of(model)
    reloaded = build("fused-lamb", twin)
    load_optimizer_state(reloaded, optimizer_state(optimizer))
    assert {group["step"] for group in reloaded.param_groups} == {4}
    train(model, optimizer, range(4, 7))
    train(twin, reloaded, range(4, 7))
    assert_equal(weights(twin), weights(model), rtol=1e-5, atol=1e-6)


def test_apex_refuses_steps_that_differ_within_a_group(apex, cuda):
    model = Toy()
    optimizer = build("lamb", model)
    train(model, optimizer, range(2))
    saved = optimizer_state(optimizer)
    saved["state"]["layer.values"]["step"] = 1
    with pytest.raises(UsageError, match=r"--optimizer fused-lamb: .*group decay.*1, 2.*--optimizer lamb"):
        load_optimizer_state(build("fused-lamb", Toy()), saved)


def test_loading_copies_so_that_two_optimizers_never_share_moments():
    model = Toy()
    optimizer = build("lamb", model)
    train(model, optimizer, range(2))
    saved = optimizer_state(optimizer)
    twin = copy_of(model)
    reloaded = build("lamb", twin)
    load_optimizer_state(reloaded, saved)
    before = saved["state"]["layer.values"]["exp_avg"].clone()
    train(twin, reloaded, range(2, 4))
    assert torch.equal(saved["state"]["layer.values"]["exp_avg"], before)


def test_an_optimizer_that_never_stepped_saves_and_loads():
    model, twin = Toy(), Toy()
    load_optimizer_state(build("lamb", twin), optimizer_state(build("lamb", model)))
    reloaded = build("lamb", twin)
    load_optimizer_state(reloaded, optimizer_state(build("lamb", model)))
    train(model, build("lamb", model), range(3))
    train(twin, reloaded, range(3))
    assert_equal(weights(twin), weights(model))


def state_after_two_steps(adapters: bool = False) -> dict:
    model = Toy(adapters)
    optimizer = build("lamb", model)
    train(model, optimizer, range(2))
    return optimizer_state(optimizer)


def without(saved: dict, name: str) -> dict:
    return {**saved, "state": {key: entry for key, entry in saved["state"].items() if key != name}}


def test_wrong_state_is_refused_and_changes_nothing():
    saved = state_after_two_steps()
    reshaped = {**saved["state"]["layer.values"], "exp_avg_sq": torch.zeros(2, 4)}
    cases = [
        (without(saved, "layer.values"), "lacks layer.values"),
        (without(without(saved, "layer.values"), "layer.bias"), r"lacks layer.\w+ \(and 1 more"),
        ({**saved, "state": {**saved["state"], "pooler.weight": saved["state"]["layer.values"]}}, "has pooler.weight"),
        ({**saved, "state": {**saved["state"], "layer.values": reshaped}}, r"exp_avg_sq of layer.values .*\[2, 4\]"),
        (state_after_two_steps(adapters=True), "has layer.lora_left"),
        ({**saved, "optimizer": "adamw"}, "--optimizer is of kind lamb, but the checkpoint's is adamw"),
    ]
    for wrong, message in cases:
        optimizer = build("lamb", Toy())
        with pytest.raises(UsageError, match=message) as error:
            load_optimizer_state(optimizer, wrong)
        assert "\n" not in str(error.value)
        assert not optimizer.state


def test_adapters_absent_from_the_checkpoint_start_fresh_and_half_of_them_is_an_error():
    optimizer = build("lamb", Toy(adapters=True))
    load_optimizer_state(optimizer, state_after_two_steps())
    state = optimizer_state(optimizer)["state"]
    assert state["layer.lora_left"]["step"] == 0
    assert state["layer.values"]["step"] == 2
    with pytest.raises(UsageError, match="lacks layer.lora_right"):
        load_optimizer_state(optimizer, without(state_after_two_steps(adapters=True), "layer.lora_right"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_join_at_step_zero_and_the_rest_goes_on(name):
    model, without_adapters = Toy(), Toy()
    optimizer, control = build(name, model), build(name, without_adapters)
    train(model, optimizer, range(3))
    train(without_adapters, control, range(3))
    set_learning_rate(optimizer, 0.02)
    model.add_adapters()
    before = optimizer_state(optimizer)
    add_adapter_group(optimizer, model, 1e-4)
    group = optimizer.param_groups[-1]
    assert (group["name"], group["weight_decay"], group["lr"]) == ("adapters", 1e-4, 0.02)
    after = optimizer_state(optimizer)
    kept = {parameter: after["state"][parameter] for parameter in before["state"]}
    torch.testing.assert_close(kept, before["state"], rtol=0, atol=0)
    put_gradients(model, 3)
    optimizer.step()
    assert model.layer.lora_right.abs().sum() > 0
    if name != "sgd":
        steps = {parameter: entry["step"] for parameter, entry in optimizer_state(optimizer)["state"].items()}
        assert {steps["layer.lora_left"], steps["layer.lora_right"]} == {1}
        assert steps["layer.values"] == 4
    with pytest.raises(ValueError, match="no adapters that are new"):
        add_adapter_group(optimizer, model, 1e-4)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "apex"])
def test_a_new_phase_keeps_the_moments_and_counts_from_zero(name, request):
    if name == "apex":
        request.getfixturevalue("apex")
        request.getfixturevalue("cuda")
    model = Toy()
    optimizer = build("fused-lamb" if name == "apex" else name, model)
    train(model, optimizer, range(3))
    before = {p: {key: e.clone() for key, e in entry.items() if key != "step"} for p, entry in entries(optimizer)}
    reset_steps(optimizer)
    after = {p: {key: e for key, e in entry.items() if key != "step"} for p, entry in entries(optimizer)}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(entry["step"] == 0 for _, entry in entries(optimizer))
    train(model, optimizer, range(1))
    assert all(entry["step"] == 1 for _, entry in entries(optimizer))


# ---------------------------------------------------------------- schedules


def rates(decay: str, total: int, warmup: float) -> list[float]:
    return [
        learning_rate(step, base=2.0, total_steps=total, warmup_proportion=warmup, decay=decay)
        for step in range(1, total + 1)
    ]


@pytest.mark.parametrize("total,warmup", [(7038, 0.2843), (1563, 0.128), (100, 0.07), (10, 0.3), (10, 0.0)])
def test_poly_is_nvidias_curve_one_step_later(total, warmup):
    def nvidia(step):  # PolyWarmUpScheduler.get_lr, degree 0.5
        progress = step / total
        return 2.0 * progress / warmup if progress < warmup else 2.0 * (1.0 - progress) ** 0.5

    ours = rates("poly", total, warmup)
    for step, rate in enumerate(ours, start=1):
        expected = nvidia(step) if step / total < warmup else 2.0 * (1.0 - (step - 1) / total) ** 0.5
        assert rate == pytest.approx(expected, rel=1e-12), step
    assert nvidia(total) == 0.0
    assert ours[-1] == pytest.approx(2.0 * (1 / total) ** 0.5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("total,warmup", [(20, 0.25), (20, 0.0), (20, 1.0), (1, 0.5), (100, 0.07), (7, 0.3)])
def test_every_schedule_rises_then_never_rises_again_and_every_step_learns(decay, total, warmup):
    curve = rates(decay, total, warmup)
    in_warmup = sum(step / total < warmup for step in range(1, total + 1))
    rising, falling = curve[:in_warmup], curve[in_warmup:]
    assert rising == pytest.approx([2.0 * (i + 1) / total / warmup for i in range(in_warmup)])
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    assert all(0 < rate <= 2.0 for rate in curve)
    if decay != "poly" and falling:
        assert falling[0] == 2.0


def test_linear_cosine_and_constant_after_warmup():
    assert rates("linear", 6, 0.4) == pytest.approx([2 / 2.4, 4 / 2.4, 2.0, 1.5, 1.0, 0.5])
    assert rates("cosine", 4, 0.0) == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(4)])
    assert rates("constant", 3, 0.0) == [2.0, 2.0, 2.0]


def test_wrong_schedules_are_refused():
    with pytest.raises(UsageError, match=r"--lr_decay step: .*poly, linear, cosine, constant"):
        rates("step", 3, 0.0)
    with pytest.raises(UsageError, match=r"--warmup_proportion 1.5: .*between 0 and 1"):
        rates("poly", 3, 1.5)
    for step in (0, 4):
        with pytest.raises(ValueError, match=f"step {step} is outside"):
            learning_rate(step, base=1.0, total_steps=3, warmup_proportion=0.0, decay="poly")


def test_the_rate_reaches_every_group():
    optimizer = build("adamw", Toy(adapters=True))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125] * 3


@pytest.mark.parametrize("name", ["lamb", "fused-lamb"])
@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_adapters_have_a_share_of_the_rate_also_those_that_join(name, rate, apex, cuda):
    from_the_start, joining = Toy(adapters=True), Toy()
    optimizers = [
        optimization.build_optimizer(name, parameter_groups(model, 0.01, 1e-4, lora_lr_scale=0.25), rate)
        for model in (from_the_start, joining)
    ]
    joining.add_adapters()
    add_adapter_group(optimizers[1], joining, 1e-4, lora_lr_scale=0.25)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = copy.deepcopy(group["lr"])  # a tensor of its own
        set_learning_rate(optimizer, 0.5)
        rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        assert rates == {"decay": 0.5, "no_decay": 0.5, "adapters": 0.125}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_on_a_gpu_is_fused_and_goes_on_from_a_checkpoint_and_in_a_new_phase(name, cuda):
    whole, model = Toy(), Toy()
    optimizer, loaded = build(name, whole), build(name, model)
    assert optimizer.defaults["fused"]
    train(whole, optimizer, range(2))
    model.load_state_dict(whole.state_dict())
    load_optimizer_state(loaded, optimizer_state(optimizer))
    reset_steps(optimizer)
    reset_steps(loaded)
    train(whole, optimizer, range(2, 4))
    train(model, loaded, range(2, 4))
    torch.testing.assert_close(whole.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_step_that_overflows_is_not_taken(name, cuda):
    """Neither do hooks see it, which count steps."""
    model, scaler, taken = Toy(), torch.amp.GradScaler("cpu"), []
    optimizer = build(name, model, scaled=True)
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    for number in (1.0, float("inf"), 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, number)
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert len(taken) == 2


def test_every_kind_that_can_be_built_has_a_name_in_checkpoints():
    for name in OPTIMIZERS:
        assert optimization.optimizer_kind(build(name, Toy())) in ("lamb", "adamw", "adam", "sgd")
