"""Masked-language-model corruption: proportions, positions, and that it is a pure function of its keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.masking import MaskingRule, mask_tokens, random_bits, random_key, random_order

MASK = 4
ROOT = Path(__file__).resolve().parent.parent


def corrupt(ids, maskable, rule, seed=0):
    """Mask a copy of `ids`; returns (corrupted, positions, labels)."""
    corrupted = ids.copy()
    positions, labels = mask_tokens(corrupted, maskable, random_bits(random_key(seed), np.arange(len(ids))), rule)
    return corrupted, positions, labels


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 40),
    width=st.integers(1, 50),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**63),
)
def test_counts_positions_and_labels(rows, length, width, fraction, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 30, (rows, length))
    maskable = rng.random((rows, length)) < 0.7
    corrupted, positions, labels = corrupt(ids, maskable, MaskingRule(fraction, width, 30, MASK), seed)
    assert positions.shape == labels.shape == (rows, width)
    for row in range(rows):
        available = int(maskable[row].sum())
        count = min(min(width, max(1, int(fraction * available))), available)
        chosen = positions[row, :count]
        assert (np.diff(chosen) > 0).all(), "ascending, hence without replacement"
        assert maskable[row, chosen].all()
        np.testing.assert_array_equal(labels[row, :count], ids[row, chosen])
        assert (positions[row, count:] == 0).all() and (labels[row, count:] == -1).all()
        untouched = np.setdiff1d(np.arange(length), chosen)
        np.testing.assert_array_equal(corrupted[row, untouched], ids[row, untouched])


def test_proportions_are_80_10_10():
    vocab_size = 1000
    ids = np.random.default_rng(0).integers(5, vocab_size, (2000, 64))
    corrupted, positions, labels = corrupt(ids, np.ones_like(ids, bool), MaskingRule(0.25, 16, vocab_size, MASK))
    after = np.take_along_axis(corrupted, positions, axis=1)
    masked, kept = (after == MASK).mean(), (after == labels).mean()
    # 32,000 draws: the standard deviation of each share is below 0.0025.
    assert masked == pytest.approx(0.8 + 0.1 / vocab_size, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / vocab_size, abs=0.01)
    assert 1 - masked - kept == pytest.approx(0.1, abs=0.01)


def test_what_happens_to_a_token_does_not_depend_on_its_rank_among_the_chosen():
    ids = np.random.default_rng(0).integers(5, 1000, (4000, 32))
    corrupted, positions, _ = corrupt(ids, np.ones_like(ids, bool), MaskingRule(0.25, 8, 1000, MASK))
    shares = (np.take_along_axis(corrupted, positions, axis=1) == MASK).mean(axis=0)
    np.testing.assert_allclose(shares, 0.8, atol=0.03)


def test_random_tokens_are_uniform_over_the_whole_vocabulary_with_its_last_id():
    vocab_size = 10
    ids = np.full((20000, 8), 5)
    corrupted, _, _ = corrupt(ids, np.ones_like(ids, bool), MaskingRule(1.0, 8, vocab_size, MASK))
    # [MASK] and the token itself come from the other two kinds as well, so they are left out of the comparison.
    counts = np.bincount(corrupted.ravel(), minlength=vocab_size)[[0, 1, 2, 3, 6, 7, 8, 9]]
    assert len(counts) == 8 and counts.min() > 0
    np.testing.assert_allclose(counts, 0.1 * ids.size / vocab_size, rtol=0.12)


def test_positions_are_uniform():
    ids = np.full((20000, 10), 5)
    maskable = np.ones_like(ids, bool)
    maskable[:, [0, 9]] = False
    _, positions, labels = corrupt(ids, maskable, MaskingRule(0.25, 2, 50, MASK))
    counts = np.bincount(positions[labels >= 0], minlength=10)
    assert counts[0] == counts[9] == 0
    np.testing.assert_allclose(counts[1:9], 20000 * 2 / 8, rtol=0.06)


def test_the_choice_does_not_depend_on_the_room_for_it():
    ids = np.random.default_rng(0).integers(5, 50, (50, 512))
    maskable = np.ones_like(ids, bool)
    corrupted, positions, labels = corrupt(ids, maskable, MaskingRule(0.1, 51, 50, MASK))
    for width in (52, 80, 400, 600):
        again, wide, wide_labels = corrupt(ids, maskable, MaskingRule(0.1, width, 50, MASK))
        np.testing.assert_array_equal(again, corrupted)
        np.testing.assert_array_equal(wide[:, :51], positions)
        np.testing.assert_array_equal(wide_labels[:, :51], labels)


def test_a_row_depends_on_its_key_alone():
    ids = np.random.default_rng(0).integers(5, 50, (12, 20))
    maskable = np.ones_like(ids, bool)
    rule, keys = MaskingRule(0.3, 6, 50, MASK), random_bits(random_key(1), np.arange(12))
    together = ids.copy()
    positions, labels = mask_tokens(together, maskable, keys, rule)
    for row in (11, 3):
        alone = ids[row : row + 1].copy()
        one = mask_tokens(alone, maskable[row : row + 1], keys[row : row + 1], rule)
        np.testing.assert_array_equal(alone[0], together[row])
        np.testing.assert_array_equal(one[0][0], positions[row])
        np.testing.assert_array_equal(one[1][0], labels[row])


def test_a_row_without_maskable_tokens_is_left_alone():
    ids = np.full((2, 8), 7)
    corrupted, positions, labels = corrupt(ids, np.zeros_like(ids, bool), MaskingRule(0.5, 4, 50, MASK))
    assert (corrupted == ids).all() and (positions == 0).all() and (labels == -1).all()


def test_streams_are_the_published_splitmix64():
    # First outputs of splitmix64 seeded with 1234567, as listed with its reference implementation.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(np.array([1234567], np.uint64), np.arange(5)).tolist() == expected


def test_keys_and_orders_are_the_same_in_another_process_and_differ_between_names():
    source = (
        "from data.masking import random_key, random_order\nprint(random_order(random_key(-3, 2**70, 5), 9).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=ROOT)
    assert str(random_order(random_key(-3, 2**70, 5), 9).tolist()) == other.stdout.strip()
    keys = [int(random_key(*words)[0]) for words in ((1,), (2,), (1, 0), (1, 1), (0, 1), (1, 0, 0))]
    assert len(set(keys)) == len(keys)
    assert sorted(random_order(random_key(7), 1000)) == list(range(1000))
