"""Gradient buckets within CUDA graphs, of one rank, whose sums NCCL has nothing to do for: storage, rounding, shapes.

What NCCL does in a graph, tests/test_gpu_processes.py sees, on two GPUs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import World, process_group
from training.gradients import GradientBuckets
from training.graphs import MicroStepGraphs

pytestmark = pytest.mark.gpu
SMALL = 4 * 64  # bytes: a bucket for each weight of the model below


@pytest.fixture
def alone(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with process_group(World(0, 1, 0, torch.device("cuda", torch.cuda.current_device()))):
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


@pytest.mark.parametrize("communication", [torch.float32, torch.bfloat16])
def test_graphs_of_several_shapes_sum_what_has_added_up(alone, communication):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers).cuda()
    plain, samples = copy.deepcopy(model), [torch.randn(rows, 64, device="cuda") for rows in (32, 16, 24)]
    buckets = GradientBuckets(model, communication, SMALL)
    assert len(buckets.buckets) > 4

    def micro_step(batch: dict[str, Tensor], summed: bool) -> Tensor:
        buckets.begin(summed)
        loss = loss_of(model, batch["x"])
        loss.backward()
        buckets.finish()
        return loss.detach()

    graphs = MicroStepGraphs(micro_step, model.parameters())
    for step in range(3):
        for last, x in ((False, samples[0]), (True, samples[step])):
            expected = loss_of(plain, x)
            expected.backward()
            torch.testing.assert_close(graphs({"x": x}, last), expected.detach())
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad.to(communication).float(), rtol=1e-2, atol=1e-4)
            assert torch.equal(ours.grad, ours.grad.to(communication).float()), "was not summed in that dtype"
        buckets.zero()
        plain.zero_grad()
    assert len(graphs.captured) == 4  # 32 rows with and without sums, 16 and 24 with
