"""The parts of one optimizer step that every door shares: precision, compilation, gradients over ranks, the step."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn

from kernels.backends import select_backends
from kernels.build import KernelsUnavailable
from kernels.joint import join
from modeling import compiled_parts, encoder_blocks, use_kernels
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
from training.distributed import World
from training.execution import Execution, captures
from training.gradients import GradientBuckets
from training.graphs import Batch, MicroStepGraphs

# What one compilation may be made anew for: kinds of layers, adapters that join, batches of other shapes.
RECOMPILATIONS = 64
STEPS_AHEAD = {"cuda": 1, "cpu": 0}  # that a device is given before one's losses are read
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settle_compiler() -> None:
    """What torch.compile does with the blocks of a model."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(RECOMPILATIONS, dynamo.recompile_limit)
    # Probabilities and epsilons are constants. Else dynamic sizes make inputs of them, which tracing twice undoes.
    dynamo.specialize_float = True
    # Ours are traced into the graph, which the key of the cache is made of: another run of the same model need not
    # compile them again.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


class Engine:
    """A model on its device, with the optimizer, loss scaling, operand refresh and gradient averaging around it.

    Args:
        model: already pruned; moved to the world's device. One that is frozen has no optimizer: it is for evaluation.
        args: flags `optimizer, learning_rate, weight_decay, lora_weight_decay, lora_lr_scale, max_grad_norm,
            precision, double_prune_interval, sparse_backend, cuda_graphs`, and `gradient_communication` where there is
            one.
        tokens: of a micro-batch on this rank: what the sparse products are tuned for, and chosen by.
        report: takes a line about what runs the sparse products, and LAMB where its kernels cannot.
        objective: (model, batch on the device) -> (this rank's share of the loss, a small tensor to be logged). The
            shares of all micro-steps and ranks add up to the loss. It may not wait for the device.
        compiled: parts of the model that torch.compile gets.
        dynamic: whether their inputs' sizes differ from batch to batch.
        other_tokens: that some micro-batches, or some layers, have instead: tuned for too.
        obstacle: the flag, if there is one, by which a micro-step asks the host what to do: it cannot be a graph then.

    Raises:
        UsageError: what flags ask for cannot run.
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
        obstacle: str = "",
    ):
        self.model, self.world, self.args = model.to(world.device), world, args
        self.objective, self.graphs, self.buckets = objective, None, None
        self.captured = captures(args.cuda_graphs, world, obstacle)
        self.sums_gradients = world.size > 1
        self.dtype = DTYPES[args.precision]
        for part in compiled:
            part.compile(dynamic=dynamic)
        if compiled:
            settle_compiler()
        select_backends(model, args.sparse_backend, self.dtype, tokens, report, other_tokens)
        groups = parameter_groups(model, args.weight_decay, args.lora_weight_decay, args.lora_lr_scale)
        scaled = args.precision == "fp16"
        self.optimizer = None
        if groups:
            self.optimizer = build_optimizer(args.optimizer, groups, args.learning_rate, args.max_grad_norm, scaled)
        if isinstance(self.optimizer, Lamb) and world.device.type == "cuda":
            try:
                lamb_kernels(world.device)
            except KernelsUnavailable as reason:
                report(f"LAMB in torch's foreach operations ({reason})")
        # What torch begins with is meant for losses that are averaged over ranks; ours are shares of one loss.
        init_scale = 2.0**16 * world.size
        self.scaler = torch.amp.GradScaler(world.device.type, init_scale, enabled=scaled)
        self.refresh = OperandRefresh(model, args.double_prune_interval)
        if self.optimizer is not None:
            self.refresh.attach(self.optimizer)

    def connect(self) -> None:
        """Get ready for the first micro-step: once the ranks are joined, and anew when parameters are added."""
        self.disconnect()
        if self.world.size > 1:
            communication = DTYPES[getattr(self.args, "gradient_communication", "fp32")]  # fine-tuning has none
            self.buckets = GradientBuckets(self.model, communication)
        if self.captured:
            self.graphs = MicroStepGraphs(self._forward_and_backward, self.model.parameters())

    def disconnect(self) -> None:
        """Drop what `connect` built."""
        if self.graphs is not None:
            self.graphs.close()
        if self.buckets is not None:
            self.buckets.remove()
        self.buckets, self.graphs = None, None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, largest: Callable[[], Batch], count: int) -> None:
        """Before a micro-step, one of `count`: capture the largest batch there can be, if nothing was captured yet.

        So the graphs of all others fit into its memory, and what is compiled does not depend on which came first.
        """
        if self.graphs is not None and not self.graphs.captured:
            self.graphs.capture(largest(), self.sums_gradients, self._alone(count))

    def _alone(self, count: int) -> bool:
        """Whether a step's gradients are those of one micro-step; over several ranks they are added up in buckets."""
        return count == 1 and self.buckets is None

    def micro_step(self, batch: Batch, place: int, count: int) -> Tensor:
        """Forward and backward pass of one micro-batch on the device; gradients add up until `step`.

        Args:
            place: among the `count` micro-steps of its step, from 0; the last one sums the gradients over ranks.

        Returns what the objective wants to be logged, in storage that the next call may overwrite.
        """
        summed = self.sums_gradients and place == count - 1
        if self.graphs is None:
            return self._forward_and_backward(batch, summed)
        return self.graphs(batch, summed, self._alone(count))

    def _forward_and_backward(self, batch: Batch, summed: bool = False) -> Tensor:
        if self.buckets is not None:
            self.buckets.begin(summed)
        with self.autocast():
            loss, logged = self.objective(self.model, batch)
        self.scaler.scale(loss).backward()
        if self.buckets is not None:
            self.buckets.finish()
        return logged.detach()

    def step(self, learning_rate: float) -> None:
        """One optimizer step with the accumulated gradients; the operands follow through the optimizer's hook."""
        set_learning_rate(self.optimizer, learning_rate)
        self.scaler.unscale_(self.optimizer)
        if not clips_gradients(self.optimizer):
            clip_gradients(self.optimizer, self.args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.buckets is not None:
            self.buckets.zero()
        elif self.graphs is None:
            self.optimizer.zero_grad()  # apex's takes no argument
        else:
            self.graphs.zero()

    def join_adapters(self, rank: int, seed: int) -> None:
        """Adapters join: new parameters, a new optimizer group at step 0; nothing else changes, no output either."""
        add_adapters(self.model, rank, seed)
        add_adapter_group(self.optimizer, self.model, self.args.lora_weight_decay, self.args.lora_lr_scale)
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


def engine_for(
    model: nn.Module,
    execution: Execution,
    world: World,
    args,
    objective: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    last_block_tokens: Sequence[int] = (),
) -> Engine:
    """The engine of a BERT whose micro-steps go as `execution` says; what became of that is added to its notes.

    Args:
        last_block_tokens: what the last block computes behind its attention, if not all: its products are tuned for
            that, too. The other arguments are `Engine`'s.
    """
    if execution.dense_kernels:
        use_kernels(model)
    unpadded = execution.pack_multiple is not None
    engine = Engine(
        *(model, world, args, execution.tokens, execution.notes.append, objective),
        other_tokens=[*execution.other_tokens, *last_block_tokens],
        compiled=compiled_parts(model) if execution.compiled else (),
        dynamic=unpadded,
        obstacle=execution.obstacle_to_graphs,
    )
    if execution.short_attention:
        tokens = [execution.tokens, *execution.other_tokens]
        joined = sum(join(block.attention.self.projections(), tokens) for _, block in encoder_blocks(model))
        together = f", query, key and value in one 2:4 product in {joined} blocks" if joined else ""
        execution.notes.append(f"attention of short sequences by kernels of ours{together}")
    padding = f"no padding computed but up to a multiple of {execution.pack_multiple} tokens"
    execution.notes.append(
        f"{'compiled' if execution.compiled else 'not compiled'}, {'with' if engine.captured else 'without'} CUDA "
        f"graphs, {padding if unpadded else 'padding computed'}"
    )
    return engine


@dataclass(frozen=True)
class OnItsWay:
    """A small tensor that is copied to the host, while the device and the host go on."""

    tensor: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> "OnItsWay":
        if tensor.device.type != "cuda":
            return cls(tensor, None)
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(copy, copied)

    def read(self) -> list | float:
        """Its numbers, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor.tolist()


def seed_dropout(*position: int) -> None:
    """Seed torch from (seed, global step, micro-step, rank), so that dropout needs no saved generator."""
    digest = hashlib.sha256(repr(position).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
