"""Figures of merit, deterministic and without network or models (docs/metrics.md).

``answers`` one answer against one expectation, ``overlap`` chrF and ROUGE-L, ``labels`` classification, ``bootstrap``
intervals over rows, ``scores`` classifiers that give probabilities, ``registry`` all of them by name.
"""

from aifactory_train.metrics.answers import (
    bits_per_byte,
    exact_match,
    normalise,
    numeric_match,
    perplexity,
    token_f1,
    valid_json,
    valid_xml,
)
from aifactory_train.metrics.bootstrap import (
    BOOTSTRAP_SAMPLES,
    BOOTSTRAP_SEED,
    bootstrap_mean,
    bootstrap_ratio,
)
from aifactory_train.metrics.labels import accuracy
from aifactory_train.metrics.overlap import chrf, rouge_l
from aifactory_train.metrics.registry import (
    ANSWER_METRICS,
    HEAD_METRICS,
    LIKELIHOOD_METRICS,
    PREFERENCE_METRICS,
    changes,
    figure,
    higher_is_better,
)

__all__ = [
    "ANSWER_METRICS",
    "BOOTSTRAP_SAMPLES",
    "BOOTSTRAP_SEED",
    "HEAD_METRICS",
    "LIKELIHOOD_METRICS",
    "PREFERENCE_METRICS",
    "accuracy",
    "bits_per_byte",
    "bootstrap_mean",
    "bootstrap_ratio",
    "changes",
    "chrf",
    "exact_match",
    "figure",
    "higher_is_better",
    "normalise",
    "numeric_match",
    "perplexity",
    "rouge_l",
    "token_f1",
    "valid_json",
    "valid_xml",
]
