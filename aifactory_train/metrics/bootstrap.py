"""Bootstrap intervals over rows (Efron 1979), seeded: the same rows give the same interval on every machine.

Resamples of equally many rows are the same resamples. Figures of the same rows before and after a training are
therefore paired: the difference of their replicates is a bootstrap of the difference (:func:`paired`).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

#: Resamples of a bootstrap interval, and the seed that makes it the same on every machine.
BOOTSTRAP_SAMPLES = 2000
BOOTSTRAP_SEED = 17
CONFIDENCE = 0.95


@lru_cache(8)
def resamples(rows: int, samples: int = BOOTSTRAP_SAMPLES, seed: int = BOOTSTRAP_SEED) -> np.ndarray:
    """How often each row is drawn in each resample: float64 ``[samples, rows]``, every line adds up to ``rows``. Do not
    change it.
    """
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1.0 / rows), size=samples)
    return counts.astype(np.float64)


def replicates(
    statistics: np.ndarray,
    value: Callable[[np.ndarray], np.ndarray],
    *,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> np.ndarray | None:
    """``value`` of each resample's sums, float64 ``[samples]``.

    statistics ``[rows, K]``; ``value`` maps sums ``[..., K]`` to ``[...]``. None for fewer than two rows, or where a
    resample has no value (NaN: a ratio without a denominator).
    """
    if len(statistics) < 2:
        return None
    found = value(resamples(len(statistics), samples, seed) @ np.asarray(statistics, dtype=np.float64))
    return None if np.isnan(found).any() else found


def interval(found: np.ndarray | None, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The percentile interval of replicates; None where there are none."""
    if found is None:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def ratio(sums: np.ndarray) -> np.ndarray:
    """``sums[..., 0] / sums[..., 1]``, NaN where the denominator is not positive."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.full(below.shape, np.nan), where=below > 0)


def bootstrap_ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float] | None:
    """Percentile interval of ``sum(numerator) / sum(denominator)`` when rows are drawn with replacement.

    numerator, denominator ``[rows]``. None for fewer than two rows or if a resample has no denominator.
    """
    statistics = np.stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)], axis=1)
    return interval(replicates(statistics, ratio, samples=samples, seed=seed), confidence)


def bootstrap_mean(values: Sequence[float] | np.ndarray, **options) -> tuple[float, float] | None:
    """Percentile interval of a mean over rows; see :func:`bootstrap_ratio`."""
    return bootstrap_ratio(values, np.ones(len(values)), **options)


def packed(found: np.ndarray) -> str:
    """Replicates as text for JSON (float64, little endian, base64)."""
    return base64.b64encode(found.astype("<f8").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """The float64 array behind :func:`packed`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f8")


def paired(before: str, after: str, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Interval of ``after - before`` from :func:`packed` replicates of the same rows; None if their numbers differ."""
    old, new = (unpacked(text) for text in (before, after))
    return interval(new - old, confidence) if len(old) == len(new) else None
