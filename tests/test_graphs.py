"""The bookkeeping of training/graphs.py, with graphs that are emulated on a CPU: what is added, written and zeroed."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from training import graphs as module
from training.graphs import MicroStepGraphs


class Emulated:
    """CUDA graphs of one function: a capture computes nothing; a replay adds to, or writes, the gradients of then.

    One pool: a replay overwrites what other graphs wrote there.
    """

    def __init__(self, monkeypatch, function, parameters):
        self.run, self.parameters, self.graphs, self.allocated = function, list(parameters), [], 0
        fakes = {
            "get_rng_state": lambda: None,
            "set_rng_state": lambda state: None,
            "graph_pool_handle": lambda: (0, 1),
            "current_device": lambda: 0,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(reset=lambda: None),
            "graph": self.capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(module, "without_ownership", lambda tensor: tensor.view_as(tensor))
        monkeypatch.setattr(module, "_rehearsal_stream", lambda device: torch.cuda.current_stream())

    def function(self, batch: dict[str, Tensor], summed: bool) -> Tensor:
        self.inputs, self.output = batch, self.run(batch)
        return self.output

    @contextlib.contextmanager
    def capture(self, graph, pool, capture_error_mode):
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        yield
        targets = [p.grad for p in self.parameters]
        for target, old in zip(targets, before, strict=True):
            if target is not None:
                target.copy_(torch.full_like(target, torch.nan) if old is None else old)
        adds, inputs, output = [old is not None for old in before], self.inputs, self.output
        written = [t for t, adding in zip(targets, adds, strict=True) if t is not None and not adding]
        self.graphs.append(written)
        output.fill_(torch.nan)

        def replay():
            for tensors in self.graphs:
                for tensor in tensors:
                    tensor.fill_(torch.nan)
            held = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            output.copy_(self.run(inputs))
            for p, target, adding, grad in zip(self.parameters, targets, adds, held, strict=True):
                if target is not None:
                    target.add_(p.grad) if adding else target.copy_(p.grad)
                p.grad = grad

        graph.replay = replay


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(batch["x"]).square().sum()
    loss.backward()
    return loss.detach()


STEPS = {
    "alone": [[4], [4], [8], [4]],
    "several": [[4, 4], [8, 4], [4, 8, 8]],
    "by turns": [[4], [4, 4], [4], [8, 4], [8], [8], [4, 8], [4, 4], [8], [4]],
    "several first": [[8, 4], [8], [8, 4], [4], [4, 8]],
}


@pytest.mark.parametrize("largest_first", [False, True])
@pytest.mark.parametrize("sizes", STEPS.values(), ids=list(STEPS))
def test_gradients_of_each_step_are_its_own_alone_and_added_up(sizes, largest_first, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model.unused = nn.Parameter(torch.ones(2))  # that no loss reaches: an optimizer has to leave it alone
    plain = copy.deepcopy(model)
    emulated = Emulated(monkeypatch, lambda batch: loss_of(model, batch), model.parameters())
    graphs = MicroStepGraphs(emulated.function, model.parameters())
    if largest_first:
        graphs.capture({"x": torch.randn(8, 6)}, alone=len(sizes[0]) == 1)
    for rows in sizes:
        for count in rows:
            batch = {"x": torch.randn(count, 6)}
            assert graphs(batch, alone=len(rows) == 1).item() == pytest.approx(loss_of(plain, batch).item(), rel=1e-5)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)
                ours.grad.mul_(0.5)  # as clipping does, in place
        graphs.zero()
        plain.zero_grad()
        with torch.no_grad():
            model(torch.randn(3, 6))  # an evaluation
    sums = [gradient for gradient in graphs.sums if gradient is not None]
    assert bool(sums) == any(len(rows) > 1 for rows in sizes), "lone micro-steps have storage, or several have none"
    shapes = {(count, len(rows) == 1) for rows in sizes for count in rows}
    assert len(graphs.captured) == len(shapes | ({(8, len(sizes[0]) == 1)} if largest_first else set()))
    graphs.close()
    assert all(p.grad is None for p in model.parameters()), "what was written is gone with the pool"


def test_sums_are_those_that_are_there_already(monkeypatch):
    """The views of gradient buckets."""
    model = nn.Linear(6, 3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    views = [p.grad for p in model.parameters()]
    emulated = Emulated(monkeypatch, lambda batch: loss_of(model, batch), model.parameters())
    graphs = MicroStepGraphs(emulated.function, model.parameters())
    graphs({"x": torch.randn(4, 6)}, summed=True)
    assert all(p.grad is view and view.any() for p, view in zip(model.parameters(), views, strict=True))
