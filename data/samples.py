"""From tokenized documents to BERT's training sequences (Devlin et al., 2019, section 3.1 and appendix A.2).

A sequence is one or two spans of consecutive sentences. Sentences of a document lie one after the other in one token
array, so a span is just two places in it, and cutting a sequence to its length moves them.
"""

import random
from dataclasses import dataclass

import numpy as np

from data.masking import MaskingRule, mask_tokens, random_bits, random_order
from data.tokenization import SpecialIds

REAL_NEXT, RANDOM_NEXT = 0, 1
_ROWS_PER_MASKING = 1024


@dataclass(frozen=True)
class TokenizedText:
    """Documents as token ids."""

    tokens: np.ndarray
    """[T] int32."""
    sentences: list[int]
    """[S + 1]: sentence s is tokens[sentences[s]:sentences[s + 1]], never empty."""
    documents: list[int]
    """[D + 1]: document d is the sentences documents[d] to documents[d + 1], never none."""

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1


class SpanBuilder:
    """Chooses the spans of all sequences of a text.

    As in the published data code, sentences are gathered until they reach the length wanted or the document ends; a
    sequence pair splits them at a random sentence, and either keeps the second part or, half of the time, replaces it
    by sentences of another document, the ones replaced going into the next sequence. Two things differ: a sequence is
    short with probability `short_seq_prob` by itself, not with its document; and where a document's last sentence
    stands alone, so that its next one can only be random, a real next one makes up for it, so that labels are even.
    """

    def __init__(self, text: TokenizedText, length: int, short_seq_prob: float, rng: random.Random):
        """
        Args:
            text: at least two documents where pairs are built.
            length: tokens of a sequence, special tokens included.
            short_seq_prob: share of sequences that are to be shorter, by a length that is uniform.
            rng: only its `random` and `getrandbits` are used, which give the same in every Python version.
        """
        self._text = text
        self._length = length
        self._short_seq_prob = short_seq_prob
        self._rng = rng
        self._real_owed = 0
        self._spans: list[tuple[int, int, int, int, int]] = []

    def pairs(self) -> np.ndarray:
        """Spans [N, 5] int64: start and end of A, start and end of B, RANDOM_NEXT or REAL_NEXT."""
        most = self._length - 3
        for document in range(self._text.num_documents):
            sentence, last = self._text.documents[document], self._text.documents[document + 1]
            while sentence < last:
                sentence = self._add_pair(document, sentence, last, most)
        return np.array(self._spans, np.int64).reshape(-1, 5)

    def singles(self) -> np.ndarray:
        """Spans [N, 2] int64 of whole sentences of one document; a sentence that is too long alone is cut."""
        most = self._length - 2
        bounds = self._text.sentences
        spans = []
        for document in range(self._text.num_documents):
            sentence, last = self._text.documents[document], self._text.documents[document + 1]
            while sentence < last:
                target = self._target(most)
                end = sentence + 1
                while end < last and bounds[end + 1] - bounds[sentence] <= target:
                    end += 1
                spans.append(self._cut(bounds[sentence], bounds[end], most))
                sentence = end
        return np.array(spans, np.int64).reshape(-1, 2)

    def _add_pair(self, document: int, first: int, last: int, most: int) -> int:
        """Add the sequence that begins with sentence `first`; returns the sentence that the next one begins with."""
        bounds = self._text.sentences
        target = self._target(most)
        end = min(first + 2, last)  # a real next sentence takes two
        while end < last and bounds[end] - bounds[first] < target:
            end += 1
        middle = first + 1 + self._below(end - first - 1) if end - first > 1 else end
        a_start, a_end = bounds[first], bounds[middle]
        if self._next_is_random(end - first):
            b_start, b_end = self._other_document(document, target - (a_end - a_start))
            label, following = RANDOM_NEXT, middle
        else:
            b_start, b_end = a_end, bounds[end]
            label, following = REAL_NEXT, end
        a_tokens, b_tokens = cut_lengths(a_end - a_start, b_end - b_start, most)
        self._spans.append((*self._cut(a_start, a_end, a_tokens), *self._cut(b_start, b_end, b_tokens), label))
        return following

    def _target(self, most: int) -> int:
        if self._rng.random() < self._short_seq_prob:
            return 2 + self._below(most - 1)
        return most

    def _next_is_random(self, sentences: int) -> bool:
        if sentences == 1:
            self._real_owed += 1
            return True
        if self._real_owed:
            self._real_owed -= 1
            return False
        return self._rng.random() < 0.5

    def _other_document(self, document: int, target: int) -> tuple[int, int]:
        """Sentences of about `target` tokens, one at least, from a random place in another document."""
        documents, bounds = self._text.documents, self._text.sentences
        other = self._below(self._text.num_documents - 1)
        other += other >= document
        last = documents[other + 1]
        first = documents[other] + self._below(last - documents[other])
        end = first + 1
        while end < last and bounds[end] - bounds[first] < target:
            end += 1
        return bounds[first], bounds[end]

    def _cut(self, start: int, end: int, tokens: int) -> tuple[int, int]:
        """The span cut to `tokens` at most; each token goes from the front or the back, at even odds."""
        excess = end - start - tokens
        if excess <= 0:
            return start, end
        from_front = self._rng.getrandbits(excess).bit_count()
        return start + from_front, end - (excess - from_front)

    def _below(self, limit: int) -> int:
        return int(self._rng.random() * limit)


