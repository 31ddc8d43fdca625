"""From scores to SQuAD's answers, their files and their scores: against the rules written another way."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from squad_factory import write_vocabulary

from data.squad import Answer, Example
from data.squad_answers import (
    Predictions,
    best_null_thresholds,
    evaluate,
    normalize,
    predict_answers,
    write_predictions,
)
from data.squad_windows import encode
from data.tokenization import load_tokenizer
from training.errors import UsageError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt"))


def example(context: str, *answers: str, qid: str = "q1", question: str = "who") -> Example:
    return Example(qid, question, context, tuple(Answer(text, context.index(text)) for text in answers), not answers)


def scores_of(features, high: dict[tuple[int, int, int], float]):
    """Start and end logits, 0 but for the given (window, first token, last token), half of their score on each."""
    shape = len(features), int(features.lengths.max())
    start_logits, end_logits = np.zeros(shape), np.zeros(shape)
    for (window, first, last), score in high.items():
        start_logits[window, first] += score / 2
        end_logits[window, last] += score / 2
    return start_logits, end_logits


def texts(predictions: Predictions, qid: str = "q1") -> list[str]:
    return [entry["text"] for entry in predictions.nbest[qid]]


# ------------------------------------------------------------------------------------------------------------- answers
def test_an_answer_is_cut_out_of_the_original_text(tokenizer):
    context = "Über  the EIFFEL   Tower"
    features = encode([example(context)], tokenizer)
    tower = int(features.lengths[0]) - 2
    predictions = predict_answers([example(context)], features, *scores_of(features, {(0, tower - 2, tower): 10}))
    assert predictions.answers == predictions.spans == {"q1": "the EIFFEL   Tower"}


def test_the_answers_of_all_windows_compete(tokenizer):
    context = " ".join(LETTERS)
    features = encode([example(context)], tokenizer, max_seq_length=16, doc_stride=6)
    assert len(features) == 4
    high = {(1, 8, 9): 5, (2, 7, 9): 7, (0, 3, 3): 6}
    predictions = predict_answers([example(context)], features, *scores_of(features, high))
    assert texts(predictions)[:3] == ["q r s", "a", "l m"]


def test_a_span_counts_only_in_the_window_that_owns_its_first_token(tokenizer):
    context = " ".join(LETTERS)
    features = encode([example(context)], tokenizer, max_seq_length=16, doc_stride=6)
    # Token `l` is the last of window 0, where nothing follows it, and amid window 1.
    assert features.own_ends[0] <= 14 < features.lengths[0]
    predictions = predict_answers([example(context)], features, *scores_of(features, {(0, 14, 14): 9, (1, 9, 9): 1}))
    assert "l" not in texts(predictions)[:1]
    # As a last token it counts wherever it is.
    owned = int(features.own_ends[0]) - 1
    predictions = predict_answers([example(context)], features, *scores_of(features, {(0, owned, 14): 9}))
    assert predictions.answers["q1"].endswith("l")


def test_question_special_tokens_and_padding_are_no_answers(tokenizer):
    examples = [example("paris"), example("the eiffel tower", qid="q2", question="who built paris")]
    features = encode(examples, tokenizer)
    shape = len(features), int(features.lengths.max()) + 3
    logits = np.full(shape, 9.0)
    for row in range(len(features)):
        logits[row, features.context_begins[row] : features.lengths[row] - 1] = -9
    predictions = predict_answers(examples, features, logits, logits)
    assert texts(predictions) == ["paris"]
    assert set(texts(predictions, "q2")) == {"the", "eiffel", "tower", "the eiffel", "eiffel tower", "the eiffel tower"}


def test_answers_are_no_longer_than_asked_for(tokenizer):
    features = encode([example("a b c d e")], tokenizer)
    scores = scores_of(features, {(0, 3, 7): 9})
    for length in range(1, 6):
        found = texts(predict_answers([example("a b c d e")], features, *scores, max_answer_length=length))
        assert max(len(text.split()) for text in found) == length
        assert ("a b c d e" in found) == (length == 5)


def test_a_text_that_occurs_twice_is_one_answer_with_the_better_score(tokenizer):
    features = encode([example("paris in paris")], tokenizer)
    predictions = predict_answers(
        [example("paris in paris")], features, *scores_of(features, {(0, 3, 3): 4, (0, 5, 5): 6})
    )
    assert texts(predictions)[0] == "paris"
    assert predictions.nbest["q1"][0]["start_logit"] == 3
    assert len(set(texts(predictions))) == len(texts(predictions))


def answers_by_hand(features, rows, context, start_logits, end_logits, n_best_size, max_answer_length, null):
    """All spans of a question's windows, one at a time; `null` None for v1.1."""
    best = {}
    for row in rows:
        to_token = features.first_tokens[row] - features.context_begins[row]
        for first in range(features.own_begins[row], features.own_ends[row]):
            for last in range(first, min(first + max_answer_length, features.lengths[row] - 1)):
                text = context[features.token_chars[first + to_token][0] : features.token_chars[last + to_token][1]]
                entry = (
                    start_logits[row, first] + end_logits[row, last],
                    start_logits[row, first],
                    end_logits[row, last],
                )
                best[text] = max(entry, best.get(text, entry))
    ranked = sorted(best.items(), key=lambda item: -item[1][0])[:n_best_size]
    odds = None
    if null is not None:
        odds = null[0] - ranked[0][1][0]
        with_null = sorted([*ranked, ("", null)], key=lambda item: -item[1][0])
        ranked = with_null[:n_best_size]
        if "" not in dict(ranked):
            ranked.append(("", null))
    return ranked, odds


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    words=st.lists(st.integers(1, 26), min_size=1, max_size=4),
    room=st.integers(1, 30),
    doc_stride=st.integers(1, 12),
    n_best_size=st.integers(1, 30),
    max_answer_length=st.integers(1, 30),
    version_2=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.0, 2.0]),
)
def test_answers_are_the_best_of_all_spans(
    tokenizer, seed, words, room, doc_stride, n_best_size, max_answer_length, version_2, threshold
):
    rng = np.random.default_rng(seed)
    # No text occurs twice in a context.
    examples = [example(" ".join(rng.permutation(list(LETTERS))[:n]), qid=f"q{i}") for i, n in enumerate(words)]
    features = encode(examples, tokenizer, max_seq_length=room + 4, doc_stride=doc_stride)
    start_logits, end_logits = rng.normal(size=(2, len(features), features.lengths.max() + 2))
    for row, length in enumerate(features.lengths):
        start_logits[row, length:] = end_logits[row, length:] = np.nan  # padding is not read
    predictions = predict_answers(
        examples,
        features,
        start_logits,
        end_logits,
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
        version_2=version_2,
        null_score_diff_threshold=threshold,
    )
    for number, one in enumerate(examples):
        rows = [row for row in range(len(features)) if features.examples[row] == number]
        nulls = [(start_logits[row, 0] + end_logits[row, 0], start_logits[row, 0], end_logits[row, 0]) for row in rows]
        ranked, odds = answers_by_hand(
            features,
            rows,
            one.context,
            start_logits,
            end_logits,
            n_best_size,
            max_answer_length,
            min(nulls) if version_2 else None,
        )
        found = predictions.nbest[one.qid]
        assert [(entry["text"], entry["start_logit"], entry["end_logit"]) for entry in found] == [
            (text, start, end) for text, (_, start, end) in ranked
        ]
        total = sum(math.exp(score) for _, (score, _, _) in ranked)
        assert [entry["probability"] for entry in found] == pytest.approx(
            [math.exp(score) / total for _, (score, _, _) in ranked]
        )
        if version_2:
            assert predictions.null_odds[one.qid] == pytest.approx(odds)
            assert predictions.answers[one.qid] == ("" if odds > threshold else predictions.spans[one.qid])
        else:
            assert predictions.answers[one.qid] == predictions.spans[one.qid] == ranked[0][0]
    assert bool(predictions.null_odds) == version_2


