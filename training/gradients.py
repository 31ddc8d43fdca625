"""Gradients summed over all ranks, bucket by bucket, while the backward pass goes on.

torch's DistributedDataParallel does this too, but not where micro-steps are CUDA graphs that each rank captures when a
shape of batch is new to it: DDP wants eleven iterations of all ranks before each capture.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as DDP's: large enough for the links' full speed, small enough that the last is soon sent
ALIGNMENT = 4  # numbers: vectorised kernels want 16 bytes


@dataclass
class _Bucket:
    parameters: list[nn.Parameter] = field(default_factory=list)
    size: int = 0
    """Numbers, with the gaps that align each gradient."""

    def add(self, parameter: nn.Parameter) -> None:
        self.parameters.append(parameter)
        self.size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT

    def hold_gradients(self) -> None:
        """Give the gradients their storage, with zeros in it."""
        self.gradients = self.parameters[0].new_zeros(self.size)
        first = 0
        for parameter in self.parameters:
            parameter.grad = self.gradients[first : first + parameter.numel()].view_as(parameter)
            first += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


class GradientBuckets:
    """The storage of a model's gradients, and their sums over all ranks.

    Gradients are views of the buckets from here on: they may only be set to zero in place. Buckets are sent in one
    order on all ranks, about that in which the backward pass completes them. Trained weights begin as rank 0's.

    Args:
        model: whose parameters all get a gradient in each backward pass, on every rank.
        communication: the dtype that gradients are added up in. With bf16, half the bytes of fp32, each rank's part is
            rounded once, and each sum of them.
        bucket_bytes: after which a bucket is full; `BUCKET_BYTES` by default.
    """

    def __init__(self, model: nn.Module, communication: torch.dtype = torch.float32, bucket_bytes: int | None = None):
        self.communication = communication
        bucket_bytes = bucket_bytes or BUCKET_BYTES
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.buckets = [_Bucket()]
        for parameter in reversed(parameters):  # the backward pass begins with the last layers
            if self.buckets[-1].size * parameter.element_size() >= bucket_bytes:
                self.buckets.append(_Bucket())
            self.buckets[-1].add(parameter)
        for bucket in self.buckets:
            bucket.hold_gradients()
        self.place = {id(parameter): i for i, bucket in enumerate(self.buckets) for parameter in bucket.parameters}
        self.missing: list[int] | None = None
        """Gradients that each bucket still waits for; None where nothing is summed."""
        self.sent: list[tuple[Tensor, Tensor, dist.Work]] = []
        self.handles = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)
        # Once by themselves: connections are made at the first use, which a capture on one rank cannot wait for.
        for bucket in self.buckets:
            self._send(bucket)
        self._receive()

    @property
    def bytes(self) -> int:
        """What each rank hands over in a step."""
        return sum(bucket.size for bucket in self.buckets) * self.communication.itemsize

    def begin(self, summed: bool) -> None:
        """Before a backward pass: whether it completes the gradients of a step, and they are to be summed."""
        self.missing = [len(bucket.parameters) for bucket in self.buckets] if summed else None
        self.sent = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A parameter's gradient is complete: send the buckets whose turn it is."""
        if self.missing is None:
            return
        self.missing[self.place[id(parameter)]] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
            self._send(self.buckets[len(self.sent)])

    def _send(self, bucket: _Bucket) -> None:
        rounded = bucket.gradients.to(self.communication)  # the gradients themselves, if that is their dtype
        self.sent.append((bucket.gradients, rounded, dist.all_reduce(rounded, async_op=True)))

    def _receive(self) -> None:
        for gradients, total, work in self.sent:
            work.wait()
            if total is not gradients:
                gradients.copy_(total)
        self.sent = []

    def finish(self) -> None:
        """After the backward pass: the device goes on with the sums, once they are there.

        Raises:
            RuntimeError: a parameter got no gradient, or several.
        """
        if self.missing is None:
            return
        if any(self.missing):
            odd = [bucket for bucket, missing in zip(self.buckets, self.missing, strict=True) if missing]
            names = ", ".join(self.names[id(parameter)] for bucket in odd for parameter in bucket.parameters)
            raise RuntimeError(f"a parameter got no gradient, or several, among {names}")
        self._receive()
        self.missing = None

    def zero(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_([bucket.gradients for bucket in self.buckets])

    def remove(self) -> None:
        """Sum nothing from now on, and hold no gradients."""
        for handle in self.handles:
            handle.remove()
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.grad = None
