"""Micro-steps as CUDA graphs: the host launches one graph instead of some thousand kernels."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all graphs, since memory of a pool is used again on one stream only."""
    return torch.cuda.Stream()


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    """What the graph reads; a batch is copied here before each replay."""
    output: Tensor


class MicroStepGraphs:
    """A function of a batch that adds to gradients, captured once for each shape of batch and replayed from then on.

    The gradients have fixed storage from the first capture on: they must be set to zero in place, never to None.
    Random numbers are those that the default generator stands at when the micro-step is called. All graphs share one
    pool of memory and one stream to be captured in, since they run one after the other: together they need what the
    largest needs.

    Args:
        function: of a batch on the device; forward and backward pass; returns a small tensor.
        parameters: whose gradients it adds to.
        pool: memory that other models' graphs use too, none of them at the same time; None: a new one.
    """

    def __init__(
        self,
        function: Callable[[Batch], Tensor],
        parameters: Iterable[nn.Parameter],
        pool: "torch.cuda.MemPool | None" = None,
    ):
        self.function, self.parameters = function, list(parameters)
        self.captured: dict[tuple, _Captured] = {}
        self.pool = pool

    def __call__(self, batch: Batch) -> Tensor:
        """The function's result, in storage that the next call overwrites."""
        shapes = tuple(tensor.shape for tensor in batch.values())
        if shapes not in self.captured:
            self.captured[shapes] = self._capture(batch)
        captured = self.captured[shapes]
        for name, tensor in batch.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        return captured.output

    def _capture(self, batch: Batch) -> _Captured:
        random_state = torch.cuda.get_rng_state()
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        self._rehearse(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool.id, stream=_capture_stream()):
            output = self.function(inputs)
        torch.cuda.set_rng_state(random_state)
        return _Captured(graph, inputs, output)

    def _rehearse(self, inputs: Batch) -> None:
        """Run once as usual, so that everything is compiled and loaded that may not be while capturing.

        In the pool and the stream of the graphs: activations take the place of other graphs', not room of their own.
        """
        if self.pool is None:
            self.pool = torch.cuda.MemPool()
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.use_mem_pool(self.pool), torch.cuda.stream(stream):
            self.function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if gradient is None and parameter.grad is not None:  # else nothing reaches it: optimizers leave it alone
                gradient = torch.zeros_like(parameter)
            parameter.grad = gradient
