"""The sparsity description: what is pruned and how, built from the flags and stored with the weights."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields

from training.errors import UsageError
from training.flags import boolean, real, whole

KINDS = ("none", "static-weight", "dynamic-weight", "static-input", "dynamic-input", "dynamic-output-grad")
SPELLINGS = {kind: kind for kind in KINDS} | {
    "weight-static": "static-weight",
    "weight-dynamic": "dynamic-weight",
    "input-static": "static-input",
    "input-dynamic": "dynamic-input",
    "output-grad-dynamic": "dynamic-output-grad",
}

SPARSE_BACKENDS = ("auto", "cutlass", "cusparselt", "dense")


@dataclass(frozen=True)
class SparsityConfig:
    """What is pruned, and how: stored in every checkpoint and read back by resume, fine-tuning and export."""

    pruned_matrix: str = "none"
    """One of `KINDS`; `static-weight` is SLoPe, the rest are the paper's ablations."""
    reduction_dim: bool = True
    """Prune the weight along its input dimension, which 2:4 hardware reads (False: along the output dimension)."""
    skip_first_block: bool = False
    skip_last_block: bool = False
    skip_attention: bool = False
    unstructured_masking: bool = False
    """Keep the largest weights of each matrix wherever they are, instead of N of every M."""
    unstructured_mask_sparsity: float = 60.0
    """Percentage of each matrix that unstructured masking prunes."""
    sparsity_increment: tuple[int, ...] = ()
    """Blocks at which M doubles; see `pattern_of_blocks`."""
    lora_rank: int = 0
    """Rank of the adapters that the model has; 0 without adapters."""
    double_prune: bool = True
    """Prune W^R a second time for the input gradient, as 2:4 hardware wants; False: dX = dY W^R, to compare with."""

    def __post_init__(self):
        if self.pruned_matrix not in SPELLINGS:
            raise UsageError(f"--pruned_matrix {self.pruned_matrix}: must be one of {', '.join(KINDS)}")
        object.__setattr__(self, "pruned_matrix", SPELLINGS[self.pruned_matrix])
        increment = tuple(self.sparsity_increment)
        object.__setattr__(self, "sparsity_increment", () if increment == (-1,) else increment)  # both: all 2:4
        if self.unstructured_masking and self.pruned_matrix not in ("static-weight", "none"):
            raise UsageError(
                f"--unstructured_masking True goes with --pruned_matrix static-weight only, not {self.pruned_matrix}"
            )
        if not self.double_prune and self.pruned_matrix not in ("static-weight", "none"):
            raise UsageError(
                f"--double_prune False goes with --pruned_matrix static-weight only, not {self.pruned_matrix}"
            )
        if not 0 <= self.unstructured_mask_sparsity < 100:
            raise UsageError(
                f"--unstructured_mask_sparsity {self.unstructured_mask_sparsity:g}: must be from 0 to below 100 (%)"
            )

    @property
    def sparse(self) -> bool:
        return self.pruned_matrix != "none"

    @property
    def weights_alone(self) -> bool:
        """Whether nothing but weights is pruned, by masks that stay: a dense model, or SLoPe.

        Ablations choose anew in each call, or among inputs and gradients of tokens, padding among them.
        """
        return self.pruned_matrix in ("none", "static-weight")

    def to_dict(self) -> dict:
        return asdict(self) | {"sparsity_increment": list(self.sparsity_increment)}

    @classmethod
    def from_dict(cls, description: dict) -> "SparsityConfig":
        unknown = set(description) - {field.name for field in fields(cls)}
        if unknown:
            raise UsageError(f"sparsity description has unknown keys {', '.join(sorted(unknown))}")
        return cls(**description)