def test_no_answer_takes_the_window_that_believes_in_it_least(tokenizer):
    context = " ".join(LETTERS)
    features = encode([example(context)], tokenizer, max_seq_length=16, doc_stride=6)
    scores = scores_of(features, {(0, 0, 0): 8, (1, 0, 0): 6, (2, 0, 0): 4, (3, 0, 0): 5, (1, 9, 9): 3})
    options = {"version_2": True, "null_score_diff_threshold": 0.5}
    predictions = predict_answers([example(context)], features, *scores, **options)
    assert predictions.null_odds == {"q1": 1.0}
    assert predictions.answers == {"q1": ""}
    assert predictions.spans == {"q1": "m"}
    assert texts(predictions)[:2] == ["", "m"]
    # Above the threshold, not at it.
    options["null_score_diff_threshold"] = 1.0
    assert predict_answers([example(context)], features, *scores, **options).answers == {"q1": "m"}


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_that_are_not_finite_name_their_question(wrong, tokenizer):
    examples = [example("paris"), example("tower", qid="q2")]
    features = encode(examples, tokenizer)
    start_logits, end_logits = scores_of(features, {})
    end_logits[1, 2] = wrong
    with pytest.raises(UsageError, match="question q2: .* not finite"):
        predict_answers(examples, features, start_logits, end_logits)


