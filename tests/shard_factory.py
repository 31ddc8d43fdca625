"""Small HDF5 shards for tests, in both layouts, with random contents that a seed names."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

PAD, CLS, SEP, MASK = 0, 2, 3, 4
FIRST_WORD = 5


def write_shard(
    path: Path,
    *,
    count: int = 8,
    length: int = 16,
    vocab_size: int = 50,
    seed: int = 0,
    next_sentence: bool = True,
    attributes: bool = True,
    vocabulary_sha256: str | None = None,
) -> dict[str, np.ndarray]:
    """Write one unmasked shard of `count` samples; returns its arrays. Every first word is the sample's own number."""
    rng = np.random.default_rng(seed)
    input_ids = np.zeros((count, length), np.int32)
    special = np.zeros((count, 3 if next_sentence else 2), np.int32)
    for row in range(count):
        last = int(rng.integers(length // 2, length))
        middle = int(rng.integers(2, last - 1)) if next_sentence else last
        input_ids[row, : last + 1] = rng.integers(FIRST_WORD, vocab_size, last + 1)
        input_ids[row, [0, middle, last]] = CLS, SEP, SEP
        special[row] = [0, middle, last] if next_sentence else [0, last]
    arrays = {"input_ids": input_ids, "special_token_positions": special}
    if next_sentence:
        arrays["next_sentence_labels"] = rng.integers(0, 2, count).astype(np.int8)
    write_arrays(path, arrays, describe(input_ids, vocab_size, "unmasked", vocabulary_sha256) if attributes else {})
    return arrays


def write_premasked_shard(
    path: Path,
    *,
    count: int = 8,
    length: int = 16,
    vocab_size: int = 50,
    predictions: int = 4,
    seed: int = 0,
    next_sentence: bool = True,
    attributes: bool = True,
    vocabulary_sha256: str | None = None,
) -> dict[str, np.ndarray]:
    """Write one shard in NVIDIA's layout; returns its arrays."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(FIRST_WORD, vocab_size, (count, length)).astype(np.int32)
    input_mask = np.ones((count, length), np.int8)
    segment_ids = (np.arange(length) > length // 2).astype(np.int8) * np.ones((count, 1), np.int8)
    positions = np.zeros((count, predictions), np.int32)
    ids = np.zeros((count, predictions), np.int32)
    for row in range(count):
        masked = int(rng.integers(1, predictions + 1))
        positions[row, :masked] = np.sort(rng.choice(np.arange(1, length - 1), masked, replace=False))
        ids[row, :masked] = input_ids[row, positions[row, :masked]]
        input_ids[row, positions[row, :masked]] = MASK
    arrays = {
        "input_ids": input_ids,
        "input_mask": input_mask,
        "segment_ids": segment_ids,
        "masked_lm_positions": positions,
        "masked_lm_ids": ids,
    }
    if next_sentence:
        arrays["next_sentence_labels"] = rng.integers(0, 2, count).astype(np.int8)
    write_arrays(path, arrays, describe(input_ids, vocab_size, "premasked", vocabulary_sha256) if attributes else {})
    return arrays


def describe(
    input_ids: np.ndarray, vocab_size: int, layout: str, vocabulary_sha256: str | None = None
) -> dict[str, object]:
    """The attributes that the encoder writes; without a hash, those of its earlier versions."""
    known = {} if vocabulary_sha256 is None else {"vocabulary_sha256": vocabulary_sha256}
    return known | {
        "format_version": 1,
        "vocab_size": vocab_size,
        "sequence_length": input_ids.shape[1],
        "num_samples": input_ids.shape[0],
        "max_token_id": int(input_ids.max()),
        "mask_token_id": MASK,
        "layout": layout,
    }


def write_arrays(path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, object]) -> None:
    """Write any arrays and attributes to an HDF5 file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        for name, value in attributes.items():
            file.attrs[name] = value
