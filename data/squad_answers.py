"""From the scores of SQuAD's windows (`data.squad_windows`) to answers, their files, and their exact match and F1.

The rules are those of the code published with BERT (Devlin et al., 2019, arXiv:1810.04805), two things apart. The best
spans are searched among all, not among pairs of the n best begins and ends. An answer's text is cut out of the original
context by the tokens' character offsets; nothing is put together from tokens and aligned again.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.squad import Example
from data.squad_windows import Features
from data.stages import write_atomic
from training.errors import UsageError

_WINDOWS_AT_ONCE = 256
_SPANS_PER_ANSWER = 2  # of a window, since spans with the same text count once


class Predictions(NamedTuple):
    """Answers by question id, in the form of the published files."""

    answers: dict[str, str]
    """The answer; "" says that there is none (v2.0)."""
    spans: dict[str, str]
    """The best answer that is a part of the context, also where `answers` says that there is none."""
    nbest: dict[str, list[dict]]
    """Best first: text, probability (softmax over this list), start_logit, end_logit. v2.0: "" is always among them."""
    null_odds: dict[str, float]
    """v2.0: score of "no answer" less that of the best answer, in logits; empty for v1.1."""


class _Candidate(NamedTuple):
    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


# ------------------------------------------------------------------------------------------------------------- answers
def predict_answers(
    examples: Sequence[Example],
    features: Features,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    version_2: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> Predictions:
    """The best answers to each question from the scores of all its windows.

    A span is some tokens of a context, at most `max_answer_length`; its score is start logit + end logit. It counts in
    the window that owns its first token (`Features.own_ends`). v2.0: the score of "no answer" is that of [CLS] in the
    window where it is lowest, and the answer is "" when `null_odds` is above `null_score_diff_threshold`.

    Args:
        examples: those that `features` was made of.
        start_logits, end_logits: [N, S] for the N windows; S may exceed their lengths, what is there is not read.
        n_best_size: most answers to keep of each question, spans of the same text counted once.

    Raises:
        UsageError: a logit that is not finite.
    """
    start_logits, end_logits = (np.asarray(logits, np.float64) for logits in (start_logits, end_logits))
    _check_finite(examples, features, start_logits, end_logits)
    spans = _best_spans(features, start_logits, end_logits, n_best_size * _SPANS_PER_ANSWER, max_answer_length)
    bounds = np.searchsorted(features.examples, np.arange(len(examples) + 1))
    predictions = Predictions({}, {}, {}, {})
    for number, example in enumerate(examples):
        windows = slice(bounds[number], bounds[number + 1])
        nbest = _distinct(_candidates(example.context, spans, windows), n_best_size)
        best = nbest[0]
        answer = best.text
        if version_2:
            null = _null_candidate(start_logits[windows, 0], end_logits[windows, 0])
            odds = null.score - best.score
            if odds > null_score_diff_threshold:
                answer = null.text
            nbest = _insert(null, nbest, n_best_size)
            predictions.null_odds[example.qid] = odds
        predictions.answers[example.qid] = answer
        predictions.spans[example.qid] = best.text
        predictions.nbest[example.qid] = _with_probabilities(nbest)
    return predictions


def _check_finite(examples: Sequence[Example], features: Features, *logits: np.ndarray) -> None:
    for scores in logits:
        real = np.arange(scores.shape[1]) < features.lengths[:, None]
        wrong = (real & ~np.isfinite(scores)).any(axis=1)
        if wrong.any():
            qid = examples[features.examples[wrong.argmax()]].qid
            raise UsageError(f"question {qid}: the model's scores are not finite; its checkpoint has diverged")


class _Spans(NamedTuple):
    """The K best spans of each window, in the order of the text: [N, K] each."""

    scores: np.ndarray
    """-inf where a window has fewer than K."""
    start_logits: np.ndarray
    end_logits: np.ndarray
    char_begins: np.ndarray
    char_ends: np.ndarray


def _best_spans(
    features: Features, start_logits: np.ndarray, end_logits: np.ndarray, count: int, max_answer_length: int
) -> _Spans:
    position = np.arange(int(features.lengths.max()))
    parts = []
    for begin in range(0, len(features), _WINDOWS_AT_ONCE):
        rows = np.arange(begin, min(begin + _WINDOWS_AT_ONCE, len(features)))[:, None]
        owned = (position >= features.own_begins[rows]) & (position < features.own_ends[rows])
        context = (position >= features.context_begins[rows]) & (position < features.lengths[rows] - 1)
        starts, ends, scores = _search(
            np.where(owned, start_logits[rows, position], -np.inf),
            np.where(context, end_logits[rows, position], -np.inf),
            count,
            max_answer_length,
        )
        to_token = features.first_tokens[rows] - features.context_begins[rows]
        start_tokens, end_tokens = (np.where(scores > -np.inf, to_token + place, 0) for place in (starts, ends))
        char_begins, char_ends = features.token_chars[start_tokens, 0], features.token_chars[end_tokens, 1]
        parts.append(_Spans(scores, start_logits[rows, starts], end_logits[rows, ends], char_begins, char_ends))
    return _Spans(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _search(
    starts: np.ndarray, ends: np.ndarray, count: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` best spans of each row, or all where there are fewer.

    Args:
        starts, ends: [B, S], scores of a span's first and last token, -inf where it may not begin or end.

    Returns:
        First token, last token and score of each, [B, K], in the order of the text.
    """
    padded = np.pad(ends, ((0, 0), (0, max_answer_length - 1)), constant_values=-np.inf)
    # reach[b, s, d]: score of the end d tokens after s
    reach = np.lib.stride_tricks.sliding_window_view(padded, max_answer_length, axis=1)
    # The best spans begin among as many tokens with the best span of their own.
    best_starts = np.sort(_largest(starts + reach.max(axis=-1), count), axis=1)
    row = np.arange(len(starts))[:, None]
    scores = (starts[row, best_starts, None] + reach[row, best_starts]).reshape(len(starts), -1)
    best = np.sort(_largest(scores, count), axis=1)
    first = np.take_along_axis(best_starts, best // max_answer_length, axis=1)
    # A span beyond the row's end has the score -inf, and no meaning.
    last = np.minimum(first + best % max_answer_length, starts.shape[1] - 1)
    return first, last, scores[row, best]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest values of each row are, in no order."""
    count = min(count, values.shape[1])
    return np.argpartition(values, values.shape[1] - count, axis=1)[:, -count:]


def _candidates(context: str, spans: _Spans, windows: slice) -> Iterator[_Candidate]:
    """The spans of one question's windows, best first, of equal ones the earlier first."""
    scores, start_logits, end_logits, begins, ends = (array[windows].ravel() for array in spans)
    for place in np.argsort(-scores, kind="stable").tolist():
        if scores[place] == -np.inf:
            return
        # Tokens of byte-level vocabularies begin with the space before the word.
        text = context[begins[place] : ends[place]].strip()
        yield _Candidate(text, float(start_logits[place]), float(end_logits[place]))


def _distinct(candidates: Iterator[_Candidate], count: int) -> list[_Candidate]:
    """The first `count` candidates with different texts."""
    found = {}
    for candidate in candidates:
        found.setdefault(candidate.text, candidate)
        if len(found) == count:
            break
    return list(found.values())


def _null_candidate(start_logits: np.ndarray, end_logits: np.ndarray) -> _Candidate:
    """ "No answer", from the logits of [CLS] in all windows of a question."""
    window = int((start_logits + end_logits).argmin())
    return _Candidate("", float(start_logits[window]), float(end_logits[window]))


def _insert(null: _Candidate, nbest: list[_Candidate], n_best_size: int) -> list[_Candidate]:
    """The `n_best_size` best of both; `null` beyond them where it is not one of them."""
    place = sum(candidate.score >= null.score for candidate in nbest)
    return [*nbest[:place], null, *nbest[place:]][: max(n_best_size, place + 1)]


def _with_probabilities(nbest: Sequence[_Candidate]) -> list[dict]:
    weights = [math.exp(candidate.score - nbest[0].score) for candidate in nbest]
    total = sum(weights)
    return [
        {
            "text": candidate.text,
            "probability": weight / total,
            "start_logit": candidate.start_logit,
            "end_logit": candidate.end_logit,
        }
        for candidate, weight in zip(nbest, weights, strict=True)
    ]


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write predictions.json, nbest_predictions.json and, for v2.0, null_odds.json into `folder`, as published."""
    files = {"predictions.json": predictions.answers, "nbest_predictions.json": predictions.nbest}
    if predictions.null_odds:
        files["null_odds.json"] = predictions.null_odds
    for name, content in files.items():
        write_atomic(folder / name, json.dumps(content, indent=4) + "\n")


# ---------------------------------------------------------------------------------------------------------- evaluation
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: what SQuAD compares of two answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def evaluate(
    examples: Sequence[Example], answers: Mapping[str, str], version_2: bool = False
) -> dict[str, float | int]:
    """Exact match and F1 as SQuAD's official scripts compute them, in percent, under their names.

    A question that is not in `answers` scores 0 (v1.1's rule; v2.0's script has none, it stops).

    Returns:
        v1.1: exact_match, f1. v2.0: exact, f1, total, and HasAns_exact, ..., NoAns_total for the questions that have an
        answer and for those that have none, where there are any.

    Raises:
        UsageError: a question whose answers the file keeps to itself.
    """
    scores = _score_all(examples, answers, version_2)
    if not version_2:
        return dict(zip(("exact_match", "f1"), _percent(scores), strict=True))
    impossible = np.array([example.is_impossible for example in examples])
    result = {}
    for prefix, group in (("", scores), ("HasAns_", scores[~impossible]), ("NoAns_", scores[impossible])):
        if len(group):
            exact, f1 = _percent(group)
            result |= {f"{prefix}exact": exact, f"{prefix}f1": f1, f"{prefix}total": len(group)}
    return result


def best_null_thresholds(examples: Sequence[Example], predictions: Predictions) -> dict[str, float]:
    """The `null_score_diff_threshold` that would have scored best, and its score, for each of the two scores of v2.0.

    Returns:
        best_exact, best_f1 in percent, and best_exact_thresh, best_f1_thresh in logits: a question with null odds above
        it has no answer. Below all of them: no question has one.
    """
    answered = _score_all(examples, predictions.spans, version_2=True)
    unanswered = _score_all(examples, {example.qid: "" for example in examples}, version_2=True)
    odds = np.array([predictions.null_odds[example.qid] for example in examples])
    order = np.argsort(odds, kind="stable")
    odds = odds[order]
    # Row k: the k questions with the lowest odds are answered; those of equal odds are so together.
    gains = (answered - unanswered)[order]
    totals = unanswered.sum(axis=0) + np.concatenate([np.zeros((1, 2)), np.cumsum(gains, axis=0)])
    thresholds = np.concatenate([odds[:1] - 1, odds])
    last_of_equals = np.append(thresholds[1:] != thresholds[:-1], True)
    result = {}
    for column, name in enumerate(("exact", "f1")):
        best = int(np.where(last_of_equals, totals[:, column], -np.inf).argmax())
        result[f"best_{name}"] = float(100 * totals[best, column] / len(examples))
        result[f"best_{name}_thresh"] = float(thresholds[best])
    return result


def _percent(scores: np.ndarray) -> list[float]:
    return (100 * scores.mean(axis=0)).tolist()


def _score_all(examples: Sequence[Example], answers: Mapping[str, str], version_2: bool) -> np.ndarray:
    """[questions, 2], exact match and F1 of each, 0 to 1: each the best over the question's answers."""
    scores = np.zeros((len(examples), 2))
    for example, row in zip(examples, scores, strict=True):
        if not example.answers and not example.is_impossible:
            raise UsageError(f"question {example.qid}: its file holds no answers, so there is nothing to compare with")
        golds = [normalize(answer.text) for answer in example.answers]
        if version_2:
            golds = [gold for gold in golds if gold] or [""]
        if example.qid in answers:
            answer = normalize(answers[example.qid])
            row[:] = any(answer == gold for gold in golds), max(_f1(answer, gold, version_2) for gold in golds)
    return scores


def _f1(answer: str, gold: str, version_2: bool) -> float:
    """Harmonic mean of precision and recall over the words of two normalized texts."""
    if version_2 and not (answer and gold):
        return float(answer == gold)
    words, gold_words = answer.split(), gold.split()
    common = (Counter(words) & Counter(gold_words)).total()
    return 2 * common / (len(words) + len(gold_words)) if common else 0.0
