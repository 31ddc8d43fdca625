"""Micro-steps as CUDA graphs: the host launches one graph instead of some thousand kernels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    """What the graph reads; a batch is copied here before each replay."""
    output: Tensor


def _key(batch: Batch, summed: bool) -> tuple:
    return (*(tensor.shape for tensor in batch.values()), summed)


class MicroStepGraphs:
    """A function of a batch that adds to gradients, captured once for each shape of batch and replayed from then on;
    once more where it sums them over ranks.

    The gradients have fixed storage from the first capture on: they must be set to zero in place, never to None.
    Random numbers are those that the default generator stands at when the micro-step is called. All graphs share one
    pool of memory, since they run one after the other; a smaller one fits into what a larger one has left, so the
    largest should be captured first. A shape that comes later needs its memory once more for a moment, as it is run
    once without a graph.

    Ranks capture at times of their own. So nothing of a capture may wait for another rank: what communicates is
    captured, not run.

    Args:
        function: (batch on the device, whether gradients are then summed over ranks) -> a small tensor; forward and
            backward pass.
        parameters: whose gradients it adds to.
        pool: from `torch.cuda.graph_pool_handle`, where other models' graphs share it; None: a new one.
    """

    def __init__(
        self,
        function: Callable[[Batch, bool], Tensor],
        parameters: Iterable[nn.Parameter],
        pool: tuple[int, int] | None = None,
    ):
        self.function, self.parameters = function, list(parameters)
        self.captured: dict[tuple, _Captured] = {}
        self.pool = pool

    def __call__(self, batch: Batch, summed: bool = False) -> Tensor:
        """The function's result, in storage that the next call overwrites."""
        key = _key(batch, summed)
        if key not in self.captured:
            self.capture(batch, summed)
        captured = self.captured[key]
        for name, tensor in batch.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        return captured.output

    def capture(self, batch: Batch, summed: bool = False) -> None:
        """Get ready for batches of this one's shape; gradients and random numbers stay as they are."""
        random_state = torch.cuda.get_rng_state()
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        self.rehearse(inputs)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the loader's, may allocate and ask for events meanwhile.
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.function(inputs, summed)
        except Exception:
            graph.reset()  # as in `close`
            raise
        torch.cuda.set_rng_state(random_state)
        self.captured[_key(batch, summed)] = _Captured(graph, inputs, output)

    def close(self) -> None:
        """Free all graphs: a process group waits for those that hold its kernels when it ends, and an error that is on
        its way keeps this object alive until after that."""
        self.captured.clear()

    def rehearse(self, inputs: Batch) -> None:
        """Run once as usual, so that everything is compiled and loaded that may not be while capturing.

        Args:
            inputs: tensors of their own, no views: compiled code may tell these apart.
        """
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(inputs, False)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if gradient is None and parameter.grad is not None:  # else nothing reaches it: optimizers leave it alone
                gradient = torch.zeros_like(parameter)
            parameter.grad = gradient
