#!/usr/bin/env python3
"""Memory of BERT's weights and of what training keeps beside them: dense, and SLoPe on the 2:4 kernels.

    python3 benchmarks/memory.py --output memory.json                    # BERT-Base and BERT-Large, with LAMB

Every number is the size of tensors that exist after one optimizer step, not a formula; the last column is what torch's
allocator says of the same tensors. Activations are not in it.

    training     dense: fp32 weights, gradients and LAMB's moments, and the copy of the weights in the products' dtype,
                 which is there from a step's forward pass to its backward pass, as it reads it, too
                 SLoPe: fp32 values, gradients and moments, what is kept of 2:4 operands, and index data: masks and
                 metadata. Its forward products round the values anew, one layer's at a time, which is not counted
    inference    what the forward pass of a frozen model reads. dense: weights in the products' dtype; SLoPe: kept
                 weights, metadata

Whole models hold the same embeddings, norms and heads on both sides, in fp32 while training (with a copy of what dense
products read), in the products' dtype for inference.
"""

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    DTYPES,
    Report,
    benchmark_parser,
    hopper_gpu_with_kernels,
    names_among,
    parse_benchmark_flags,
)
from configuration import BertConfig
from kernels.backends import CutlassOperands
from modeling import BertForPreTraining, encoder_blocks, input_projections
from optimization import build_optimizer, parameter_groups
from sparse_ops import SparseLinear, add_adapters, named_layers, sparsify
from training.flags import run_door, whole
from training.sparsity import SparsityConfig

CONFIGS = Path(__file__).resolve().parent.parent / "config"
MODELS = {"bert-base": "bert_base_uncased_config.json", "bert-large": "bert_large_uncased_config.json"}
SCOPES = ("linear layers of a block", "all pruned layers", "whole model")
KINDS = ("parameters", "gradients", "optimizer", "operands", "index data")
USES = ("training", "inference")


# ------------------------------------------------------------------------------------------------------------- counting
def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors; one that has two names, or lies within another, counts once."""
    sizes, limits = defaultdict(int), {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] += tensor.numel() * tensor.element_size()
        limits[storage.data_ptr()] = storage.nbytes()
    return sum(min(size, limits[place]) for place, size in sizes.items())


@dataclass
class Trained:
    """A model after an optimizer step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    copies: dict[nn.Parameter, Tensor]
    """The weights of dense layers in the products' dtype."""

    def tensors(self, modules: Iterable[nn.Module]) -> dict[str, list[Tensor]]:
        """All that training keeps for `modules`, by kind."""
        modules = list(modules)
        parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        buffers = [buffer for module in modules for buffer in module.buffers()]
        states = [state for p in parameters for state in self.optimizer.state[p].values() if isinstance(state, Tensor)]
        copies = [self.copies[p] for p in parameters if p in self.copies]
        return {
            "parameters": parameters,
            "gradients": [p.grad for p in parameters],
            "optimizer": states,
            "operands": [buffer for buffer in buffers if buffer.is_floating_point()] + copies,
            "index data": [buffer for buffer in buffers if not buffer.is_floating_point()],
        }