def cut_lengths(a_tokens: int, b_tokens: int, most: int) -> tuple[int, int]:
    """What is left of A and B once the longer of them (B where they are even) has lost tokens until both fit."""
    if a_tokens + b_tokens <= most:
        return a_tokens, b_tokens
    a_left = min(a_tokens, max(most - b_tokens, (most + 1) // 2))
    return a_left, most - a_left


# -------------------------------------------------------------------------------------------------------------- arrays
def build_samples(
    text: TokenizedText, length: int, short_seq_prob: float, next_sentence: bool, special: SpecialIds, key: np.ndarray
) -> dict[str, np.ndarray]:
    """All sequences of `text`, shuffled, in the unmasked layout.

    Args:
        key: [1] uint64, names the random choices.

    Returns:
        input_ids [N, length] int32, special_token_positions [N, 3] int32 ([N, 2] for single sequences) and, for pairs,
        next_sentence_labels [N] int8.
    """
    builder = SpanBuilder(text, length, short_seq_prob, random.Random(int(key[0])))
    spans = builder.pairs() if next_sentence else builder.singles()
    spans = spans[random_order(key, len(spans))]
    rows = np.arange(len(spans))
    input_ids = np.full((len(spans), length), special.pad, np.int32)
    input_ids[:, 0] = special.cls
    positions = [np.zeros(len(spans), np.int32)]
    for start, end in (spans[:, 0:2].T, spans[:, 2:4].T) if next_sentence else (spans.T,):
        first = positions[-1] + 1
        _copy_spans(text.tokens, start, end - start, input_ids, first)
        positions.append((first + end - start).astype(np.int32))
        input_ids[rows, positions[-1]] = special.sep
    samples = {"input_ids": input_ids, "special_token_positions": np.stack(positions, axis=1)}
    if next_sentence:
        samples["next_sentence_labels"] = spans[:, 4].astype(np.int8)
    return samples


def _copy_spans(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray, columns: np.ndarray):
    """Copy tokens[starts[i]:starts[i] + lengths[i]] to row i of `rows` [N, L], from column columns[i] on."""
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    targets = np.arange(len(rows)) * rows.shape[1] + columns
    rows.reshape(-1)[np.repeat(targets, lengths) + inside] = tokens[np.repeat(starts, lengths) + inside]


def premask(samples: dict[str, np.ndarray], rule: MaskingRule, key: np.ndarray) -> dict[str, np.ndarray]:
    """The same sequences masked once, in NVIDIA's layout.

    Args:
        samples: as `build_samples` returns them.
        rule: how many tokens are masked; P = its max_predictions_per_seq.
        key: [1] uint64, names the random choices.

    Returns:
        input_ids [N, L] int32, input_mask and segment_ids [N, L] int8, masked_lm_positions and masked_lm_ids [N, P]
        int32 (ascending positions, then 0 where unused) and, for pairs, next_sentence_labels [N] int8.
    """
    special = samples["special_token_positions"]
    count, length = samples["input_ids"].shape
    column = np.arange(length)
    input_mask = column <= special[:, -1:]
    maskable = input_mask.copy()
    np.put_along_axis(maskable, special, False, axis=1)
    segment_ids = input_mask & (column > special[:, 1:2]) if special.shape[1] == 3 else np.zeros_like(input_mask)
    premasked = {
        "input_ids": samples["input_ids"].copy(),
        "input_mask": input_mask.astype(np.int8),
        "segment_ids": segment_ids.astype(np.int8),
        "masked_lm_positions": np.zeros((count, rule.max_predictions_per_seq), np.int32),
        "masked_lm_ids": np.zeros((count, rule.max_predictions_per_seq), np.int32),
    }
    keys = random_bits(key, np.arange(count))
    for start in range(0, count, _ROWS_PER_MASKING):
        rows = slice(start, start + _ROWS_PER_MASKING)
        input_ids = samples["input_ids"][rows].astype(np.int64)
        positions, labels = mask_tokens(input_ids, maskable[rows], keys[rows], rule)
        premasked["input_ids"][rows] = input_ids
        premasked["masked_lm_positions"][rows] = positions
        premasked["masked_lm_ids"][rows] = np.maximum(labels, 0)
    if "next_sentence_labels" in samples:
        premasked["next_sentence_labels"] = samples["next_sentence_labels"]
    return premasked
