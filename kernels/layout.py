"""The arrays that the sparse kernels read, in plain torch on any device: the reference and the description of formats.

A *2:4 operand* is a matrix [rows, cols] with at most 2 of every 4 neighbours along its columns, stored as

    kept      [rows, cols/2], row-major: 2 entries for each group of 4, in position order; a group with fewer is
              filled with zeros at free positions
    metadata  int32 [cols/64 rounded up, rows/256 rounded up * 4, 128]: where the entries stand

A group's *nibble* is idx0 | idx1 << 2 with idx0 < idx1, the positions (0..3) of its two entries. Sixteen columns make a
16-bit word, lowest group in the lowest bits. The words are in the *fragment order* of the instruction that reads them
(`wgmma.m64nNk32.sp`), so that a thread finds what it needs in one 32-bit register:

    metadata[kb, mb, t] = word(row, 16 columns) | word(row + 8, the same columns) << 16
                          row = mb*64 + t/32*16 + t%32/4,  columns = kb*64 + t%4*16 .. + 15

Rows and columns out of range have nibble 4 (positions 0 and 1).

*Free positions* are those that the layer's first mask does not keep, lowest first, and only where these do not suffice
others, lowest first. The forward operand is W^R [out, in]. The backward operand is W^{R,C} transposed, [in, out]: with
M = 4 its free positions always hold pruned weights, so metadata and first mask together tell what the second pruning
keeps. With M > 4 they do not, and `second_kept` says it beside the metadata: the same words, one bit a position.

The kernels' side of this is operand_rules.cuh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # rows and columns of one block of metadata
ROW_PADDING = 256
EMPTY_NIBBLE = 0x4  # positions 0 and 1


def metadata_shape(rows: int, cols: int) -> tuple[int, int, int]:
    """Shape of the int32 metadata of an operand [rows, cols]."""
    return -(-cols // TILE), -(-rows // ROW_PADDING) * (ROW_PADDING // TILE), 128


# ---------------------------------------------------------------------------------------------------- fragment order
def to_fragment_order(nibbles: Tensor, empty: int = EMPTY_NIBBLE) -> Tensor:
    """Nibbles of all groups [rows, cols/4] -> int32 words in fragment order; `empty` stands where there is no group."""
    rows, groups = nibbles.shape
    k_blocks, m_blocks, _ = metadata_shape(rows, 4 * groups)
    padding = (0, k_blocks * TILE // 4 - groups, 0, m_blocks * TILE - rows)
    padded = F.pad(nibbles.to(torch.int64), padding, value=empty)
    # rows: block, warp, half of the word, row of 8; groups: block, quarter, place in the half
    parts = padded.view(m_blocks, 4, 2, 8, k_blocks, 4, 4)
    shifts = torch.tensor([[0, 4, 8, 12], [16, 20, 24, 28]], device=nibbles.device)
    words = (parts.permute(4, 0, 1, 3, 5, 2, 6) << shifts).sum((-2, -1)).view(k_blocks, m_blocks, 128)
    return (words - (words >> 31 << 32)).to(torch.int32)  # the same 32 bits, signed


def from_fragment_order(words: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `to_fragment_order`: nibbles [rows, cols/4], int64."""
    k_blocks, m_blocks, _ = metadata_shape(rows, cols)
    shifts = torch.tensor([[0, 4, 8, 12], [16, 20, 24, 28]], device=words.device)
    parts = words.to(torch.int64).view(k_blocks, m_blocks, 4, 8, 4, 1, 1) >> shifts & 0xF
    return parts.permute(1, 2, 5, 3, 0, 4, 6).reshape(m_blocks * TILE, k_blocks * TILE // 4)[:rows, : cols // 4]


# ----------------------------------------------------------------------------------------------------------- operands
def complete_pairs(kept: Tensor, first_mask: Tensor) -> Tensor:
    """Exactly two positions of every 4 along the columns: those of `kept`, completed with free ones.

    Args:
        kept: bool [rows, cols], at most 2 of every 4.
        first_mask: bool [rows, cols], positions to be taken last.

    Raises:
        ValueError: when a group of `kept` has more than 2.
    """
    groups, avoided = kept.unflatten(-1, (-1, 4)), first_mask.unflatten(-1, (-1, 4))
    if int(groups.sum(-1).max()) > 2:
        raise ValueError("an operand keeps at most 2 of every 4 neighbours")
    preference = torch.where(groups, 0, torch.where(avoided, 2, 1)) * 4 + torch.arange(4, device=kept.device)
    chosen = preference.argsort(-1)[..., :2]
    return torch.zeros_like(groups).scatter_(-1, chosen, True).flatten(-2)


def pair_nibbles(pairs: Tensor) -> Tensor:
    """Exactly two of every 4 along the columns, bool [rows, cols] -> nibbles [rows, cols/4]."""
    positions = pairs.unflatten(-1, (-1, 4)).nonzero()[:, -1].view(pairs.shape[0], -1, 2)
    return positions[..., 0] | positions[..., 1] << 2


def fragment_metadata(mask: Tensor, first_mask: Tensor | None = None) -> Tensor:
    """Metadata of an operand whose entries stand where `mask` is True.

    Args:
        mask: bool [rows, cols], at most 2 of every 4 along the columns.
        first_mask: positions that fill a group last; `mask` itself if None, as for the forward operand.
    """
    return to_fragment_order(pair_nibbles(complete_pairs(mask, mask if first_mask is None else first_mask)))


def compress(weight: Tensor, mask: Tensor, first_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The operand of `weight` where `mask` is True, and zero elsewhere.

    Returns:
        kept [rows, cols/2] in the dtype of `weight`, and the metadata.
    """
    pairs = complete_pairs(mask, mask if first_mask is None else first_mask)
    kept = torch.where(mask, weight, 0)[pairs].view(weight.shape[0], -1)
    return kept, to_fragment_order(pair_nibbles(pairs))


def expand(kept: Tensor, metadata: Tensor, rows: int, cols: int) -> Tensor:
    """The dense matrix [rows, cols] that an operand stands for."""
    return torch.zeros(rows, cols, dtype=kept.dtype, device=kept.device).masked_scatter_(
        metadata_pairs(metadata, rows, cols), kept
    )


def metadata_pairs(metadata: Tensor, rows: int, cols: int) -> Tensor:
    """The two positions of every group, bool [rows, cols]."""
    nibbles = from_fragment_order(metadata, rows, cols)
    positions = torch.stack((nibbles & 3, nibbles >> 2), -1)
    pairs = torch.zeros(rows, cols // 4, 4, dtype=torch.bool, device=metadata.device)
    return pairs.scatter_(-1, positions, True).view(rows, cols)


# --------------------------------------------------------------------------------------------------- the second choice
def second_kept_words(second: Tensor) -> Tensor:
    """`second_kept` of the kernels (M > 4): bool [out, in], what W^{R,C} keeps -> int32 words like its metadata."""
    groups = second.t().unflatten(-1, (-1, 4)).to(torch.int64)
    return to_fragment_order((groups << torch.arange(4, device=second.device)).sum(-1), empty=0)


def backward_operand(weight: Tensor, mask: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """W^{R,C} transposed as an operand [in, out].

    Args:
        weight: [out, in].
        mask: bool [out, in], what W^R keeps.
        second: bool [out, in], what W^{R,C} keeps of it.
    """
    return compress(weight.t(), second.t(), first_mask=mask.t())
