"""Gradient buckets: storage, order, overlap with the backward pass, and what is wrong with a model."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from pretraining_runs import assembled, begin_ranks
from torch import Tensor, nn

from training.distributed import World, process_group
from training.engine import Engine
from training.errors import UsageError
from training.execution import captures, obstacle_to_graphs
from training.gradients import GradientBuckets
from training.graphs import MicroStepGraphs
from training.sparsity import SparsityConfig

SMALL = 4 * 8  # bytes: a bucket for each weight of the model below


@pytest.fixture
def alone(tmp_path):
    """A group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2))


def backward(model: nn.Module, buckets: GradientBuckets, summed: bool) -> None:
    buckets.begin(summed)
    model(torch.ones(4, 3, requires_grad=True)).square().sum().backward()
    buckets.finish()


def expected_gradients() -> list[Tensor]:
    model = three_layers()
    model(torch.ones(4, 3)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("bucket_bytes", [SMALL, 2**20], ids=["many", "one"])
def test_gradients_add_up_in_storage_that_stays(alone, bucket_bytes):
    model = three_layers()
    buckets = GradientBuckets(model, bucket_bytes=bucket_bytes)
    assert (len(buckets.buckets) > 3) == (bucket_bytes == SMALL)
    places = [parameter.grad.data_ptr() for parameter in model.parameters()]
    assert len(set(places)) == len(places) and not any(place % 16 for place in places)
    for step in range(2):
        backward(model, buckets, summed=False)
        backward(model, buckets, summed=True)
        for parameter, gradient in zip(model.parameters(), expected_gradients(), strict=True):
            torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-6, atol=0.0, msg=f"step {step}")
        assert [parameter.grad.data_ptr() for parameter in model.parameters()] == places
        buckets.zero()
        assert not any(parameter.grad.any() for parameter in model.parameters())


def test_buckets_leave_as_soon_as_they_are_full_and_last_layers_first(alone, monkeypatch):
    model, events = three_layers(), []
    buckets = GradientBuckets(model, bucket_bytes=SMALL)
    for index, layer in enumerate(model):
        layer.register_full_backward_hook(lambda *_, index=index: events.append(index))
    names = {bucket.gradients.data_ptr(): bucket for bucket in buckets.buckets}
    reduce = dist.all_reduce

    def all_reduce(tensor: Tensor, **options):
        layers = {buckets.names[id(p)][0] for p in names[tensor.data_ptr()].parameters}
        events.append("sends " + "".join(sorted(layers)))
        return reduce(tensor, **options)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    backward(model, buckets, summed=False)
    assert events == [2, 1, 0]
    events.clear()
    backward(model, buckets, summed=True)
    sent = [event for event in events if isinstance(event, str)]
    assert sent == sorted(sent, reverse=True) and len(sent) == len(buckets.buckets)
    assert events.index("sends 2") < events.index(0), "nothing was sent before the backward pass was over"


def test_a_bucket_waits_for_those_before_it(alone, monkeypatch):
    """All ranks send in one order, in whatever order gradients come."""
    model, sent = three_layers(), []
    buckets = GradientBuckets(model, bucket_bytes=SMALL)
    monkeypatch.setattr(buckets, "_send", lambda bucket: (sent.append(bucket), buckets.sent.append((None, None, None))))
    buckets.begin(True)
    for parameter in model.parameters():  # the first layer's first
        assert not sent
        buckets._arrived(parameter)
    assert sent == buckets.buckets


@pytest.mark.parametrize(("unused", "named"), [("2.bias", "2.bias"), ("0.weight", "0.weight")])
def test_a_parameter_without_gradient_is_an_error_that_names_it(alone, unused, named):
    model = three_layers()
    buckets = GradientBuckets(model, bucket_bytes=SMALL)
    kept = {name: parameter for name, parameter in model.named_parameters() if name != unused}
    buckets.begin(True)
    loss = torch.func.functional_call(model, {unused: torch.zeros(model.get_parameter(unused).shape)}, torch.ones(4, 3))
    loss.sum().backward()
    assert all(parameter.grad.any() for name, parameter in kept.items() if not name.startswith("0"))
    with pytest.raises(RuntimeError, match=f"no gradient, or several, among .*{named}"):
        buckets.finish()


def test_a_gradient_that_comes_twice_is_an_error(alone):
    """In place of another: the bucket would be full, and have gone out too early."""
    model = three_layers()
    buckets = GradientBuckets(model, bucket_bytes=2**20)
    buckets.begin(True)
    first, _, *others = model.parameters()
    for parameter in (*others, first, first):
        buckets._arrived(parameter)
    buckets._arrived(others[0])
    with pytest.raises(RuntimeError, match="or several"):
        buckets.finish()


