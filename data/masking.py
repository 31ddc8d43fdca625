"""Masked-language-model corruption as a pure function of (seed, epoch, sample, position).

There is no generator state: every random number is one output of the splitmix64 stream (Steele, Lea and Flood, 2014)
whose index is given, so any part of any batch can be made again alone, in any process, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED_LABEL = -1

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW_32_BITS = np.uint64(0xFFFFFFFF)
_HIGH_32_BITS = np.uint64(0xFFFFFFFF00000000)
_LAST_SCORE = np.uint64(0xFFFFFFFFFFFFFFFF)
_32 = np.uint64(32)

# BERT (Devlin et al., 2019, section 3.1): 80% of the chosen tokens become [MASK], 10% a random token, 10% stay.
_BECOMES_MASK_BELOW = np.uint64(round(0.8 * 2**32))
_BECOMES_RANDOM_BELOW = np.uint64(round(0.9 * 2**32))

# The independent draws at one position: which positions are chosen, what happens to them, which random token.
_CHOICE, _KIND, _TOKEN, _DRAWS = 0, 1, 2, 3


def random_bits(key: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Output number `index` of the splitmix64 stream that starts at `key` (uint64; the two are broadcast)."""
    bits = key + (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def random_key(seed: int, *words: int) -> np.ndarray:
    """The key [1] (uint64) of the stream named by `seed` and `words`, any integers."""
    key = np.zeros(1, np.uint64)
    for word in (seed, *words):
        key = random_bits(key, np.array([word & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return key


def random_order(key: np.ndarray, count: int) -> np.ndarray:
    """A permutation [count] (int64) of 0..count-1 that depends on `key` [1] alone, whatever the NumPy version."""
    return np.argsort(random_bits(key, np.arange(count)), kind="stable")


@dataclass(frozen=True)
class MaskingRule:
    """How many tokens of a sequence are chosen, and what they may become."""

    masked_token_fraction: float
    """Share of the maskable tokens that is chosen."""
    max_predictions_per_seq: int
    """Most positions chosen in one sequence; the width P of the outputs."""
    vocab_size: int
    """Random tokens are uniform over 0..vocab_size-1."""
    mask_token_id: int
    """Id of [MASK]."""


def mask_tokens(
    input_ids: np.ndarray, maskable: np.ndarray, keys: np.ndarray, rule: MaskingRule
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt `input_ids` in place; return what has to be predicted.

    Args:
        input_ids: [R, S] int64, overwritten at the chosen positions.
        maskable: [R, S] bool, the positions that may be chosen.
        keys: [R] uint64, one stream per sequence.
        rule: the counts and ids.

    Returns:
        masked_positions [R, P] int64, ascending, then 0 where unused.
        masked_labels [R, P] int64, the original ids, -1 where unused.
    """
    rows, length = input_ids.shape
    width = rule.max_predictions_per_seq
    masked_positions = np.zeros((rows, width), np.int64)
    masked_labels = np.full((rows, width), IGNORED_LABEL, np.int64)

    keys = keys[:, None]
    positions, used = _choose_positions(maskable, keys, rule)
    labels = np.take_along_axis(input_ids, positions, axis=1)
    replaced = _replacements(labels, positions, keys, rule)

    row, slot = np.nonzero(used)
    position = positions[row, slot]
    masked_positions[row, slot] = position
    masked_labels[row, slot] = labels[row, slot]
    input_ids[row, position] = replaced[row, slot]
    return masked_positions, masked_labels


def _choose_positions(maskable: np.ndarray, keys: np.ndarray, rule: MaskingRule) -> tuple[np.ndarray, np.ndarray]:
    """Positions [R, min(P, S)] ascending, without replacement, and which of these slots are in use (bool)."""
    length = maskable.shape[1]
    width = min(rule.max_predictions_per_seq, length)
    available = np.count_nonzero(maskable, axis=1)
    count = (rule.masked_token_fraction * available).astype(np.int64).clip(1, width)
    used = np.arange(width) < np.minimum(count, available)[:, None]

    # A position travels in the low half of its own score, so that sorting scores sorts positions with them.
    position = np.arange(length, dtype=np.uint64)
    scores = random_bits(keys, position * np.uint64(_DRAWS) + np.uint64(_CHOICE))
    scores &= _HIGH_32_BITS
    scores |= position
    scores[~maskable] = _LAST_SCORE
    lowest = np.partition(scores, width - 1, axis=1)[:, :width]
    lowest.sort(axis=1)

    positions = (lowest & _LOW_32_BITS).astype(np.int64)
    positions[~used] = length
    positions.sort(axis=1)
    positions[~used] = 0
    return positions, used


def _replacements(labels: np.ndarray, positions: np.ndarray, keys: np.ndarray, rule: MaskingRule) -> np.ndarray:
    """What the tokens `labels` [R, P'] at `positions` [R, P'] become: [MASK], a random id, or themselves."""
    draws = positions.astype(np.uint64) * np.uint64(_DRAWS)
    kind = random_bits(keys, draws + np.uint64(_KIND)) >> _32
    token = random_bits(keys, draws + np.uint64(_TOKEN)) >> _32
    # floor(u * vocab_size) for u uniform in [0, 1): every id, the last one included, is equally likely.
    random_token = ((token * np.uint64(rule.vocab_size)) >> _32).astype(np.int64)
    kept_or_random = np.where(kind < _BECOMES_RANDOM_BELOW, random_token, labels)
    return np.where(kind < _BECOMES_MASK_BELOW, rule.mask_token_id, kept_or_random)
