"""Figures of classifiers: equal to scikit-learn's where it is installed, and to formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest

from aifactory_train.evaluation.heads import Judgement
from aifactory_train.metrics import scores


def some(rows: int = 80, labels: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits with ties, and one target a row."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, labels, rows)
    logits = np.round(rng.normal(size=(rows, labels)) + 1.5 * np.eye(labels)[targets], 1)
    return logits, targets


def test_figures_equal_those_of_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    logits, targets = some()
    one = Judgement(logits, targets).figures()
    probability = scores.softmax(logits)
    assert one["accuracy"] == pytest.approx(sk.accuracy_score(targets, logits.argmax(1)))
    assert one["macro_f1"] == pytest.approx(sk.f1_score(targets, logits.argmax(1), average="macro"))
    assert one["auroc"] == pytest.approx(sk.roc_auc_score(targets, probability, multi_class="ovr"))
    assert one["loss"] == pytest.approx(sk.log_loss(targets, probability))
    truth = np.random.default_rng(1).random((80, 4)) < 0.4
    many = Judgement(logits, truth).figures()
    assert many["micro_f1"] == pytest.approx(sk.f1_score(truth, logits >= 0, average="micro"))
    assert many["macro_f1"] == pytest.approx(sk.f1_score(truth, logits >= 0, average="macro"))
    assert many["auroc"] == pytest.approx(sk.roc_auc_score(truth, logits))
    assert many["accuracy"] == pytest.approx(sk.accuracy_score(truth, logits >= 0))


def test_auroc_counts_pairs_and_its_weights_are_repetitions():
    given, truth = np.asarray([0.1, 0.4, 0.4, 0.8]), np.asarray([False, True, False, True])
    assert scores.auroc_of(given, truth, np.ones((1, 4)))[0] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    again = np.asarray([2, 1, 0, 3])
    repeated = np.repeat(np.arange(4), again)
    by_weight = scores.auroc_of(given, truth, again[None].astype(float))[0]
    assert by_weight == scores.auroc_of(given[repeated], truth[repeated], np.ones((1, len(repeated))))[0]
    assert np.isnan(scores.auroc_of(given, np.ones(4, dtype=bool), np.ones((1, 4)))[0])


def test_calibration_error_by_hand():
    """Two bins: 0.9 confident and always right, 0.6 confident and right half the time."""
    confidence, right = np.asarray([0.91, 0.91, 0.61, 0.61]), np.asarray([1, 1, 1, 0])
    value = float(scores.calibration_error(scores.calibration_statistics(confidence, right).sum(0)))
    assert value == pytest.approx(0.5 * 0.09 + 0.5 * 0.11)
    assert scores.calibration_statistics(np.ones(3), np.ones(3)).sum() == 9  # 1.0 lies in the last bin


def test_the_temperature_is_the_one_that_was_planted():
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(4000, 3))
    drawn = (scores.softmax(logits).cumsum(1) > rng.random((4000, 1))).argmax(1)
    judged = Judgement(3.0 * logits, drawn)
    assert judged.temperature() == pytest.approx(3.0, rel=0.1)
    figures = judged.figures()
    assert figures["calibrated_error"] < 0.3 * figures["calibration_error"]


def test_a_threshold_has_the_best_f1_of_all():
    rng = np.random.default_rng(5)
    probability = np.round(rng.random(60), 2)
    truth = rng.random(60) < probability**2

    def f1(threshold: float) -> float:
        given = probability >= threshold
        return float(2 * (given & truth).sum() / (given.sum() + truth.sum()))

    best = scores.best_threshold(probability, truth)
    assert f1(best) == pytest.approx(max(f1(t) for t in np.unique(probability)))
    assert scores.best_threshold(probability, np.zeros(60, dtype=bool)) == 0.5


def test_what_is_chosen_is_judged_on_other_rows():
    """Random outputs: thresholds chosen on the rows that they are judged on would look better than they are."""
    rng = np.random.default_rng(7)
    outputs, truth = rng.normal(size=(40, 6)), rng.random((40, 6)) < 0.3
    judged = Judgement(outputs, truth)
    own = scores.label_statistics(judged.given(judged.thresholds()), truth)
    from aifactory_train.metrics.labels import macro_value

    assert judged.figures()["macro_f1_chosen"] < float(macro_value(own.sum(0))) - 0.05
    assert "calibrated_error" not in Judgement(outputs[:7], truth[:7]).figures()
    assert Judgement(outputs[:7], truth[:7]).chosen() is None
