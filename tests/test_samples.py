"""Training sequences: sentence pairs as BERT's authors describe them, single sequences, and masking once."""

import random
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.encode import EncodeSettings
from data.masking import MaskingRule, random_key
from data.samples import RANDOM_NEXT, REAL_NEXT, SpanBuilder, TokenizedText, build_samples, cut_lengths, premask
from data.tokenization import (
    SpecialIds,
)

SPECIAL = SpecialIds(pad=0, unknown=1, cls=2, sep=3, mask=4)


# ------------------------------------------------------------------------------------------------------ sentence pairs
def _numbered_text(documents: int = 200, sentences: tuple[int, int] = (1, 15)) -> tuple[TokenizedText, np.ndarray]:
    """A text in which every token is its own place (plus 10), and the document of each place."""
    rng = random.Random(0)
    counts = [rng.randint(*sentences) for _ in range(documents)]
    lengths = [rng.randint(1, 30) for _ in range(sum(counts))]
    starts = [0, *accumulate(lengths)]
    bounds = [0, *accumulate(counts)]
    places = np.concatenate([np.full(starts[bounds[d + 1]] - starts[bounds[d]], d) for d in range(documents)])
    return TokenizedText(np.arange(starts[-1], dtype=np.int32) + 10, starts, bounds), places


@pytest.mark.parametrize("length", [16, 64, 512])
def test_pairs_are_real_or_from_another_document_at_even_odds(length):
    text, document_of = _numbered_text()
    samples = build_samples(text, length, 0.1, True, SPECIAL, random_key(1))
    labels = samples["next_sentence_labels"]
    for row, positions, label in zip(samples["input_ids"], samples["special_token_positions"], labels, strict=True):
        first_sep, last_sep = positions[1:]
        assert row[positions].tolist() == [SPECIAL.cls, SPECIAL.sep, SPECIAL.sep]
        assert (row[last_sep + 1 :] == SPECIAL.pad).all()
        a, b = row[1:first_sep] - 10, row[first_sep + 1 : last_sep] - 10
        for part in (a, b):
            assert len(part) >= 1
            assert (np.diff(part) == 1).all()
            assert len(set(document_of[part])) == 1
        if label == REAL_NEXT:
            assert document_of[a[0]] == document_of[b[0]]
            assert a[-1] < b[0]
            if last_sep < length - 1:
                assert a[-1] + 1 == b[0]
        else:
            assert label == RANDOM_NEXT
            assert document_of[a[0]] != document_of[b[0]]
    assert abs(labels.mean() - 0.5) < 0.06


def test_a_share_of_the_sequences_is_short():
    text, _ = _numbered_text(documents=4, sentences=(800, 1000))
    for wanted in (0.0, 0.1, 0.5):
        spans = SpanBuilder(text, 128, wanted, random.Random(3)).pairs()
        sizes = spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2]
        assert sizes.max() == 125
        assert abs((sizes < 100).mean() - 0.8 * wanted) < 0.05


def test_every_sentence_is_used():
    text, _ = _numbered_text(documents=60)
    used = np.zeros(len(text.tokens), bool)
    for a_start, a_end, b_start, b_end, label in SpanBuilder(text, 1024, 0.0, random.Random(3)).pairs():
        used[a_start:a_end] = True
        if label == REAL_NEXT:
            used[b_start:b_end] = True
    assert used.all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50))
def test_the_longer_side_loses_its_tokens_one_by_one(a, b, most):
    a_left, b_left = a, b
    while a_left + b_left > most:
        if a_left > b_left:
            a_left -= 1
        else:
            b_left -= 1
    assert cut_lengths(a, b, most) == (a_left, b_left)


def test_tokens_are_cut_from_both_ends():
    text = TokenizedText(np.arange(4000, dtype=np.int32) + 10, [0, 2000, 4000], [0, 1, 2])
    starts = [SpanBuilder(text, 515, 0, random.Random(seed)).pairs()[0, 0] for seed in range(20)]
    assert 800 < np.mean(starts) < 950  # of 2000 tokens 256 stay, so 872 go from the front on average
    assert np.std(starts) < 80


def test_single_sequences_are_whole_sentences_of_one_document():
    text, document_of = _numbered_text()
    samples = build_samples(text, 64, 0.1, False, SPECIAL, random_key(1))
    assert set(samples) == {"input_ids", "special_token_positions"}
    used = []
    for row, (cls, sep) in zip(samples["input_ids"], samples["special_token_positions"], strict=True):
        assert (row[cls], row[sep]) == (SPECIAL.cls, SPECIAL.sep)
        assert (row[sep + 1 :] == SPECIAL.pad).all()
        places = row[1:sep] - 10
        assert (np.diff(places) == 1).all()
        assert len(set(document_of[places])) == 1
        assert {places[0], places[-1] + 1} <= set(text.sentences)
        used.extend(places)
    assert sorted(used) == list(range(len(text.tokens)))


def test_the_same_key_gives_the_same_samples_and_another_one_others():
    text, _ = _numbered_text(documents=30)
    one, same, other = (build_samples(text, 64, 0.1, True, SPECIAL, random_key(seed)) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert one["input_ids"].shape != other["input_ids"].shape or (one["input_ids"] != other["input_ids"]).any()
    assert (np.diff(one["input_ids"][:, 1]) < 0).mean() > 0.3  # shuffled


# ------------------------------------------------------------------------------------------------------------ premasked
@pytest.mark.parametrize("next_sentence", [True, False])
def test_premasked_samples_are_the_unmasked_ones_masked_once(next_sentence):
    text, _ = _numbered_text()
    vocab_size = len(text.tokens) + 10
    samples = build_samples(text, 64, 0.1, next_sentence, SPECIAL, random_key(1))
    masked = premask(samples, MaskingRule(0.15, 10, vocab_size, SPECIAL.mask), random_key(2))
    rows = np.arange(len(samples["input_ids"]))[:, None]
    positions, used = masked["masked_lm_positions"], masked["masked_lm_positions"] > 0
    assert (masked["masked_lm_ids"][~used] == 0).all()
    assert ((np.diff(positions) > 0) | ~used[:, 1:]).all()
    restored = masked["input_ids"].copy()
    np.put_along_axis(restored, positions, np.where(used, masked["masked_lm_ids"], restored[rows, 0]), axis=1)
    assert (restored == samples["input_ids"]).all()

    lengths = samples["special_token_positions"][:, -1] + 1
    assert (masked["input_mask"] == (np.arange(64) < lengths[:, None])).all()
    assert (masked["input_mask"].sum(1) == lengths).all()
    second = samples["special_token_positions"][:, 1:2] < np.arange(64) if next_sentence else False
    assert (masked["segment_ids"] == (masked["input_mask"].astype(bool) & second)).all()
    is_special = np.isin(samples["input_ids"], [SPECIAL.cls, SPECIAL.sep, SPECIAL.pad])
    assert not (is_special[rows, positions] & used).any()
    maskable = (~is_special).sum(1)
    assert (used.sum(1) == np.clip((0.15 * maskable).astype(int), 1, 10)).all()

    now = masked["input_ids"][rows, positions][used]
    assert abs((now == SPECIAL.mask).mean() - 0.8) < 0.03
    assert abs((now == masked["masked_lm_ids"][used]).mean() - 0.1) < 0.03
    assert ("next_sentence_labels" in masked) == next_sentence


def test_usual_lengths_have_the_usual_number_of_predictions():
    settings = EncodeSettings()
    assert [settings.predictions(length) for length in (64, 128, 512)] == [10, 20, 80]