def test_scores_of_half_precision_rank_as_they_are(tokenizer):
    features = encode([example("a b")], tokenizer)
    # Sums beyond 65,504 and differences below a sum's spacing.
    start_logits = np.array([[0, 0, 0, 40_000, 0, 0]], np.float16)
    end_logits = np.array([[0, 0, 0, 40_000, 40_032, 0]], np.float16)
    assert predict_answers([example("a b")], features, start_logits, end_logits).answers == {"q1": "a b"}


def test_gold_positions_as_scores_give_a_perfect_score(tokenizer):
    context = "The Eiffel Tower was built between 1887 and 1889 by Gustave Eiffel in Paris."
    answers = ["1887", "Gustave Eiffel", "Paris", "The Eiffel Tower", "built between 1887 and 1889"]
    examples = [example(context, answer, qid=f"q{number}") for number, answer in enumerate(answers)]
    features = encode(examples, tokenizer, max_seq_length=13, doc_stride=5)
    assert len(features) > 2 * len(examples)
    held = {
        (row, first, last): 9.0
        for row, (first, last) in enumerate(zip(features.start_positions, features.end_positions, strict=True))
        if first
    }
    predictions = predict_answers(examples, features, *scores_of(features, held))
    assert list(predictions.answers.values()) == answers
    assert evaluate(examples, predictions.answers) == {"exact_match": 100, "f1": 100}


# --------------------------------------------------------------------------------------------------------------- files
def test_files_are_as_published(tokenizer, tmp_path):
    examples = [example("in paris"), example("tower", qid="q2")]
    features = encode(examples, tokenizer)
    scores = scores_of(features, {(0, 3, 4): 6, (1, 0, 0): 2})
    predictions = predict_answers(examples, features, *scores, version_2=True)
    write_predictions(tmp_path, predictions)
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert read["predictions.json"] == {"q1": "in paris", "q2": ""}
    assert read["null_odds.json"] == {"q1": -6, "q2": 2}
    assert list(read["nbest_predictions.json"]) == ["q1", "q2"]
    first = read["nbest_predictions.json"]["q1"][0]
    assert list(first) == ["text", "probability", "start_logit", "end_logit"]
    assert (first["text"], first["start_logit"], first["end_logit"]) == ("in paris", 3, 3)
    assert read == {
        "predictions.json": predictions.answers,
        "nbest_predictions.json": predictions.nbest,
        "null_odds.json": predictions.null_odds,
    }


def test_version_1_has_no_file_of_null_odds(tokenizer, tmp_path):
    features = encode([example("in paris")], tokenizer)
    write_predictions(tmp_path, predict_answers([example("in paris")], features, *scores_of(features, {})))
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.json", "nbest_predictions.json"}


# ---------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a\tcat,  an\n apple ", "cat apple"),
        ("theatre another banana", "theatre another banana"),
        ("U.S.A.", "usa"),
        ("A.", ""),
        ("the-end", "theend"),  # punctuation goes before articles
        ("a–z", "–z"),  # a dash outside ASCII stays, and ends a word
        ("l'été, «the»", "lété « »"),
        ("_the_", ""),
        ("", ""),
    ],
)
def test_normalized_texts_worked_by_hand(text, normalized):
    assert normalize(text).split() == normalized.split()
    assert normalize(text) == " ".join(normalized.split())


