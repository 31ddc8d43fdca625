"""How micro-steps run: what the flags of speed ask for, and what the device can.

Each function raises a UsageError, which names the flag, where it is asked for what cannot run.
"""

import torch

from kernels.build import KernelsUnavailable
from modeling import BertConfig, BertForPreTraining, use_kernels
from training.distributed import World
from training.errors import UsageError
from training.sparsity import SparsityConfig


def captures(flag: str, world: World, obstacle: str) -> bool:
    """Whether micro-steps run as CUDA graphs, as `--cuda_graphs` says.

    Args:
        obstacle: another flag that forbids it, or nothing.
    """
    if world.device.type != "cuda":
        obstacle = "a CPU"
    if flag == "True" and obstacle:
        raise UsageError(f"--cuda_graphs True: cannot run with {obstacle}; leave it out")
    return not obstacle and (flag == "True" or flag == "auto" and world.size == 1)


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


def run_dense_kernels(model: BertForPreTraining, compiled: bool, world: World) -> None:
    """As `--dense_kernels` asks."""
    if not compiled:
        raise UsageError("--dense_kernels True: cannot run without a GPU's compiled blocks; leave it out")
    try:
        from kernels.lamb import check_device  # imports Triton, which CPU builds of torch lack

        check_device(world.device)
        use_kernels(model)
    except KernelsUnavailable as reason:
        raise UsageError(f"--dense_kernels True: {reason}") from reason


def attends_shortly(args, config: BertConfig, unpadded: bool, longest: int, world: World) -> bool:
    """Whether kernels/short_attention.py runs the attention, as `--attention` says."""
    if args.attention == "flash":
        return False
    if world.device.type != "cuda":
        raise UsageError("--attention short: cannot run with a CPU; leave it out")
    try:
        from kernels.lamb import check_device
        from kernels.short_attention import HEAD_SIZES, LONGEST

        check_device(world.device)
    except KernelsUnavailable as reason:
        raise UsageError(f"--attention short: {reason}") from reason
    head = config.hidden_size // config.num_attention_heads
    reasons = {
        "padding computed (--unpad)": not unpadded,
        f"sequences of {longest} tokens": longest > LONGEST,
        f"attention heads of size {head}": head not in HEAD_SIZES,
    }
    found = [reason for reason, given in reasons.items() if given]
    if found:
        raise UsageError(f"--attention short: cannot run with {found[0]}; leave it out")
    return True
