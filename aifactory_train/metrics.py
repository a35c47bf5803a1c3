"""Figures of merit: text metrics on answers, and bootstrap intervals over rows. Deterministic, without network or models."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

#: Resamples of a bootstrap interval, and the seed that makes it the same on every machine.
BOOTSTRAP_SAMPLES = 2000
BOOTSTRAP_SEED = 17


def normalise(text: str) -> str:
    """The form in which answers are compared: NFKC, case folded, punctuation to spaces, single spaces.

    SQuAD's normalisation without its removal of English articles, since answers come in every European language.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded).split())


def exact_match(answer: str, expected: str) -> float:
    """1.0 if both are equal after :func:`normalise`, else 0.0."""
    return float(normalise(answer) == normalise(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words (with multiplicity) of the normalised texts, as in SQuAD.

    Two empty texts agree (1.0); one empty text does not (0.0).
    """
    ours, theirs = normalise(answer).split(), normalise(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def bits_per_byte(nll: float, text_bytes: int) -> float | None:
    """NLL in nats over ``text_bytes`` UTF-8 bytes as bits per byte; None without text."""
    return nll / (math.log(2) * text_bytes) if text_bytes else None


def perplexity(loss: float) -> float | None:
    """exp of the mean NLL in nats per token; None where it overflows a double."""
    return math.exp(loss) if loss < 700 else None


def bootstrap_ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[float, float] | None:
    """Percentile interval of ``sum(numerator) / sum(denominator)`` when rows are drawn with replacement.

    numerator, denominator ``[rows]``. None for fewer than two rows or if a resample has no denominator (Efron 1979).
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    rows = len(top)
    if rows < 2:
        return None
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1.0 / rows), size=samples)
    below = counts @ bottom
    if (below <= 0).any():
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile((counts @ top) / below, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float] | np.ndarray, **options) -> tuple[float, float] | None:
    """Percentile interval of a mean over rows; see :func:`bootstrap_ratio`."""
    return bootstrap_ratio(values, np.ones(len(values)), **options)
