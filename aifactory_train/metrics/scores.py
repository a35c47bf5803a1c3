"""Figures of a classifier that gives probabilities: AUROC, expected calibration error, and what is chosen on held-out
rows (a temperature, a threshold for each label).

Statistics of calibration and F1 add up over rows, as those of answers do (:mod:`~aifactory_train.metrics.registry`).
A rank statistic does not; its resamples are weights of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aifactory_train.metrics import bootstrap

#: Bins of equal width over the confidence (Guo et al. 2017, arXiv 1706.04599, section 2).
BINS = 15
#: Resamples whose weights are held at once.
_AT_ONCE = 200


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 ``[rows, labels]`` of logits of the same shape."""
    shifted = np.asarray(logits, dtype=np.float64) / temperature
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64, of logits of any shape; never overflows."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64) / temperature))


# ---- AUROC


def auroc_of(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the receiver operating characteristic of one label, for each line of weights: float64 ``[samples]``.

    scores ``[rows]``, truth bool ``[rows]``, weights ``[samples, rows]``. The share of pairs of a row with and a row
    without the label in which the first has the higher score; equal scores count half. NaN where there is no such pair.
    """
    order = np.argsort(scores, kind="stable")
    sorted_scores, right = scores[order], truth[order]
    begins = np.flatnonzero(np.diff(sorted_scores, prepend=np.nan) != 0)
    good = np.add.reduceat(weights[:, order] * right, begins, axis=1)
    bad = np.add.reduceat(weights[:, order] * ~right, begins, axis=1)
    below = np.cumsum(bad, axis=1) - bad
    pairs = good.sum(axis=1) * bad.sum(axis=1)
    found = (good * (below + 0.5 * bad)).sum(axis=1)
    return np.divide(found, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def auroc(scores: np.ndarray, truth: np.ndarray) -> tuple[float | None, np.ndarray | None]:
    """(mean AUROC over the labels that some rows have and some do not, its bootstrap replicates).

    scores, truth ``[rows, labels]``. A resample in which a label has no pair leaves that label out; replicates are None
    for fewer than two rows, or where a resample has no label left.
    """
    rows = len(scores)
    judged = [k for k in range(truth.shape[1]) if 0 < int(truth[:, k].sum()) < rows]
    if not judged:
        return None, None
    one = np.ones((1, rows))
    value = float(np.mean([auroc_of(scores[:, k], truth[:, k], one)[0] for k in judged]))
    drawn = []
    for begin in range(0, bootstrap.BOOTSTRAP_SAMPLES, _AT_ONCE):
        weights = bootstrap.resamples(rows)[begin : begin + _AT_ONCE]
        each = np.stack([auroc_of(scores[:, k], truth[:, k], weights) for k in judged])
        there = ~np.isnan(each)
        total, count = np.where(there, each, 0.0).sum(axis=0), there.sum(axis=0)
        drawn.append(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))
    found = np.concatenate(drawn)
    return value, None if rows < 2 or np.isnan(found).any() else found


# ---- calibration


def calibration_statistics(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 ``[rows, 3 * BINS]``: confidence, hits and number of predictions of each row in each bin.

    confidence, right ``[rows]`` (the chosen label) or ``[rows, labels]`` (each label is a prediction of its own).
    """
    given, hits = (np.asarray(x, dtype=np.float64).reshape(len(confidence), -1) for x in (confidence, right))
    place = np.minimum((given * BINS).astype(np.int64), BINS - 1)
    out = np.zeros((len(given), 3, BINS))
    rows = np.broadcast_to(np.arange(len(given))[:, None], place.shape)
    for k, values in enumerate((given, hits, np.ones_like(given))):
        np.add.at(out[:, k], (rows, place), values)
    return out.reshape(len(given), 3 * BINS)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error of summed statistics ``[..., 3 * BINS]``: the mean distance of confidence and hits
    over the bins, weighted by their predictions; NaN without any.
    """
    confidence, hits, count = np.split(sums, 3, axis=-1)
    total = count.sum(-1)
    return np.divide(np.abs(confidence - hits).sum(-1), total, out=np.full(np.shape(total), np.nan), where=total > 0)


def fit_temperature(loss: Callable[[float], float]) -> float:
    """The temperature between 0.05 and 20 with the smallest ``loss``, by golden-section search over its logarithm (the
    likelihood of scaled logits is concave in the inverse temperature, so there is one minimum).
    """
    low, high, golden = float(np.log(0.05)), float(np.log(20.0)), (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = loss(float(np.exp(a))), loss(float(np.exp(b)))
    for _ in range(60):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = loss(float(np.exp(a)))
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = loss(float(np.exp(b)))
    return float(np.exp((low + high) / 2))


def best_threshold(probability: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the highest F1 on these rows (``[rows]`` each), in the middle between two probabilities; 0.5
    where no row has the label. Of several the one nearest to 0.5.
    """
    if not truth.any():
        return 0.5
    order = np.argsort(-probability, kind="stable")
    sorted_p, hits = probability[order], np.cumsum(truth[order])
    taken = np.arange(1, len(sorted_p) + 1)
    ends = np.flatnonzero(np.diff(sorted_p, append=-np.inf) != 0)  # rows of one probability are taken together
    f1 = 2 * hits[ends] / (taken[ends] + truth.sum())
    following = np.append(sorted_p, 0.0)[ends + 1]
    middle = (sorted_p[ends] + following) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(middle[best[np.argmin(np.abs(middle[best] - 0.5))]])


# ---- F1 of decisions


def label_statistics(given: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 ``[rows, 3 * labels]``: right, expected, given of each label; both bool ``[rows, labels]``.

    What :func:`~aifactory_train.metrics.labels.macro_value` takes.
    """
    return np.stack([given & truth, truth, given], axis=2).astype(np.float64).reshape(len(given), -1)


def micro_sums(statistics: np.ndarray) -> np.ndarray:
    """``[rows, 3]`` over all labels, of :func:`label_statistics`."""
    return statistics.reshape(len(statistics), -1, 3).sum(axis=1)