@pytest.mark.parametrize(
    ("answers", "predicted", "exact", "f1"),
    [
        (["the Eiffel Tower"], "Eiffel tower.", 1, 1),
        (["Eiffel Tower"], "Tower", 0, 2 / 3),  # precision 1, recall 1/2
        (["Tower"], "the old iron tower", 0, 1 / 2),  # precision 1/3, recall 1
        (["Tower", "iron tower"], "the old iron tower", 0, 4 / 5),  # the second: precision 2/3, recall 1
        (["to be or not to be"], "to to to", 0, 4 / 9),  # two common words: precision 2/3, recall 1/3
        (["1889"], "1887", 0, 0),
        (["1889"], "", 0, 0),
        (["1887", "1889"], "1889", 1, 1),
        (["tower iron"], "iron tower", 0, 1),  # the order of words does not count for F1
    ],
)
@pytest.mark.parametrize("version_2", [False, True])
def test_scores_worked_by_hand(answers, predicted, exact, f1, version_2):
    one = Example("q1", "what", " ".join(answers), tuple(Answer(text, 0) for text in answers), False)
    result = evaluate([one], {"q1": predicted}, version_2)
    names = ("exact", "f1") if version_2 else ("exact_match", "f1")
    assert [result[name] for name in names] == pytest.approx([100 * exact, 100 * f1])


def test_the_two_versions_differ_where_nothing_is_left_of_a_text():
    articles = Example("q1", "what", "the a x", (Answer("the", 0),), False)
    assert evaluate([articles], {"q1": "a"}) == {"exact_match": 100, "f1": 0}
    result = evaluate([articles], {"q1": "a"}, version_2=True)
    assert (result["exact"], result["f1"]) == (100, 100)
    both = articles._replace(answers=(Answer("the", 0), Answer("x", 6)))
    assert evaluate([both], {"q1": "a"})["exact_match"] == 100
    # v2.0 drops an answer of which nothing is left, where there is another.
    assert evaluate([both], {"q1": "a"}, version_2=True)["exact"] == 0


def test_version_2_scores_the_two_kinds_of_questions_apart():
    examples = [
        example("eiffel tower", "eiffel tower", qid="q1"),
        example("eiffel tower", "tower", qid="q2"),
        example("eiffel tower", qid="q3"),
        example("eiffel tower", qid="q4"),
        example("eiffel tower", qid="q5"),
    ]
    answers = {"q1": "tower", "q2": "the tower", "q3": "", "q4": "tower", "q5": ""}
    assert evaluate(examples, answers, version_2=True) == pytest.approx(
        {
            **{"exact": 60, "f1": 100 * (2 / 3 + 3) / 5, "total": 5},
            **{"HasAns_exact": 50, "HasAns_f1": 100 * (2 / 3 + 1) / 2, "HasAns_total": 2},
            **{"NoAns_exact": 200 / 3, "NoAns_f1": 200 / 3, "NoAns_total": 3},
        }
    )
    assert not {"NoAns_exact", "HasAns_exact"} <= evaluate(examples[:2], answers, version_2=True).keys()


def test_a_question_that_was_not_answered_scores_nothing():
    examples = [example("paris", "paris"), example("paris", "paris", qid="q2")]
    assert evaluate(examples, {"q2": "paris", "another": "x"}) == {"exact_match": 50, "f1": 50}


def test_questions_without_known_answers_cannot_be_scored():
    with pytest.raises(UsageError, match="question q1: its file holds no answers"):
        evaluate([Example("q1", "who", "paris", (), False)], {"q1": "paris"})


def words_by_hand(text: str) -> list[str]:
    """Normalization without a regular expression: runs of letters and digits, of which articles become a space."""
    kept = [letter for letter in text.lower() if not (33 <= ord(letter) < 127) or letter.isalnum()]
    runs = ("".join(run) for _, run in groupby(kept, key=str.isalnum))
    return "".join(" " if run in {"a", "an", "the"} else run for run in runs).split()


