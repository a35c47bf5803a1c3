"""Text metrics and bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train import metrics

text = st.text(max_size=40)


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "f1"),
    [
        ("Paris", "paris.", 1.0, 1.0),
        ("the cat sat", "cat sat the", 0.0, 1.0),  # order does not matter to F1
        ("a b c d", "a b", 0.0, 2 * 2 / (4 + 2)),
        ("a a a", "a b", 0.0, 2 * 1 / (3 + 2)),  # multiplicity counts
        ("", "x", 0.0, 0.0),
        ("", "...", 1.0, 1.0),  # both are empty once punctuation is gone
        ("Straße", "STRASSE", 1.0, 1.0),
        ("ﬁbre  optique", "fibre\noptique", 1.0, 1.0),  # NFKC and white space
        ("κύτταρο", "Κύτταρο;", 1.0, 1.0),
        ("x", "y", 0.0, 0.0),
    ],
)
def test_agreement_of_answers(answer, expected, exact, f1):
    assert metrics.exact_match(answer, expected) == exact
    assert metrics.token_f1(answer, expected) == pytest.approx(f1)


@given(text, text)
def test_agreement_is_symmetric_bounded_and_one_for_equals(a, b):
    assert metrics.token_f1(a, b) == metrics.token_f1(b, a)
    assert 0.0 <= metrics.token_f1(a, b) <= 1.0
    assert metrics.exact_match(a, a) == metrics.token_f1(a, a) == 1.0
    if metrics.exact_match(a, b):
        assert metrics.token_f1(a, b) == 1.0


def test_bits_per_byte_and_perplexity():
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    assert metrics.bits_per_byte(1.0, 0) is None
    assert metrics.perplexity(math.log(50)) == pytest.approx(50)
    assert metrics.perplexity(1e6) is None  # JSON knows no infinity


def test_bootstrap_interval_is_seeded_and_holds_the_ratio():
    generator = np.random.default_rng(1)
    below = generator.integers(5, 80, 150)
    above = below * generator.normal(1.3, 0.2, 150)
    low, high = metrics.bootstrap_ratio(above, below)
    assert (low, high) == metrics.bootstrap_ratio(above, below)
    assert low < above.sum() / below.sum() < high
    assert metrics.bootstrap_ratio(above, below, seed=3) != (low, high)


def test_bootstrap_interval_covers_as_often_as_it_says():
    """95 % intervals of means of 60 draws: coverage within three standard errors of binomial sampling (and small-sample bias)."""
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        low, high = metrics.bootstrap_mean(generator.exponential(1.0, 60), samples=400)
        hits += low <= 1.0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_bootstrap_refuses_what_has_no_interval():
    assert metrics.bootstrap_ratio([1.0], [1.0]) is None
    assert metrics.bootstrap_ratio([1.0, 1.0], [0.0, 1.0]) is None  # a resample may hold no denominator at all