def parse_sparsity_increment(text: str) -> tuple[int, ...]:
    """`0,12,-1` -> (0, 12, -1). Block numbers ascend; only the last entry may be -1.

    Raises:
        UsageError: for anything else.
    """
    try:
        numbers = tuple(int(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        numbers = (-2,)
    starts = numbers[:-1] if numbers and numbers[-1] == -1 else numbers
    if any(start < 0 for start in starts) or list(starts) != sorted(set(starts)):
        raise UsageError(
            f"--sparsity_increment {text}: must be ascending block numbers with commas, at the end perhaps -1 "
            "(-1: all 2:4; 0,12,-1: 2:8 in the first 12 blocks, then 2:4; 12: 2:4 in the first 12 blocks, then 2:8)"
        )
    return numbers


def pattern_of_blocks(sparsity_increment: Sequence[int], num_blocks: int) -> list[int]:
    """M of each block: 4 before the first number, doubled at each number, and 4 again after a closing -1.

    Raises:
        UsageError: when a number is no block of the model.
    """
    starts = [start for start in sparsity_increment if start != -1]
    if starts and starts[-1] >= num_blocks:
        raise UsageError(
            f"--sparsity_increment {','.join(map(str, sparsity_increment))}: the model has {num_blocks} blocks, "
            f"so its numbers must lie between 0 and {num_blocks - 1}"
        )
    closed = len(starts) < len(sparsity_increment)
    patterns = []
    for block in range(num_blocks):
        doublings = sum(start <= block for start in starts)
        after_close = closed and doublings == len(starts)
        patterns.append(4 if after_close else 4 * 2**doublings)
    return patterns


# --------------------------------------------------------------------------------------------------------------- flags
def add_sparsity_flags(parser, add_lora_words: tuple[str, ...] = ("True", "False")):
    """Add the published scripts' flags that say what is pruned, which the three doors share; returns their group."""
    group = parser.add_argument_group("sparsity")
    group.add_argument(
        "--pruned_matrix",
        default="none",
        metavar="KIND",
        help=f"what to prune: {', '.join(KINDS)}; static-weight is SLoPe, the others are the paper's ablations",
    )
    flags = (
        ("--skip_first_block", False, "leave the first block dense"),
        ("--skip_last_block", False, "leave the last block dense"),
        ("--skip_attention", False, "leave the linear layers of the attention dense"),
        ("--reduction_dim", True, "prune the weight along its input dimension, which 2:4 hardware reads"),
        ("--unstructured_masking", False, "keep the largest weights wherever they are, with static-weight"),
        (
            "--double_prune",
            True,
            "prune N:M a second time for the input gradient; False: as an ablation, by dense products",
        ),
    )
    for name, default, text in flags:
        group.add_argument(name, default=default, type=boolean, metavar="True|False", help=text)
    group.add_argument(
        "--unstructured_mask_sparsity",
        default=60.0,
        type=real(),
        metavar="PERCENT",
        help="percentage of each matrix that unstructured masking prunes",
    )
    group.add_argument(
        "--sparsity_increment",
        default="",  # which the help does not show
        metavar="BLOCKS",
        help="block numbers at which M of 2:M doubles, from 4 on; a closing -1 returns the rest to 2:4. -1: all 2:4; "
        "0,12,-1: 2:8 in the first 12 blocks, then 2:4; 12: 2:4 in the first 12 blocks, then 2:8",
    )
    group.add_argument(
        "--mask_init", default="magnitude", choices=("magnitude", "random"), help="which weights the fixed mask keeps"
    )
    group.add_argument(
        "--sparse_backend",
        default="auto",
        choices=SPARSE_BACKENDS,
        help="what runs the sparse products: cutlass is this suite's kernels for Hopper GPUs, cusparselt PyTorch's; "
        "auto is cutlass where a training step of the layer is measured to be faster so, and dense elsewhere",
    )
    group.add_argument(
        "--double_prune_interval",
        default=1,
        type=whole(0),
        metavar="STEPS",
        help="optimizer steps between two choices of the second pruning; 0: chosen once",
    )
    group.add_argument(
        "--add_lora",
        default="False",
        choices=add_lora_words,
        help="low-rank adapters beside the pruned layers; lazy adds them for the last steps only, inside the run",
    )
    group.add_argument("--lora_rank", default=4, type=whole(1), help="rank of the low-rank adapters")
    group.add_argument("--lora_weight_decay", default=1e-4, type=real(0), help="weight decay of the adapters")
    group.add_argument(
        "--lora_lr_scale",
        default=1.0,
        type=real(0),
        help="learning rate of the adapters over that of all else; 0: they stay as they are",
    )
    return group


def sparsity_from_flags(args, saved: SparsityConfig | None = None) -> SparsityConfig:
    """The description that the flags ask for, or, with a checkpoint, the checkpoint's.

    Args:
        args: parsed flags with the set `args.given`.
        saved: the description in the checkpoint that the run starts from, when it is sparse or must not be pruned.

    Raises:
        UsageError: when a flag that was given contradicts the checkpoint; it names both values.
    """
    names = [field.name for field in fields(SparsityConfig) if field.name not in ("sparsity_increment", "lora_rank")]
    increment = parse_sparsity_increment(args.sparsity_increment)
    asked = SparsityConfig(**{name: getattr(args, name) for name in names}, sparsity_increment=increment)
    if saved is None:
        return asked
    for name in _contradictable(asked, saved, args.given):
        if name in args.given and getattr(asked, name) != getattr(saved, name):
            raise UsageError(
                f"--{name} {_spelled(getattr(asked, name))} contradicts the checkpoint, which has "
                f"{_spelled(getattr(saved, name))}"
            )
    return saved


def check_adapter_flags(args, sparsity: SparsityConfig) -> None:
    """Check `--add_lora` and `--lora_rank` against what the run starts from.

    Raises:
        UsageError: adapters without pruned layers, another rank, or adapters that the flags do without.
    """
    if args.add_lora != "False" and not sparsity.sparse:
        raise UsageError(f"--add_lora {args.add_lora}: adapters join pruned layers, but --pruned_matrix is none")
    if not sparsity.lora_rank:
        return
    if "add_lora" in args.given and args.add_lora == "False":
        raise UsageError(
            f"--add_lora False contradicts the checkpoint, which has adapters of rank {sparsity.lora_rank}"
        )
    if "lora_rank" in args.given and args.lora_rank != sparsity.lora_rank:
        raise UsageError(f"--lora_rank {args.lora_rank} contradicts the checkpoint, which has {sparsity.lora_rank}")


def check_backend_flag(args, sparsity: SparsityConfig) -> None:
    """Refuse kernels by name where there is nothing that they could run.

    Raises:
        UsageError: nothing is pruned by static-weight.
    """
    if args.sparse_backend in ("cutlass", "cusparselt") and sparsity.pruned_matrix != "static-weight":
        raise UsageError(
            f"--sparse_backend {args.sparse_backend}: needs --pruned_matrix static-weight, not {sparsity.pruned_matrix}"
        )


def _contradictable(asked: SparsityConfig, saved: SparsityConfig, given: Collection[str]) -> list[str]:
    """The fields that mean something for both; published scripts pass every flag, also those without effect."""
    sparse = asked.sparse if "pruned_matrix" in given else saved.sparse
    unstructured = asked.unstructured_masking if "unstructured_masking" in given else saved.unstructured_masking
    if not (sparse and saved.sparse):
        return ["pruned_matrix"]
    names = ["pruned_matrix", "skip_first_block", "skip_last_block", "skip_attention", "unstructured_masking"]
    if unstructured and saved.unstructured_masking:
        return [*names, "unstructured_mask_sparsity"]
    return [*names, "reduction_dim", "sparsity_increment", "double_prune"]


def _spelled(value) -> str:
    return ",".join(map(str, value)) or "-1" if isinstance(value, tuple) else f"{value}"
