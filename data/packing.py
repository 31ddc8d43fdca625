"""Padded micro-batches to sequences that lie end to end, so that no padding is computed, and a step to micro-batches.

The number of tokens then differs from one micro-batch to the next. It is filled up to a multiple (`fill_multiple`), so
that a captured CUDA graph, which has one shape, serves many of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data.loader import Batch

ALIGNMENT = 128  # tokens: the tiles of matrix products
MOST_SHAPES = 64  # that micro-batches of one size come in
_BY_TOKEN = ("input_ids", "token_type_ids", "positions")  # the packed tensors that are cut where micro-steps end


def fill_multiple(local_batch_size: int, sequence_length: int, shapes: int = MOST_SHAPES) -> int:
    """What the tokens of a micro-batch are filled up to a multiple of: 1/shapes of its places, at least 128 tokens."""
    share = -(-local_batch_size * sequence_length // shapes)
    return -(-share // ALIGNMENT) * ALIGNMENT


def pack_step(batch: dict[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """The step that `StepDataset` describes with the padding of its sequences taken out.

    Args:
        batch: padded arrays [K, B, ...]; the attention mask of each sequence is ones, at least one, and then zeros.
        multiple: see `fill_multiple`.

    Returns:
        int64 arrays, micro-step k having T_k tokens, T their sum, B sequences, and some that fill it up:
            tokens [K]                              T_k
            input_ids, token_type_ids [T]           0 in what fills up
            positions [T]                           of each token in its sequence; 0 in what fills up
            boundaries [K, B + 1 + F]               where each sequence begins, within the micro-step; the last is T_k;
                                                    what fills up are F sequences, of at most S tokens as all others
            masked_positions [K, B, P]              places among the T_k tokens; an unused one is the sequence's first
            masked_labels, next_sentence_labels     as they were
    """
    packed = _pack(batch, multiple)
    firsts = packed["boundaries"][:, : batch["attention_mask"].shape[1], None]
    others = {name: batch[name] for name in ("masked_labels", "next_sentence_labels")}
    return packed | {"masked_positions": batch["masked_positions"] + firsts} | others


def pack_examples(batch: dict[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Padded examples [B, ...] with the padding taken out, as one micro-step of `pack_step`.

    Returns:
        input_ids, token_type_ids and positions [T], boundaries [B + 1 + F]; the rest as it was.
    """
    packed = _pack({name: batch[name][None] for name in ("input_ids", "token_type_ids", "attention_mask")}, multiple)
    others = {name: array for name, array in batch.items() if name not in packed}
    return others | {name: packed[name] for name in _BY_TOKEN} | {"boundaries": packed["boundaries"][0]}


def _pack(batch: dict[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """The first five arrays of `pack_step`."""
    attended = batch["attention_mask"].astype(bool)
    lengths = attended.sum(-1)
    ends = lengths.cumsum(-1)
    tokens = -(-ends[:, -1] // multiple) * multiple
    length, zero = attended.shape[-1], np.zeros((len(ends), 1), np.int64)
    fillers = length * np.arange(1, 1 - (-multiple // length))
    boundaries = np.concatenate([zero, ends, np.minimum(ends[:, -1:] + fillers, tokens[:, None])], axis=-1)
    place = np.broadcast_to(np.arange(length), attended.shape)
    kept = {"input_ids": batch["input_ids"], "token_type_ids": batch["token_type_ids"], "positions": place}
    packed = {
        name: np.concatenate([_filled(array[k][attended[k]], tokens[k]) for k in range(len(tokens))])
        for name, array in kept.items()
    }
    return {"tokens": tokens, **packed, "boundaries": boundaries}


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    filled = np.zeros(size, np.int64)
    filled[: len(array)] = array
    return filled


def sequence_lengths(batch: Batch) -> torch.Tensor:
    """Tokens of each sequence of a step, padded or packed, [K, B]."""
    if "boundaries" in batch:
        return batch["boundaries"].diff(dim=-1)[:, : batch["masked_positions"].shape[1]]
    return batch["attention_mask"].sum(-1)


def fullest_micro_batch(part: Batch, sequence_length: int, multiple: int) -> Batch:
    """A packed micro-batch of as many sequences as `part`, none with any padding; tokens and labels mean nothing."""
    sequences = len(part["masked_positions"])
    tokens = -(-sequences * sequence_length // multiple) * multiple
    count = len(part["boundaries"])
    boundaries = (torch.arange(count, device=part["boundaries"].device) * sequence_length).clamp_(max=tokens)
    by_token = {name: part[name].new_zeros(tokens) for name in _BY_TOKEN}
    others = {name: tensor.clone() for name, tensor in part.items() if name not in (*_BY_TOKEN, "boundaries")}
    others["masked_positions"].zero_()
    full = by_token | others | {"boundaries": boundaries}
    return {name: full[name] for name in part}  # in the same order


def micro_batches(batch: Batch) -> Iterator[Batch]:
    """A step's micro-batches, as views: padded [B, ...], or packed with [T_k] tokens."""
    if "tokens" not in batch:
        for k in range(len(batch["input_ids"])):
            yield {name: tensor[k] for name, tensor in batch.items()}
        return
    sizes = batch["tokens"].tolist()  # on the host, also where the rest is on a GPU
    by_token = {name: batch[name].split(sizes) for name in _BY_TOKEN}
    for k in range(len(sizes)):
        others = {name: tensor[k] for name, tensor in batch.items() if name not in (*_BY_TOKEN, "tokens")}
        yield {name: parts[k] for name, parts in by_token.items()} | others
