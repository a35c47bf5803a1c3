"""Text metrics and bootstrap intervals."""

from __future__ import annotations

import math
import re

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
    """95 % intervals of means of 60 draws: coverage within three standard errors of binomial sampling (and small-sample
    bias).
    """
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        low, high = metrics.bootstrap_mean(generator.exponential(1.0, 60), samples=400)
        hits += low <= 1.0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_bootstrap_refuses_what_has_no_interval():
    assert metrics.bootstrap_ratio([1.0], [1.0]) is None
    assert metrics.bootstrap_ratio([1.0, 1.0], [0.0, 1.0]) is None  # a resample may hold no denominator at all


# ---- equal to the well-known implementations, 1,000 random cases each

CASES = 1000


def sentences(seed: int, count: int = CASES, *, ascii_only: bool = False) -> list[tuple[str, str]]:
    """(answer, expected) of 0 to 14 words with punctuation; the answer is the expectation after some accidents."""
    generator = np.random.default_rng(seed)
    words = re.split(" ", "the cat sat on Mat's 3.5 e-mail (well) x U.S.A. ... , end. A b")
    if not ascii_only:
        words += re.split(" ", "élève Štítná größe žluťoučký κύτταρο 東京都 ﬁne naïve -- «oui» ß")
    out = []
    for _ in range(count):
        expected = [str(w) for w in generator.choice(words, generator.integers(0, 15))]
        answer = [w for w in expected if generator.random() > 0.2]
        for _ in range(int(generator.integers(0, 4))):
            answer.insert(int(generator.integers(0, len(answer) + 1)), str(generator.choice(words)))
        space = " " if generator.random() > 0.2 else "\n  "
        out.append((space.join(answer), " ".join(expected)))
    return out


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_equals_sacrebleu(word_order):
    sacrebleu = pytest.importorskip("sacrebleu.metrics")
    theirs = sacrebleu.CHRF(word_order=word_order)
    pairs = sentences(word_order)
    for answer, expected in pairs:
        ours = metrics.chrf([answer], [expected], word_order)
        assert ours == pytest.approx(theirs.sentence_score(answer, [expected]).score, abs=1e-9), (answer, expected)
    for start in range(0, CASES, 100):  # corpora: statistics add up, scores do not
        some = pairs[start : start + 100]
        ours = metrics.chrf([a for a, _ in some], [e for _, e in some], word_order)
        assert ours == pytest.approx(theirs.corpus_score([a for a, _ in some], [[e for _, e in some]]).score, abs=1e-9)


class _UnicodeWords:
    """rouge-score's own tokenizer knows a-z and 0-9 only; with ours it judges every language."""

    def tokenize(self, text):
        from aifactory_train.metrics.overlap import rouge_words

        return rouge_words(text)


@pytest.mark.parametrize("ascii_only", [True, False])
def test_rouge_l_equals_rouge_score(ascii_only):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=None if ascii_only else _UnicodeWords())
    found = set()
    for answer, expected in sentences(5, ascii_only=ascii_only):
        ours = metrics.rouge_l(answer, expected)
        assert ours == pytest.approx(scorer.score(expected, answer)["rougeL"].fmeasure, abs=1e-9), (answer, expected)
        found.add(round(ours, 3))
    assert len(found) > 60  # not all alike


def test_f1_and_accuracy_equal_scikit_learn():
    """1,000 random classifications of 1 to 30 rows with one or several labels. An answer may be a label that nobody
    expects.
    """
    sklearn = pytest.importorskip("sklearn.metrics")

    from sklearn import config_context

    with config_context(skip_parameter_validation=True, assume_finite=True):
        for case in range(CASES):
            _compare_with_scikit_learn(sklearn, np.random.default_rng(case), ";" if case % 2 else None)


LABELS = np.array(["Credential Access", "impact", "C2", "Straße", "none", "invented", "other"])


def _compare_with_scikit_learn(sklearn, generator, separator):
    rows, most = int(generator.integers(1, 31)), 4 if separator else 1

    def draw(pool):
        sets = [generator.choice(pool, generator.integers(1, most + 1), replace=False) for _ in range(rows)]
        return sets, np.array([[int(label in chosen) for label in LABELS] for chosen in sets])

    (wanted, truth), (found, guess) = draw(LABELS[:5]), draw(LABELS)
    texts = [[(separator or "").join(chosen) for chosen in sets] for sets in (found, wanted)]
    registry = metrics.ANSWER_METRICS
    ours = {
        name: float(registry[name].value(registry[name].statistics(*texts, separator).sum(0)))
        for name in ("accuracy", "micro_f1", "macro_f1")
    }
    expected = np.flatnonzero(truth.any(0))
    theirs = {
        "accuracy": sklearn.accuracy_score(truth, guess),
        "micro_f1": sklearn.f1_score(truth, guess, average="micro", zero_division=0),
        "macro_f1": sklearn.f1_score(truth, guess, labels=expected, average="macro", zero_division=0),
    }
    assert ours == pytest.approx(theirs, abs=1e-9)


