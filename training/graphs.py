"""Micro-steps as CUDA graphs: the host launches one graph instead of some thousand kernels."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    """What the graph reads; a batch is copied here before each replay."""
    output: Tensor
    gradients: Gradients | None
    """What it writes, in the pool; None where it adds to `MicroStepGraphs.sums`."""


def _key(batch: Batch, summed: bool, alone: bool) -> tuple:
    return (*(tensor.shape for tensor in batch.values()), summed, alone)


def without_ownership(tensor: Tensor) -> Tensor:
    """A tensor in the memory of this one, which does not keep that from being given to others."""
    interface = SimpleNamespace(__cuda_array_interface__=tensor.__cuda_array_interface__)
    return torch.as_tensor(interface, device=tensor.device)


@functools.cache
def _rehearsal_stream(device: int) -> torch.cuda.Stream:
    """One for all: torch keeps a cuBLAS workspace for each handle and stream; a new one took 68 MB on an H200."""
    return torch.cuda.Stream(device)


class MicroStepGraphs:
    """A function of a batch that adds to gradients, captured once for each shape of batch and replayed from then on;
    once more where it sums them over ranks, or is alone.

    Micro-steps of one optimizer step add to gradients in fixed storage, `sums`, which `zero` sets to zero. One that is
    its step's only one writes them instead, which saves a pass over them that sets them to zero and one that adds: its
    gradients lie in the graphs' pool, and are good until the next call.
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
        self.sums: Gradients = [parameter.grad for parameter in self.parameters]  # views of buckets, where those are
        self.adds = False
        """Whether the last micro-step added to the sums."""
        self.reached = [False] * len(self.parameters)
        """Which parameters get a gradient; optimizers leave the others alone."""

    def __call__(self, batch: Batch, summed: bool = False, alone: bool = False) -> Tensor:
        """The function's result, in storage that the next call overwrites.

        Args:
            alone: in its optimizer step.
        """
        key = _key(batch, summed, alone)
        if key not in self.captured:
            self.capture(batch, summed, alone)
        captured = self.captured[key]
        for name, tensor in batch.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        self.adds = captured.gradients is None
        self._give(self.sums if self.adds else captured.gradients)
        return captured.output

    def capture(self, batch: Batch, summed: bool = False, alone: bool = False) -> None:
        """Get ready for batches of this one's shape; sums and random numbers stay as they are."""
        random_state = torch.cuda.get_rng_state()
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        self.rehearse(inputs)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        self._give([None] * len(self.parameters) if alone else self._storage())
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the loader's, may allocate and ask for events meanwhile.
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.function(inputs, summed)
        except Exception:
            graph.reset()  # as in `close`
            raise
        torch.cuda.set_rng_state(random_state)
        written = [p.grad if p.grad is None else without_ownership(p.grad) for p in self.parameters] if alone else None
        self.captured[_key(batch, summed, alone)] = _Captured(graph, inputs, output, written)

    def _give(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient

    def _storage(self) -> Gradients:
        """The sums, with zeros where there were none."""
        for i, (parameter, reached) in enumerate(zip(self.parameters, self.reached, strict=True)):
            if reached and self.sums[i] is None:
                self.sums[i] = torch.zeros_like(parameter)
        return self.sums

    def zero(self) -> None:
        """After an optimizer step: the next one's sums begin at zero."""
        if self.adds:
            torch._foreach_zero_([gradient for gradient in self.sums if gradient is not None])

    def close(self) -> None:
        """Free all graphs: a process group waits for those that hold its kernels when it ends, and an error that is on
        its way keeps this object alive until after that."""
        self.captured.clear()
        self.sums = [None] * len(self.parameters)
        self._give(self.sums)  # what a lone micro-step wrote is gone with the pool

    def rehearse(self, inputs: Batch) -> None:
        """Run once as usual, so that everything is compiled and loaded that may not be while capturing.

        Args:
            inputs: tensors of their own, no views: compiled code may tell these apart.
        """
        self._give([None] * len(self.parameters))
        stream = _rehearsal_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(inputs, False)
        torch.cuda.current_stream().wait_stream(stream)
        self.reached = [parameter.grad is not None for parameter in self.parameters]