def trained(model: nn.Module, dtype: torch.dtype) -> Trained:
    """Take an optimizer step with gradients of 0, and copy the dense layers' weights as autocast does."""
    optimizer = build_optimizer("fused-lamb", parameter_groups(model, 0.01, 1e-4), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = dict.fromkeys(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    return Trained(model, optimizer, {weight: weight.detach().to(dtype) for weight in weights})


def inference_tensors(modules: Iterable[nn.Module], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """What the forward pass of `modules` reads: weights in the products' dtype and operands, and index data."""
    read, other, index = [], [], []
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, SparseLinear):
            operands = module.operands
            found = (operands.forward_kept(module), operands.left_rows, operands.right_kept, module.bias)
            read += [tensor for tensor in found if tensor is not None]
            index.append(operands.metadata)
        else:
            other += module.parameters(recurse=False)
    return {"operands": read + [p.detach().to(dtype) for p in dict.fromkeys(other)], "index data": index}


# --------------------------------------------------------------------------------------------------------------- models
def build_dense(config: BertConfig, device: torch.device) -> nn.Module:
    with torch.device(device):
        return BertForPreTraining(config)


def build_slope(config: BertConfig, device: torch.device, dtype: torch.dtype, rank: int) -> nn.Module:
    model = build_dense(config, device)
    sparsify(model, SparsityConfig("static-weight"), encoder_blocks(model), input_projections(model))
    if rank:
        add_adapters(model, rank, seed=0)
    for _, layer in named_layers(model):
        layer.set_operands(CutlassOperands(layer, dtype))
    return model


def modules_of(model: nn.Module, pruned: Iterable[str]) -> dict[str, list[nn.Module]]:
    """The modules of each of `SCOPES`, given the full names of the layers that SLoPe prunes."""
    layers = {name: model.get_submodule(name) for name in pruned}
    second_block = f"{encoder_blocks(model)[1][0]}."  # the first one's query, key and value stay dense
    of_block = [layer for name, layer in layers.items() if name.startswith(second_block)]
    return dict(zip(SCOPES, (of_block, list(layers.values()), [model]), strict=True))


@dataclass
class Side:
    """Bytes of one side: by use, scope and kind; and what the allocator holds for the whole model, by use."""

    counted: dict[str, dict[str, dict[str, int]]]
    allocated: dict[str, int]


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated()


def measure(build: Callable[[], nn.Module], pruned: Iterable[str] | None, dtype: torch.dtype) -> tuple[Side, list[str]]:
    """Build a model, train it for a step, and count; also the names of its pruned layers, if they are not given."""
    before = allocated()
    state = trained(build(), dtype)
    held = {"training": allocated() - before}
    pruned = [name for name, _ in named_layers(state.model)] if pruned is None else list(pruned)
    scopes = modules_of(state.model, pruned)
    counted = {
        "training": {
            scope: {kind: size_of(tensors) for kind, tensors in state.tensors(modules).items()}
            for scope, modules in scopes.items()
        },
        "inference": {
            scope: {kind: size_of(tensors) for kind, tensors in inference_tensors(modules, dtype).items()}
            for scope, modules in scopes.items()
        },
    }
    before = allocated()
    copies = [tensor.clone() for tensors in inference_tensors([state.model], dtype).values() for tensor in tensors]
    held["inference"] = allocated() - before
    del copies
    return Side(counted, held), pruned


def records(model: str, rank: int, dense: Side, slope: Side) -> list[dict]:
    rows = []
    for use in USES:
        for scope in SCOPES:
            of_dense, of_slope = dense.counted[use][scope], slope.counted[use][scope]
            whole_model = scope == "whole model"
            rows.append(
                {
                    "model": model,
                    "use": use,
                    "scope": scope,
                    "rank": rank,
                    "dense_bytes": of_dense,
                    "slope_bytes": of_slope,
                    "ratio": sum(of_slope.values()) / sum(of_dense.values()),
                    "dense_allocated": dense.allocated[use] if whole_model else None,
                    "slope_allocated": slope.allocated[use] if whole_model else None,
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------- table
def mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f}"


def _slope_kind(kind: str) -> Callable[[dict], str]:
    return lambda record: mebibytes(record["slope_bytes"].get(kind))


COLUMNS = {
    "model": lambda r: r["model"] + (f", rank {r['rank']}" if r["rank"] else ""),
    "": lambda r: f"{r['use']}, {r['scope']}",
    "dense MiB": lambda r: mebibytes(sum(r["dense_bytes"].values())),
    "SLoPe MiB": lambda r: mebibytes(sum(r["slope_bytes"].values())),
    "ratio": lambda r: f"{r['ratio']:.4f}",
    **{f"of it {kind}": _slope_kind(kind) for kind in KINDS},
    "allocated, dense": lambda r: mebibytes(r["dense_allocated"]),
    "SLoPe": lambda r: mebibytes(r["slope_allocated"]),
}


def _ranks(word: str) -> tuple[int, ...]:
    return tuple(whole(0)(part) for part in word.split(","))


def main() -> None:
    parser = benchmark_parser(
        "Memory of weights, gradients, optimizer state and operands, dense and SLoPe.", timed=False
    )
    parser.add_argument(
        "--models", type=names_among(tuple(MODELS)), default=",".join(MODELS), metavar="A,B", help="what is built"
    )
    parser.add_argument("--ranks", type=_ranks, default="0,64", metavar="N,N", help="of the adapters; 0: none")
    args = parse_benchmark_flags(parser)
    device, dtype = hopper_gpu_with_kernels(["operands"]), DTYPES[args.dtype]
    report = Report("memory", args)
    report.table(f"memory, products in {args.dtype}", COLUMNS)
    for name in args.models[:1] if args.quick else args.models:
        config = BertConfig.from_json_file(CONFIGS / MODELS[name])
        dense = None
        for rank in args.ranks:
            slope, pruned = measure(partial(build_slope, config, device, dtype, rank), None, dtype)
            if dense is None:
                dense, _ = measure(partial(build_dense, config, device), pruned, dtype)
            for record in records(name, rank, dense, slope):
                report.row(record)
    report.end()


if __name__ == "__main__":
    run_door(main)
