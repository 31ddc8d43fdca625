"""How micro-steps run: what the flags of speed ask for, and what the device can.

Each function raises a UsageError, which names the flag, where it is asked for what cannot run.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from configuration import BertConfig
from data.packing import MOST_SHAPES, fill_multiple
from kernels.build import KernelsUnavailable
from training.distributed import World
from training.errors import UsageError
from training.sparsity import SparsityConfig


def asked_for(flag: str, value: str, obstacle: str) -> bool:
    """Whether to run what a flag of speed asks for; with `auto`, if nothing stands in the way.

    Args:
        obstacle: what does, in words that a user reads behind the flag; or nothing.
    """
    if value not in ("auto", "False", "flash") and obstacle:
        raise UsageError(f"--{flag} {value}: {obstacle}; leave it out")
    return value not in ("False", "flash") and not obstacle


def captures(flag: str, world: World, obstacle: str) -> bool:
    """Whether micro-steps run as CUDA graphs, as `--cuda_graphs` says.

    Args:
        obstacle: another flag that forbids it, or nothing.
    """
    if world.device.type != "cuda":
        obstacle = "a CPU"
    return asked_for("cuda_graphs", flag, obstacle and f"cannot run with {obstacle}")


def obstacle_to_graphs(args, sparsity: SparsityConfig) -> str:
    """The flag by which micro-steps ask the host what to do, as layers of the ablations and checkpointed ones."""
    if getattr(args, "checkpoint_activations", False):  # fine-tuning has none
        return "--checkpoint_activations"
    return "" if sparsity.weights_alone else f"--pruned_matrix {sparsity.pruned_matrix}"


def unpads(args, config: BertConfig, sparsity: SparsityConfig, world: World) -> bool:
    """Whether sequences lie end to end, with no padding computed, as `--unpad` says."""
    if args.unpad == "False" or (args.unpad == "auto" and world.device.type != "cuda"):
        return False
    if args.unpad == "auto" and not sparsity.weights_alone:
        return False
    if world.device.type != "cuda":
        return True
    head = config.hidden_size // config.num_attention_heads
    reasons = {
        "--precision fp32": args.precision == "fp32",
        "a GPU of compute capability below 8.0": torch.cuda.get_device_capability(world.device) < (8, 0),
        f"attention heads of size {head}": head % 8 or head > 256,
    }
    found = [reason for reason, given in reasons.items() if given]
    if found and args.unpad == "True":
        raise UsageError(f"--unpad True: flash attention cannot run with {found[0]}; leave it out")
    return not found


def _unavailable(module: str, world: World) -> str:
    """Why Triton's kernels in kernels/ cannot run on this rank's GPU, or nothing."""
    try:
        from kernels.lamb import check_device  # imports Triton, which CPU builds of torch lack

        check_device(world.device)
        importlib.import_module(f"kernels.{module}")
    except KernelsUnavailable as reason:
        return str(reason)
    return ""


def obstacle_to_dense_kernels(compiled: bool, world: World) -> str:
    """Why kernels/dense_kernels.py cannot run, or nothing."""
    return _unavailable("dense_kernels", world) if compiled else "cannot run without a GPU's compiled blocks"


def obstacle_to_short_attention(config: BertConfig, unpadded: bool, longest: int, world: World) -> str:
    """Why kernels/short_attention.py cannot run the attention, or nothing.

    Args:
        longest: tokens of any sequence.
    """
    if world.device.type != "cuda":
        return "cannot run with a CPU"
    missing = _unavailable("short_attention", world)
    if missing:
        return missing
    from kernels.blockwise_attention import LONGEST
    from kernels.short_attention import HEAD_SIZES, runs_on_hopper

    head = config.hidden_size // config.num_attention_heads
    missing = _unavailable("hopper_attention", world) if runs_on_hopper(world.device, head) else ""
    if missing:
        return missing
    reasons = {
        "padding computed (--unpad)": not unpadded,
        f"sequences of {longest} tokens": longest > LONGEST,
        f"attention heads of size {head}": head not in HEAD_SIZES,
    }
    return next((f"cannot run with {reason}" for reason, given in reasons.items() if given), "")


def doubt_about_short_attention(longest: int, world: World) -> str:
    """Why `auto` leaves to torch what kernels/short_attention.py can run, or nothing: where it was never timed."""
    from kernels.short_attention import LONGEST

    if longest <= LONGEST or torch.cuda.get_device_capability(world.device)[0] == 9:
        return ""
    return f"timed with sequences of more than {LONGEST} tokens on Hopper GPUs alone"


# -------------------------------------------------------------------------------------------------------- all together
@dataclass(frozen=True)
class Execution:
    """How a run's micro-steps go."""

    tokens: int
    """Of a usual micro-batch here: what sparse products are tuned for, and `--sparse_backend auto` decides by."""
    other_tokens: Sequence[int]
    """Of others, where no padding is computed: what sparse products are tuned for too."""
    pack_multiple: int | None
    """What the tokens that lie end to end are filled up to a multiple of; None: they are padded."""
    short_attention: bool
    compiled: bool
    dense_kernels: bool
    obstacle_to_graphs: str
    notes: list[str] = field(default_factory=list)
    """What the log begins with."""


def settle_execution(
    args,
    config: BertConfig,
    sparsity: SparsityConfig,
    world: World,
    *,
    sequences: int,
    length: int,
    longest: int | None = None,
    compiled: bool,
    shapes: int = MOST_SHAPES,
    usual_share: float = 1.0,
    shares: Sequence[float] = (),
) -> Execution:
    """What the flags `unpad, attention, dense_kernels, cuda_graphs` ask for, as far as the device can.

    Args:
        sequences, length: of a micro-batch on this rank, at most.
        longest: tokens of any sequence, where evaluations have longer ones.
        compiled: whether blocks are, on a GPU.
        shapes: see `fill_multiple`.
        usual_share, shares: of a micro-batch's places, those that hold a token in a usual one and in others.
    """
    on_gpu, places, notes = world.device.type == "cuda", sequences * length, []
    unpadded, compiled = unpads(args, config, sparsity, world), compiled and on_gpu
    longest = longest or length
    obstacle = obstacle_to_short_attention(config, unpadded, longest, world)
    if args.attention == "auto" and not obstacle:
        obstacle = doubt_about_short_attention(longest, world)
    short = asked_for("attention", args.attention, obstacle)
    if unpadded and on_gpu and not short:
        notes.append(f"torch's flash attention, not kernels of ours ({obstacle or '--attention flash'})")
    obstacle = obstacle_to_dense_kernels(compiled, world)
    dense_kernels = asked_for("dense_kernels", args.dense_kernels, obstacle)
    if compiled and not dense_kernels:
        notes.append(f"embeddings, GELU and LayerNorm without kernels of ours ({obstacle or '--dense_kernels False'})")
    return Execution(
        tokens=round(usual_share * places) if unpadded else places,
        other_tokens=[round(share * places) for share in shares] if unpadded else [],
        pack_multiple=fill_multiple(sequences, length, shapes) if unpadded else None,
        short_attention=short,
        compiled=compiled,
        dense_kernels=dense_kernels,
        obstacle_to_graphs=obstacle_to_graphs(args, sparsity),
        notes=notes,
    )
