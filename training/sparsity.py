"""The sparsity description: what is pruned and how, built from the flags and stored with the weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from training.errors import UsageError

KINDS = ("none", "static-weight", "dynamic-weight", "static-input", "dynamic-input", "dynamic-output-grad")
SPELLINGS = {kind: kind for kind in KINDS} | {
    "weight-static": "static-weight",
    "weight-dynamic": "dynamic-weight",
    "input-static": "static-input",
    "input-dynamic": "dynamic-input",
    "output-grad-dynamic": "dynamic-output-grad",
}


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

    def __post_init__(self):
        if self.pruned_matrix not in SPELLINGS:
            raise UsageError(f"--pruned_matrix {self.pruned_matrix}: must be one of {', '.join(KINDS)}")
        object.__setattr__(self, "pruned_matrix", SPELLINGS[self.pruned_matrix])
        object.__setattr__(self, "sparsity_increment", tuple(self.sparsity_increment))
        if self.unstructured_masking and self.pruned_matrix not in ("static-weight", "none"):
            raise UsageError(
                f"--unstructured_masking True goes with --pruned_matrix static-weight only, not {self.pruned_matrix}"
            )
        if not 0 <= self.unstructured_mask_sparsity < 100:
            raise UsageError(
                f"--unstructured_mask_sparsity {self.unstructured_mask_sparsity:g}: must be from 0 to below 100 (%)"
            )

    @property
    def sparse(self) -> bool:
        return self.pruned_matrix != "none"

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
