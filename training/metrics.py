"""The metrics of GLUE's tasks, as fractions (GLUE prints them times 100).

Each takes predictions [N] and labels [N]. Where a metric is undefined because one of them is constant, it is 0: such
predictions tell nothing about the labels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions that equal their labels."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1: 2 TP / (2 TP + FP + FN)."""
    true_positive, _, false_positive, false_negative = _binary_counts(predictions, labels)
    denominator = 2 * true_positive + false_positive + false_negative
    return 2 * true_positive / denominator if denominator else 0.0


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient of classes 0 and 1 (Matthews, 1975): from -1 to 1."""
    tp, tn, fp, fn = _binary_counts(predictions, labels)
    denominator = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(denominator) if denominator else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's linear correlation: covariance over the product of the standard deviations."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predictions, labels))
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of their ranks."""
    return pearson(_average_ranks(predictions), _average_ranks(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearman": spearman,
}


def evaluate(names: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The named metrics of predictions [N] against labels [N]."""
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be of one length, above 0")
    return {name: METRICS[name](predictions, labels) for name in names}


def _binary_counts(predictions: np.ndarray, labels: np.ndarray) -> tuple[int, int, int, int]:
    """True positives, true negatives, false positives, false negatives; class 1 is the positive one."""
    predicted, actual = predictions == 1, labels == 1
    # Python's integers: the product of four counts overflows 64 bits.
    return tuple(
        int(np.count_nonzero(both))
        for both in (predicted & actual, ~predicted & ~actual, predicted & ~actual, ~predicted & actual)
    )


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [N] from 1."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
