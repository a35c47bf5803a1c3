"""Classification by text: labels in answers, and F1 averaged over decisions (micro) or over labels (macro)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aifactory_train.metrics.answers import normalise


def labels_of(text: str, separator: str | None = None) -> frozenset[str]:
    """The normalised labels in a text: all of it is one, or with a ``separator`` its parts are."""
    parts = text.split(separator) if separator else [text]
    return frozenset(label for part in parts if (label := normalise(part)))


def accuracy(answer: str, expected: str, separator: str | None = None) -> float:
    """1.0 if the answer gives the expected labels and no other, else 0.0 (scikit-learn's subset accuracy)."""
    return float(labels_of(answer, separator) == labels_of(expected, separator))


def micro_statistics(answers: Sequence[str], expected: Sequence[str], separator: str | None = None) -> np.ndarray:
    """Labels that are right, expected and given, float64 ``[rows, 3]``. An invented label counts as given."""
    rows = []
    for answer, wanted in zip(answers, expected, strict=True):
        have, want = labels_of(answer, separator), labels_of(wanted, separator)
        rows.append([len(have & want), len(want), len(have)])
    return np.asarray(rows, dtype=np.float64).reshape(-1, 3)


def macro_statistics(answers: Sequence[str], expected: Sequence[str], separator: str | None = None) -> np.ndarray:
    """The same for each expected label, float64 ``[rows, 3 * labels]`` in the order right, expected, given of each
    label.

    Labels are those that some row expects: an answer that invents one loses the expected label, it does not add a
    class.
    """
    wanted = [labels_of(text, separator) for text in expected]
    place = {label: i for i, label in enumerate(sorted(frozenset().union(*wanted)))}
    out = np.zeros((len(wanted), 3 * len(place)))
    for row, (answer, want) in enumerate(zip(answers, wanted, strict=True)):
        have = labels_of(answer, separator)
        for label in want:
            out[row, 3 * place[label] + 1] = 1
            out[row, 3 * place[label]] = label in have
        for label in have & place.keys():
            out[row, 3 * place[label] + 2] = 1
    return out


def micro_value(sums: np.ndarray) -> np.ndarray:
    """F1 of summed ``[..., 3]``: ``2 right / (expected + given)``, 0 where there is neither."""
    below = sums[..., 1] + sums[..., 2]
    return np.divide(2 * sums[..., 0], below, out=np.zeros(np.shape(below)), where=below > 0)


def macro_value(sums: np.ndarray) -> np.ndarray:
    """Mean F1 over the labels that are expected at least once, of summed ``[..., 3 * labels]``."""
    each = micro_value(sums.reshape(*sums.shape[:-1], -1, 3))
    there = sums[..., 1::3] > 0
    return np.divide((each * there).sum(-1), there.sum(-1), out=np.zeros(there.shape[:-1]), where=there.any(-1))
