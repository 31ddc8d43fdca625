"""The parts of one optimizer step that every door shares: precision, compilation, gradients over ranks, the step."""

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kernels.backends import select_backends
from kernels.build import KernelsUnavailable
from optimization import (
    Lamb,
    add_adapter_group,
    build_optimizer,
    clip_gradients,
    clips_gradients,
    lamb_kernels,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
)
from sparse_ops import OperandRefresh, add_adapters
from training.distributed import World, average_in_bf16
from training.graphs import Batch, MicroStepGraphs

# Masks never change, and operands follow from the values. torch 2.13 renamed the argument.
_BUFFERS = ("forward_sync_buffers", "broadcast_buffers")
BUFFERS_STAY = {next(n for n in _BUFFERS if n in inspect.signature(DistributedDataParallel).parameters): False}
# What one compilation may be made anew for: kinds of layers, adapters that join, batches of other shapes.
RECOMPILATIONS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """A model on its device, with the optimizer, loss scaling, operand refresh and gradient averaging around it.

    Args:
        model: already pruned; moved to the world's device.
        args: flags `optimizer, learning_rate, weight_decay, lora_weight_decay, max_grad_norm, precision,
            double_prune_interval, sparse_backend`, and `gradient_communication` where there is such a flag.
        tokens: of a micro-batch on this rank, at most: what the sparse products are tuned for.
        report: takes a line about what runs the sparse products, and LAMB where its kernels cannot.
        objective: (model, batch on the device) -> (this rank's share of the loss, a small tensor to be logged). The
            shares of all micro-steps and ranks add up to the loss. It may not wait for the device.
        compiled: parts of the model that torch.compile gets.
        dynamic: whether their inputs' sizes differ from batch to batch.
        other_tokens: of smaller micro-batches, where their sizes differ: tuned for too.
        captured: run micro-steps as CUDA graphs, where one process on one GPU is all. (With several, DDP's averaging
            goes on beside the backward pass, and the host keeps ahead of batches as large as these jobs'.)
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        args,
        tokens: int,
        report: Callable[[str], None],
        objective: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
        compiled: Sequence[nn.Module] = (),
        dynamic: bool = False,
        other_tokens: Sequence[int] = (),
        captured: bool = False,
    ):
        self.model, self.world, self.args = model.to(world.device), world, args
        self.objective, self.graphs = objective, None
        self.captured = captured and world.device.type == "cuda" and world.size == 1
        self.dtype = DTYPES[args.precision]
        for part in compiled:
            part.compile(dynamic=dynamic)
        if compiled:
            torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
            torch._dynamo.config.optimize_ddp = False  # it would cut the parts, which are small, at DDP's buckets
        select_backends(model, args.sparse_backend, self.dtype, tokens, report, other_tokens)
        groups = parameter_groups(model, args.weight_decay, args.lora_weight_decay)
        self.optimizer = build_optimizer(args.optimizer, groups, args.learning_rate, args.max_grad_norm)
        if isinstance(self.optimizer, Lamb) and world.device.type == "cuda":
            try:
                lamb_kernels(world.device)
            except KernelsUnavailable as reason:
                report(f"LAMB in torch's foreach operations ({reason})")
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=args.precision == "fp16")
        self.refresh = OperandRefresh(model, args.double_prune_interval)
        self.refresh.attach(self.optimizer)

    def connect(self) -> None:
        """Build what averages the gradients over ranks: once they are joined, and anew when parameters are added."""
        self.parallel, self.graphs = self.model, None
        if self.captured:
            self.graphs = MicroStepGraphs(self._forward_and_backward, self.model.parameters())
        if self.world.size > 1:
            device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.model,
                device_ids=device_ids,
                **BUFFERS_STAY,
                gradient_as_bucket_view=True,
            )
            if getattr(self.args, "gradient_communication", "fp32") == "bf16":  # fine-tuning has none
                self.parallel.register_comm_hook(self.world.size, average_in_bf16)

    def disconnect(self) -> None:
        """Drop what `connect` built. DDP that outlives the process group may hang when it is freed: it then frees the
        group too, holding the interpreter's lock while it waits for a thread of the group that wants that lock."""
        self.parallel, self.graphs = self.model, None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-step's forward and backward pass: only the last one averages gradients over ranks."""
        return contextlib.nullcontext() if last or self.world.size == 1 else self.parallel.no_sync()

    def prepare(self, largest: Callable[[], Batch]) -> None:
        """Before a micro-step: capture the largest batch there can be, if nothing was captured yet.

        So the graphs of all others fit into its memory, and what is compiled does not depend on which came first.
        """
        if self.graphs is not None and not self.graphs.captured:
            self.graphs.capture(largest())

    def micro_step(self, batch: Batch, last: bool) -> Tensor:
        """Forward and backward pass of one micro-batch on the device; gradients add up until `step`.

        Returns what the objective wants to be logged, in storage that the next call may overwrite.
        """
        if self.graphs is not None:
            return self.graphs(batch)
        with self.accumulate(last):
            return self._forward_and_backward(batch)

    def _forward_and_backward(self, batch: Batch) -> Tensor:
        with self.autocast():
            loss, logged = self.objective(self.parallel, batch)
        # Times the number of ranks, because DDP averages what the ranks' losses give.
        self.scaler.scale(loss * self.world.size).backward()
        return logged.detach()

    def step(self, learning_rate: float) -> None:
        """One optimizer step with the accumulated gradients; the operands follow through the optimizer's hook."""
        set_learning_rate(self.optimizer, learning_rate)
        self.scaler.unscale_(self.optimizer)
        if not clips_gradients(self.optimizer):
            clip_gradients(self.optimizer, self.args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.graphs is None:
            self.optimizer.zero_grad()  # apex's takes no argument
        else:  # graphs add to gradients in fixed storage
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])

    def join_adapters(self, rank: int, seed: int) -> None:
        """Adapters join: new parameters, a new optimizer group at step 0; nothing else changes, no output either."""
        add_adapters(self.model, rank, seed)
        add_adapter_group(self.optimizer, self.model, self.args.lora_weight_decay)
        self.connect()

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "refresh": self.refresh.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Everything but the model, whose weights were there when the engine was built."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.refresh.load_state_dict(state["refresh"])


def seed_dropout(*position: int) -> None:
    """Seed torch from (seed, global step, micro-step, rank), so that dropout needs no saved generator."""
    digest = hashlib.sha256(repr(position).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
