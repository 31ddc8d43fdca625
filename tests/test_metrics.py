"""The metrics of GLUE against hand-worked cases and their definitions written out."""

import json
import math
from fractions import Fraction
from statistics import correlation

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics import METRICS, accuracy, evaluate, f1, matthews_correlation, pearson, spearman

PREDICTED = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 0])
ACTUAL = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1, 0])
# True positives 4, true negatives 3, false positives 1, false negatives 2.


def test_accuracy_f1_and_matthews_of_a_hand_worked_table():
    assert accuracy(PREDICTED, ACTUAL) == pytest.approx(7 / 10)
    assert f1(PREDICTED, ACTUAL) == pytest.approx(8 / 11)
    assert matthews_correlation(PREDICTED, ACTUAL) == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))


def test_f1_looks_at_class_1_only():
    assert f1(1 - PREDICTED, 1 - ACTUAL) == pytest.approx(6 / 9)


def test_matthews_is_minus_one_for_the_opposite_and_survives_large_counts():
    many = np.tile(ACTUAL, 40_000)
    assert matthews_correlation(many, many) == 1
    assert matthews_correlation(1 - many, many) == -1


def test_spearman_gives_ties_the_mean_of_their_ranks():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, sums of squares 4.5 and 5.
    assert spearman(np.array([1.0, 2.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )


def test_pearson_of_a_hand_worked_case():
    # Deviations -1, 0, 1 and -2, 1, 1: 3 / sqrt(2 * 6).
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([0.0, 3.0, 3.0])) == pytest.approx(3 / math.sqrt(12))


@pytest.mark.parametrize("name", ["f1", "matthews_correlation"])
def test_never_predicting_class_1_scores_0(name):
    assert METRICS[name](np.zeros(10, int), ACTUAL) == 0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("value", [2.7, 0.1])  # the mean of a constant need not be that constant in floating point
def test_constant_scores_correlate_with_nothing(name, value):
    constant, scores = np.full(1499, value, np.float32), np.linspace(0, 5, 1499, dtype=np.float32)
    assert METRICS[name](constant, scores) == 0
    assert METRICS[name](scores, constant) == 0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_counting_metrics_equal_their_definitions(pairs):
    predictions, labels = np.array(pairs).T
    hits = sum(p == y == 1 for p, y in pairs)
    precision = Fraction(hits, sum(predictions.tolist())) if predictions.any() else Fraction(0)
    recall = Fraction(hits, sum(labels.tolist())) if labels.any() else Fraction(0)
    harmonic = 2 * precision * recall / (precision + recall) if hits else 0
    assert f1(predictions, labels) == pytest.approx(float(harmonic))
    # Matthews' coefficient is Pearson's of the two indicator vectors.
    assert matthews_correlation(predictions, labels) == pytest.approx(pearson(predictions, labels), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_correlations_equal_the_standard_library_s(pairs):
    x, y = np.array(pairs, np.float64).T
    if len(set(x)) == 1 or len(set(y)) == 1:
        return
    assert pearson(x, y) == pytest.approx(correlation(x.tolist(), y.tolist()), abs=1e-12)
    ranks = [[sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values] for values in (x, y)]
    assert spearman(x, y) == pytest.approx(correlation(*ranks), abs=1e-12)


def test_evaluate_gives_plain_floats_in_the_order_asked_for():
    values = evaluate(("f1", "accuracy"), PREDICTED, ACTUAL)
    assert list(values) == ["f1", "accuracy"]
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3, 1), (3, 1)), ((0,), (0,))])
def test_evaluate_refuses_arrays_that_do_not_match(shapes):
    with pytest.raises(ValueError, match="of one length"):
        evaluate(("accuracy",), *(np.zeros(shape) for shape in shapes))