def test_nothing_is_summed_any_more_once_removed(alone, monkeypatch):
    model = three_layers()
    buckets = GradientBuckets(model)
    buckets.remove()
    buckets.begin(True)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    assert not buckets.sent


@pytest.mark.parametrize("communication", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_dtype_that_is_sent(alone, communication):
    buckets = GradientBuckets(three_layers(), communication, SMALL)
    assert buckets.bytes == communication.itemsize * (16 + 8 + 36 + 8 + 16 + 4)


def begin_apart(flags: list[str], result: Path) -> None:
    """Called in each rank in place of a run: ranks whose weights differ are connected."""
    begun = assembled(flags)
    with process_group(begun.world), torch.no_grad():
        for parameter in begun.engine.model.parameters():
            parameter.add_(begun.world.rank)
        begun.engine.connect()
        assert os.environ["NCCL_GRAPH_REGISTER"] == "0"  # else ranks would have to capture together
    torch.save([parameter.detach() for parameter in begun.engine.model.parameters()], f"{result}.{begun.world.rank}")
    sys.exit(0)


def test_all_ranks_begin_with_the_first_one_s_weights(files, tmp_path):
    flags = files.flags(tmp_path / "out")
    prepare = functools.partial(begin_apart, flags, tmp_path / "result")
    assert [rank.finish().code for rank in begin_ranks(flags, 2, prepare)] == [0, 0]
    first, second = (torch.load(f"{tmp_path / 'result'}.{rank}") for rank in range(2))
    own = [parameter.detach() for parameter in assembled(flags).engine.model.parameters()]
    assert all(map(torch.equal, first, own)) and all(map(torch.equal, second, own))


@pytest.mark.parametrize("ranks", [1, 4])
def test_fp16_begins_with_the_scale_that_a_loss_averaged_over_ranks_would_have(files, tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    begun = assembled(files.flags(tmp_path / "out", precision="fp16"))
    assert begun.engine.scaler.get_scale() == 65536 * ranks


# ----------------------------------------------------------------------------------------------- which steps are graphs
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("flag", "ranks", "device", "obstacle", "expected"),
    [
        ("auto", 1, GPU, "", True),
        ("auto", 2, GPU, "", True),
        ("True", 1, GPU, "", True),
        ("False", 1, GPU, "", False),
        ("auto", 1, GPU, "--checkpoint_activations", False),
        ("auto", 1, torch.device("cpu"), "", False),
    ],
)
def test_micro_steps_are_graphs_where_asked_and_possible(flag, ranks, device, obstacle, expected):
    assert captures(flag, World(0, ranks, 0, device), obstacle) is expected


@pytest.mark.parametrize(
    ("device", "flags", "pruned_matrix", "named"),
    [
        (torch.device("cpu"), {}, "none", "a CPU"),
        (GPU, {"checkpoint_activations": True}, "none", "--checkpoint_activations"),
        (GPU, {}, "dynamic-weight", "--pruned_matrix dynamic-weight"),
    ],
)
def test_graphs_that_cannot_be_are_an_error(device, flags, pruned_matrix, named):
    obstacle = obstacle_to_graphs(SimpleNamespace(**flags), SparsityConfig(pruned_matrix))
    with pytest.raises(UsageError, match=f"^--cuda_graphs True: cannot run with {named}; leave it out"):
        captures("True", World(0, 1, 0, device), obstacle)


def test_a_run_that_ends_frees_its_graphs_whoever_still_holds_them():
    """As the traceback of an error does: the process group would wait for them."""
    graphs = MicroStepGraphs(None, [])
    graphs.captured["a shape"] = object()
    engine = Engine.__new__(Engine)
    engine.graphs, engine.buckets = graphs, None
    engine.disconnect()
    assert not graphs.captured and engine.graphs is None


@pytest.mark.parametrize(
    ("ranks", "averages", "count", "expected"),
    [
        (1, False, 1, [(False, True)]),
        (1, False, 3, [(False, False)] * 3),
        (2, True, 1, [(True, False)]),
        (2, True, 2, [(False, False), (True, False)]),
        (2, False, 1, [(False, False)]),  # as benchmarks/scaling.py has it, to compare with
    ],
)
def test_a_lone_micro_step_writes_its_gradients_unless_they_lie_in_buckets(ranks, averages, count, expected):
    engine, asked = Engine.__new__(Engine), []
    engine.buckets, engine.sums_gradients = (object() if ranks > 1 else None), averages
    engine.graphs = lambda batch, summed, alone: asked.append((summed, alone))
    for place in range(count):
        engine.micro_step({}, place, count)
    assert asked == expected
    engine.graphs = SimpleNamespace(captured={}, capture=lambda batch, summed, alone: asked.append((summed, alone)))
    engine.prepare(dict, count)
    assert asked[-1] == (averages, expected[0][1])