def scores_by_hand(golds: list[str], predicted: str, version_2: bool) -> tuple[int, Fraction]:
    words, listed = words_by_hand(predicted), [words_by_hand(gold) for gold in golds]
    if version_2:
        listed = [gold for gold in listed if gold] or [[]]
    harmonic = []
    for gold in listed:
        rest, common = list(gold), 0
        for word in words:
            if word in rest:
                rest.remove(word)
                common += 1
        if common:
            precision, recall = Fraction(common, len(words)), Fraction(common, len(gold))
            harmonic.append(2 / (1 / precision + 1 / recall))
        else:
            harmonic.append(Fraction(version_2 and words == gold == []))
    return int(words in listed), max(harmonic)


phrases = st.one_of(
    st.lists(
        st.sampled_from(
            ["the", "The", "an", "a", "A.", "Eiffel", "tower", "Tower,", "1,887", "of", "–", "é", "İ", "\x1f"]
        ),
        max_size=8,
    ).map(" ".join),
    st.text(alphabet="atheAn1 .,-–_'«é\u0301\u00a0\u200b\n", max_size=16),
    st.text(max_size=8),
)


@st.composite
def perturbed(draw, text: str) -> str:
    """`text` with words moved, dropped or put in, or another text."""
    words = text.split(" ")
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(words)))
        change = draw(st.sampled_from(["drop", "put in", "upper", "swap"]))
        if change == "put in":
            words.insert(place, draw(phrases))
        elif change == "drop":
            del words[place : place + 1]
        elif change == "upper":
            words[place : place + 1] = [word.upper() for word in words[place : place + 1]]
        else:
            words[:place] = words[:place][::-1]
    return " ".join(words)


@st.composite
def answered_questions(draw):
    """Questions with 1 to 3 answers or none, and an answer to each."""
    questions = []
    for number in range(draw(st.integers(1, 4))):
        golds = draw(st.lists(phrases, max_size=3))
        predicted = draw(perturbed(golds[0]) if golds and draw(st.booleans()) else phrases)
        answers = tuple(Answer(text, 0) for text in golds)
        questions.append((Example(f"q{number}", "", "", answers, not golds), golds, predicted))
    return questions


@settings(max_examples=400, deadline=None)
@given(questions=answered_questions())
def test_scores_are_those_of_an_independent_implementation(questions):
    examples = [one for one, _, _ in questions]
    answers = {one.qid: predicted for one, _, predicted in questions}
    result = evaluate(examples, answers, version_2=True)
    by_hand = [scores_by_hand(golds, predicted, True) for _, golds, predicted in questions]
    for prefix, chosen in (("", {True, False}), ("HasAns_", {False}), ("NoAns_", {True})):
        group = [scores for one, scores in zip(examples, by_hand, strict=True) if one.is_impossible in chosen]
        assert result.get(f"{prefix}total", 0) == len(group)
        for column, name in enumerate(("exact", "f1")):
            if group:
                mean = 100 * sum(Fraction(scores[column]) for scores in group) / len(group)
                assert result[prefix + name] == pytest.approx(float(mean))
    questions = [question for question in questions if question[1]]
    if questions:
        result = evaluate([one for one, _, _ in questions], answers)
        by_hand = [scores_by_hand(golds, predicted, False) for _, golds, predicted in questions]
        means = [100 * sum(Fraction(scores[column]) for scores in by_hand) / len(by_hand) for column in (0, 1)]
        assert [result["exact_match"], result["f1"]] == pytest.approx([float(mean) for mean in means])


@settings(max_examples=200, deadline=None)
@given(questions=answered_questions(), data=st.data())
def test_best_thresholds_are_those_that_score_best(questions, data):
    examples = [one for one, _, _ in questions]
    spans = {one.qid: predicted for one, _, predicted in questions}
    odds = {one.qid: float(data.draw(st.integers(-3, 3))) for one in examples}
    best = best_null_thresholds(examples, Predictions({}, spans, {}, odds))

    def result_at(threshold: float) -> dict:
        answers = {qid: "" if odds[qid] > threshold else span for qid, span in spans.items()}
        return evaluate(examples, answers, version_2=True)

    for name in ("exact", "f1"):
        highest = max(result_at(threshold)[name] for threshold in [-4, *odds.values()])
        assert best[f"best_{name}"] == pytest.approx(highest)
        assert result_at(best[f"best_{name}_thresh"])[name] == pytest.approx(highest)
