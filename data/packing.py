"""Padded micro-batches to sequences that lie end to end, so that no padding is computed, and a step to micro-batches.

The number of tokens then differs from one micro-batch to the next. It is filled up to a multiple (`fill_multiple`), so
that a captured CUDA graph, which has one shape, serves many of them. The number of predictions follows from that of the
tokens (`prediction_places`), so that it makes no more shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from data.loader import Batch
from data.masking import IGNORED_LABEL

ALIGNMENT = 128  # tokens: the tiles of matrix products
MOST_SHAPES = 64  # that micro-batches of one size come in
PREDICTION_ALIGNMENT = 64  # predictions, likewise
# The packed tensors that are cut where micro-steps end, and the sizes of their parts.
_BY_TOKEN = ("input_ids", "token_type_ids", "positions")
_BY_PREDICTION = ("masked_positions", "masked_labels")
SIZES = ("tokens", "predictions")  # read on the host


def fill_multiple(local_batch_size: int, sequence_length: int, shapes: int = MOST_SHAPES) -> int:
    """What the tokens of a micro-batch are filled up to a multiple of: 1/shapes of its places, at least 128 tokens."""
    share = -(-local_batch_size * sequence_length // shapes)
    return -(-share // ALIGNMENT) * ALIGNMENT


def prediction_places(tokens: int, masked_token_fraction: float, at_most: int) -> int:
    """What the predictions of a micro-batch of so many tokens are filled up to, `at_most` those of a padded one.

    Sequences of which the fraction would be less than one token have one all the same; a micro-batch with so many of
    them that this is too few has `at_most`.
    """
    aligned = -(-math.ceil(masked_token_fraction * tokens) // PREDICTION_ALIGNMENT) * PREDICTION_ALIGNMENT
    return min(aligned, at_most)


def pack_step(batch: dict[str, np.ndarray], multiple: int, masked_token_fraction: float) -> dict[str, np.ndarray]:
    """The step that `StepDataset` describes without the padding of its sequences and of their predictions.

    Args:
        batch: padded arrays [K, B, ...]; the attention mask of each sequence is ones, at least one, and then zeros.
        multiple: see `fill_multiple`.
        masked_token_fraction: see `prediction_places`.

    Returns:
        int64 arrays. Micro-step k has T_k tokens and M_k predictions, with some that fill them up; T and M are their
        sums. It has B sequences:
            tokens, predictions [K]                 T_k and M_k
            input_ids, token_type_ids [T]           0 in what fills up
            positions [T]                           of each token in its sequence; 0 in what fills up
            boundaries [K, B + 1 + F]               where each sequence begins, within the micro-step; the last is T_k;
                                                    what fills up are F sequences, of at most S tokens as all others
            masked_positions [M]                    places among the T_k tokens; any in what fills up
            masked_labels [M]                       -1 in what fills up
            next_sentence_labels [K, B]             as they were
    """
    packed = _pack(batch, multiple)
    used, labels = batch["masked_labels"] != IGNORED_LABEL, batch["masked_labels"]
    places = batch["masked_positions"] + packed["boundaries"][:, : used.shape[1], None]
    predictions = [prediction_places(t, masked_token_fraction, labels[0].size) for t in packed["tokens"].tolist()]
    counts = used.sum((1, 2))
    sizes = np.where(counts > predictions, labels[0].size, predictions)
    # Different places also in what fills up: gradients of one place are added up one after the other.
    fillers = [np.arange(size) % tokens for size, tokens in zip(sizes, packed["tokens"], strict=True)]
    every = range(len(sizes))
    return packed | {
        "predictions": sizes,
        "masked_positions": np.concatenate([_filled(places[k][used[k]], fillers[k]) for k in every]),
        "masked_labels": np.concatenate(
            [_filled(labels[k][used[k]], np.full(sizes[k], IGNORED_LABEL, np.int64)) for k in every]
        ),
        "next_sentence_labels": batch["next_sentence_labels"],
    }


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
        name: np.concatenate([_filled(array[k][attended[k]], np.zeros(t, np.int64)) for k, t in enumerate(tokens)])
        for name, array in kept.items()
    }
    return {"tokens": tokens, **packed, "boundaries": boundaries}


def _filled(array: np.ndarray, filler: np.ndarray) -> np.ndarray:
    """`array`, and what stands behind its length in `filler`."""
    return np.concatenate([array, filler[len(array) :]])


def sequence_lengths(batch: Batch) -> torch.Tensor:
    """Tokens of each sequence of a step, padded or packed, [K, B]."""
    if "boundaries" in batch:
        return batch["boundaries"].diff(dim=-1)[:, : batch["next_sentence_labels"].shape[1]]
    return batch["attention_mask"].sum(-1)


def fullest_micro_batch(
    part: Batch, sequence_length: int, multiple: int, masked_token_fraction: float, max_predictions_per_seq: int
) -> Batch:
    """A packed micro-batch of as many sequences as `part`, without any padding, and the predictions of its tokens'
    share; tokens and labels mean nothing."""
    sequences = len(part["next_sentence_labels"])
    tokens = -(-sequences * sequence_length // multiple) * multiple
    predictions = prediction_places(tokens, masked_token_fraction, sequences * max_predictions_per_seq)
    count, like = len(part["boundaries"]), part["boundaries"]
    full = {name: like.new_zeros(tokens) for name in _BY_TOKEN}
    full["boundaries"] = (torch.arange(count, device=like.device) * sequence_length).clamp_(max=tokens)
    full["masked_positions"] = torch.arange(predictions, device=like.device) % tokens
    full["masked_labels"] = like.new_zeros(predictions)
    return {name: full[name] if name in full else tensor.clone() for name, tensor in part.items()}  # in the same order


def micro_batches(batch: Batch) -> Iterator[Batch]:
    """A step's micro-batches, as views: padded [B, ...], or packed with [T_k] tokens and [M_k] predictions."""
    cut = {}
    if "tokens" in batch:
        for size, names in zip(SIZES, (_BY_TOKEN, _BY_PREDICTION), strict=True):
            sizes = batch[size].tolist()  # on the host, also where the rest is on a GPU
            cut |= {name: batch[name].split(sizes) for name in names}
    parts = {name: cut.get(name, tensor) for name, tensor in batch.items() if name not in SIZES}
    for k in range(len(batch["next_sentence_labels"])):
        yield {name: part[k] for name, part in parts.items()}
