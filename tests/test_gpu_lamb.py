"""LAMB's kernels (kernels/lamb.py) on a GPU: against the definition, without waiting, and near the memory's speed.

python -m pytest -m gpu -s tests/test_gpu_lamb.py       # -s shows the speeds
"""

import statistics
import time

import pytest
import torch
from lamb_checks import (
    TOLERANCE,
    Pair,
    check_against_definition,
    check_equal_bits,
    check_groups_that_join_and_gradients_that_lack,
    check_not_a_number_reaches_every_weight,
    check_whatever_moves_is_found,
    check_without_trust_ratio,
    check_zero_norms,
    definition_only,  # noqa: F401 - a fixture
    each_setting,
)
from torch import Tensor, nn

from optimization import Lamb

pytestmark = pytest.mark.gpu
SIZES = [1, 1000, 1024 * 4096 + 3, (1000, 1000), 8192, 8193, 1023, 0]
BYTES = 44  # that a step moves a parameter: g twice, p m v twice each, and p m v written


@each_setting
def test_the_kernels_are_the_definition(settings):
    check_against_definition("cuda", SIZES, steps=8, **settings)


def test_without_trust_ratio():
    check_without_trust_ratio("cuda", SIZES)


def test_groups_that_join_and_gradients_that_lack():
    check_groups_that_join_and_gradients_that_lack("cuda")


def test_whatever_moves_is_found():
    check_whatever_moves_is_found("cuda")


def test_zero_norms():
    check_zero_norms("cuda")


def test_not_a_number_reaches_every_weight():
    check_not_a_number_reaches_every_weight("cuda")


def test_equal_inputs_give_equal_bits():
    check_equal_bits("cuda", SIZES)


def test_half_precision_parameters_take_the_other_form(monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 300, 40, device="cuda").unbind()
    ends = []
    for fused in (True, False):
        p = nn.Parameter(start.bfloat16())
        optimizer = Lamb([p], 0.05, fused=fused)
        for _ in range(3):
            p.grad = gradient.bfloat16()
            optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        ends.append(p.detach().float())
    assert not torch.equal(ends[0], start.bfloat16().float())
    torch.testing.assert_close(*ends, rtol=2e-2, atol=1e-3)


def test_a_step_waits_for_nothing_and_takes_no_memory():
    sizes = [(1024, 4096)] * 8 + [1024] * 50
    params, optimizer = gpu_lamb([(sizes, 0.01)])
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = p.grad.neg()  # at another address
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # One gradient at a time is there twice.
    assert torch.cuda.max_memory_allocated() - before < 1024 * 4096 * 4 + 2**21


def test_many_steps_ahead_of_the_gpu():
    """The host is ten steps ahead, each with numbers of its own, before the first of them runs."""
    pair = Pair([([(64, 33), 100], {"weight_decay": 0.01}), ([100], {"weight_decay": 0.0})], "cuda", lr=0.05)
    gradients = [[torch.randn_like(single) for _, single in pair.params()] for _ in range(10)]
    for sleep, optimizer, which in ((False, pair.definition, 0), (True, pair.kernels, 1)):
        if sleep:
            torch.cuda.synchronize()
            torch.cuda._sleep(2 * 10**8)
        for number, gradient in enumerate(gradients):
            for pair_of, g in zip(pair.params(), gradient, strict=True):
                pair_of[which].grad = g.to(pair_of[which].dtype)
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
            optimizer.step()
    pair.check()


def test_a_captured_step_takes_its_rate_from_the_device():
    settings = {"bias_correction": False, "weight_decay": 0.01}
    rates = [torch.tensor(0.0, device="cuda") for _ in range(2)]
    params, optimizer = gpu_lamb([([(300, 40), 7], 0.01)], lr=rates[0], **settings)
    twins = [nn.Parameter(p.detach().double()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.double()
    definition = Lamb(twins, rates[1], fused=False, **settings)
    graph = torch.cuda.CUDAGraph()
    optimizer.step()  # at a rate of 0: moments alone move
    definition.step()
    with torch.cuda.graph(graph):
        optimizer.step()
    for rate in (0.05, 0.02):
        for tensor in rates:
            tensor.fill_(rate)
        graph.replay()
        definition.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.double(), twin, **TOLERANCE)


def test_a_capture_that_would_freeze_the_step_count_is_refused():
    _, optimizer = gpu_lamb([([40], 0.01)])
    optimizer.step()
    with pytest.raises(RuntimeError, match="bias_correction=False alone"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


# ---------------------------------------------------------------- speed


def gpu_lamb(groups: list[tuple[list, float]], lr: float | Tensor = 1e-3, **settings) -> tuple[list, Lamb]:
    """Parameters with gradients, and the optimizer; of each group, the sizes and the weight decay."""
    made = [
        {"params": [nn.Parameter(torch.randn(size, device="cuda")) for size in sizes], "weight_decay": decay}
        for sizes, decay in groups
    ]
    params = [p for group in made for p in group["params"]]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, Lamb(made, lr, **settings)


def bert_large(kept: float) -> list[tuple[list, float]]:
    """The sizes of BERT-Large's parameters, with `kept` of each encoder weight, with and without decay."""
    h, inner = 1024, 4096
    products = [(h, int(h * kept))] * 4 + [(inner, int(h * kept)), (h, int(inner * kept))]
    weights = [(30528, h), (512, h), (2, h), *products * 24, (h, h), (h, h), (2, h)]
    others = [h, h, *([h] * 4 + [inner, h] + [h] * 4) * 24, h, h, h, h, 30528, 2]
    return [(weights, 0.01), (others, 0.0)]


def milliseconds(step, repeats: int = 10) -> float:
    """Median time on the GPU."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(3):
        step()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))


def bytes_per_millisecond() -> float:
    """Of a large copy, read and written."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def host_milliseconds(step, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


@pytest.mark.parametrize("placed", ["aligned", "misaligned gradients"])
@pytest.mark.parametrize("kept", [1.0, 0.5], ids=["dense", "2:4"])
def test_a_step_runs_near_the_speed_of_memory(kept, placed):
    params, optimizer = gpu_lamb(bert_large(kept))
    values = sum(p.numel() for p in params)
    if placed != "aligned":
        bucket = torch.zeros(values + 1, device="cuda")
        for p, gradient in zip(params, bucket[1:].split([p.numel() for p in params]), strict=True):
            p.grad = gradient.view_as(p).copy_(p.grad)
    taken, bound = milliseconds(optimizer.step), values * BYTES / bytes_per_millisecond()
    host = host_milliseconds(optimizer.step)
    print(
        f"\nLAMB, {len(params)} tensors, {values / 1e6:.0f}M values, {placed}: {taken:.2f} ms on the GPU, "
        f"{values * BYTES / taken / 1e9:.2f} TB/s ({bound:.2f} ms at the speed of a copy), {host:.2f} ms on the host"
    )
    assert taken < 3 * bound