# ---- numbers and form


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("The result is 42.", "42", 1),
        ("12 + 30 = 42", "42", 1),  # the last number is the result
        ("42 of 50", "42", 0),
        ("1.234,50 EUR", "1234.5", 1),
        ("1,234.50", "1 234,5", 1),
        ("1'234'567", "1234567", 1),
        ("1.234", "1234", 1),  # thousands in Denmark,
        ("1.234", "1.234", 1),  # decimals in Ireland
        ("1.234", "1.2345", 0),
        ("0.125", "125", 0),  # a leading zero is no thousand
        ("−3,5 %", "-3.5", 1),
        ("3.5", "-3.5", 0),
        ("6.02e23", "6.02E+23", 1),
        ("none", "42", 0),
        ("42", "none", 0),
        ("1\u202f000\u202f000", "1000000", 1),
        ("x86", "86", 0),  # part of a name
    ],
)
def test_numbers_are_read_as_europe_writes_them(answer, expected, right):
    assert metrics.numeric_match(answer, expected) == right


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_number_equals_itself(value):
    assert metrics.numeric_match(f"about {value!r}", repr(value)) == 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"a": [1, null]}', 1),
        ('```json\n{"a": 1}\n```', 1),
        ("3", 1),
        ("{'a': 1}", 0),
        ('{"a": NaN}', 0),
        ('Here: {"a": 1}', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_validity(text, right):
    assert metrics.valid_json(text) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<root><a/></root>", 1),
        ("```xml\n<root/>\n```", 1),
        ('<?xml version="1.0"?>\n<root/>', 1),
        ("<root><a></root>", 0),
        ("<a/><b/>", 0),
        ("text", 0),
        ("", 0),
        ('<!DOCTYPE r [<!ENTITY a "aaaa">]><r>&a;</r>', 0),
    ],
)
def test_xml_validity(text, right):
    assert metrics.valid_xml(text) == right


# ---- every metric by one path


def test_every_metric_is_best_for_the_expectation_itself_and_has_an_interval():
    expected = ["<a>1</a>", "<b>two 3</b>", "<c>x 4</c>", "<a>1</a>"]
    for name, metric in metrics.ANSWER_METRICS.items():
        texts = ['{"a": 1}', '{"b": 2}', "[3]", "4"] if name == "valid_json" else expected
        best = metrics.figure(metric.statistics(texts, texts, None), metric.value)
        worst = metrics.figure(metric.statistics(["<q"] * 4, texts, None), metric.value)
        assert best.value == pytest.approx(100 if name.startswith("chrf") else 1), name
        assert worst.value < best.value / 2, name
        assert best.ci == pytest.approx((best.value, best.value)), name
        assert len(best.replicates) == metrics.BOOTSTRAP_SAMPLES
        assert metrics.figure(metric.statistics([], [], None), metric.value).value is None
        assert metrics.higher_is_better(name)


@given(st.lists(st.tuples(text, text), min_size=2, max_size=8))
def test_figures_are_bounded_and_lie_in_their_own_range(pairs):
    given_, expected = [a for a, _ in pairs], [e for _, e in pairs]
    for name, metric in metrics.ANSWER_METRICS.items():
        found = metrics.figure(metric.statistics(given_, expected, None), metric.value)
        top = 100 if name.startswith("chrf") else 1
        assert -1e-9 <= found.value <= top + 1e-9, name
        assert found.ci is not None and -1e-9 <= found.ci[0] <= found.ci[1] <= top + 1e-9, name


def test_a_change_is_judged_by_the_same_rows_drawn_twice():
    """A small gain on every row is certain, although the intervals before and after overlap widely."""
    from aifactory_train.metrics.bootstrap import packed, ratio

    generator = np.random.default_rng(2)
    before = np.stack([generator.uniform(0, 0.9, 60), np.ones(60)], axis=1)
    after = before + np.array([0.02, 0.0])
    old, new = metrics.figure(before, ratio), metrics.figure(after, ratio)
    assert new.ci[0] < old.ci[1]  # overlap

    def block(figure):
        return {"token_f1": figure.value, "replicates": {"token_f1": packed(figure.replicates)}}

    found = metrics.changes(block(old), block(new))["token_f1"]
    assert found["difference"] == pytest.approx(0.02)
    assert found["ci"] == pytest.approx((0.02, 0.02))
    assert found["better"] is True
    assert metrics.changes(block(new), block(old))["token_f1"]["better"] is False
    noise = before.copy()
    noise[:, 0] = generator.permutation(noise[:, 0])
    assert metrics.changes(block(old), block(metrics.figure(noise, ratio)))["token_f1"]["better"] is None
    # lower is better of bits
    bits = [
        {"bits_per_byte": b["token_f1"], "replicates": {"bits_per_byte": b["replicates"]["token_f1"]}}
        for b in (block(old), block(new))
    ]
    assert metrics.changes(*bits)["bits_per_byte"]["better"] is False
