"""Every metric of answers by name, as statistics that add up over rows and a value of their sums.

That form gives the figure, its bootstrap interval, its slices and the paired difference of before and after by one
path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aifactory_train.metrics import answers as one
from aifactory_train.metrics import bootstrap, labels, overlap

Statistics = Callable[[Sequence[str], Sequence[str], str | None], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """``statistics(answers, expected, label separator)`` gives ``[rows, K]``; ``value`` maps sums ``[..., K]`` to
    ``[...]``.
    """

    name: str
    statistics: Statistics
    value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool = True


def _mean(name: str, score: Callable[[str, str], float]) -> Metric:
    def statistics(given: Sequence[str], expected: Sequence[str], separator: str | None) -> np.ndarray:
        return np.asarray([[score(a, e), 1.0] for a, e in zip(given, expected, strict=True)]).reshape(-1, 2)

    return Metric(name, statistics, bootstrap.ratio)


def _accuracy(given: Sequence[str], expected: Sequence[str], separator: str | None) -> np.ndarray:
    return np.asarray([[labels.accuracy(a, e, separator), 1.0] for a, e in zip(given, expected, strict=True)]).reshape(
        -1, 2
    )


def _chrf(words: int) -> Statistics:
    def statistics(given: Sequence[str], expected: Sequence[str], separator: str | None) -> np.ndarray:
        rows = [overlap.chrf_statistics(a, e, words) for a, e in zip(given, expected, strict=True)]
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), 3 * (overlap.CHAR_ORDER + words))

    return statistics


#: Metrics of answers, in the order in which they are shown.
ANSWER_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _mean("exact_match", one.exact_match),
        _mean("token_f1", one.token_f1),
        Metric("accuracy", _accuracy, bootstrap.ratio),
        Metric("micro_f1", labels.micro_statistics, labels.micro_value),
        Metric("macro_f1", labels.macro_statistics, labels.macro_value),
        Metric("chrf", _chrf(0), overlap.chrf_value),
        Metric("chrf_pp", _chrf(overlap.WORD_ORDER), overlap.chrf_value),
        _mean("rouge_l", overlap.rouge_l),
        _mean("numeric_match", one.numeric_match),
        _mean("valid_json", lambda answer, expected: one.valid_json(answer)),
        _mean("valid_xml", lambda answer, expected: one.valid_xml(answer)),
    )
}
#: Metrics of likelihood: lower is better. They need no answers.
LIKELIHOOD_METRICS = ("bits_per_byte", "perplexity", "loss")
#: Held-out figures of a preference method (methods/preference_eval.py) in the order in which they are shown, and
#: whether a higher one is better.
PREFERENCE_METRICS = {
    "preference_loss": False,
    "reward_accuracy": True,
    "reward_margin": True,
    "preference_accuracy": True,
    "preference_margin": True,
    "chosen_logp": True,
    "rejected_logp": False,
}
#: Held-out figures of a head (evaluation/heads.py) beside accuracy and F1, which are those of answers.
HEAD_METRICS = {
    "auroc": True,
    "calibration_error": False,
    "calibrated_error": False,
    "macro_f1_chosen": True,
    "ndcg_at_10": True,
    "recall_at_1": True,
    "recall_at_10": True,
}


def higher_is_better(name: str) -> bool:
    """Whether a larger figure is a better one (``memorisation``, bits and losses are better small)."""
    return name in ANSWER_METRICS or PREFERENCE_METRICS.get(name, False) or HEAD_METRICS.get(name, False)


@dataclass
class Figure:
    """A figure of some rows: its value, 95 % interval, and replicates for pairing (None for fewer than two rows)."""

    value: float | None
    ci: tuple[float, float] | None
    replicates: np.ndarray | None


def figure(statistics: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """The figure of statistics ``[rows, K]``."""
    if not len(statistics):
        return Figure(None, None, None)
    found = float(value(np.asarray(statistics, dtype=np.float64).sum(0)))
    drawn = bootstrap.replicates(statistics, value)
    return Figure(None if np.isnan(found) else found, bootstrap.interval(drawn), drawn)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of every metric that both hold replicates of: the difference, its paired 95 % interval, and whether that leaves
    out zero.

    ``{metric: {"difference", "ci", "better": True | False | None}}``; None: the interval holds zero.
    """
    out: dict[str, Any] = {}
    old, new = before.get("replicates") or {}, after.get("replicates") or {}
    for name in [n for n in new if n in old]:
        if before.get(name) is None or after.get(name) is None:
            continue
        ci = bootstrap.paired(old[name], new[name])
        better = None
        if ci is not None and (ci[0] > 0 or ci[1] < 0):
            better = (ci[0] > 0) == higher_is_better(name)
        out[name] = {"difference": after[name] - before[name], "ci": ci, "better": better}
    return out


def without_replicates(figures: Any) -> Any:
    """Figures as ``eval.json`` holds them: the replicates are for pairing only."""
    if isinstance(figures, dict):
        return {k: without_replicates(v) for k, v in figures.items() if k != "replicates"}
    return figures
