"""Overlap of an answer with the expected text: chrF, chrF++ and ROUGE-L, with sufficient statistics that add up over
rows.

Written here although sacrebleu and rouge-score, which the tests compare with, compute the same. Intervals need the
statistics of each row: sacrebleu has them (and faster) in a private method only, and would bring lxml and four more
packages to every machine. rouge-score knows the letters a to z alone, so that a right answer in Greek scores 0, takes
twenty times as long, and brings nltk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

CHAR_ORDER = 6
WORD_ORDER = 2  # of chrF++; chrF has none
BETA = 2.0
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _grams(units: Sequence[str], order: int) -> Counter:
    return Counter(tuple(units[i : i + order]) for i in range(len(units) - order + 1))


def _words(text: str) -> list[str]:
    """Words with one mark of punctuation taken off, at the end or else at the beginning (Popović's chrF++)."""
    words: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in _PUNCTUATION:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in _PUNCTUATION:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words


def chrf_statistics(answer: str, expected: str, word_order: int = 0) -> np.ndarray:
    """n-grams of the answer, of the expectation, and common ones, for each order: float64 ``[3 * (6 + word_order)]``.

    Character n-grams leave white space out. An order that the expectation is too short for counts nothing.
    """
    out: list[float] = []
    pairs = [("".join(answer.split()), "".join(expected.split()), n + 1) for n in range(CHAR_ORDER)]
    pairs += [(_words(answer), _words(expected), n + 1) for n in range(word_order)]  # type: ignore[misc]
    for ours, theirs, order in pairs:
        have, want = _grams(ours, order), _grams(theirs, order)
        common = sum((have & want).values())
        out += [sum(have.values()) if want else 0, sum(want.values()), common]
    return np.asarray(out, dtype=np.float64)


def chrf_value(sums: np.ndarray) -> np.ndarray:
    """chrF (0 to 100) of summed statistics ``[..., 3 * orders]``.

    Popović 2015 and 2017 (chrF, chrF++) with beta 2: precision and recall are averaged over the orders that both sides
    have, as in sacrebleu (version 2, without epsilon smoothing).
    """
    have, want, common = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    both = (have > 0) & (want > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision = np.where(both, common / np.where(have > 0, have, 1), 0).sum(-1) / orders
    recall = np.where(both, common / np.where(want > 0, want, 1), 0).sum(-1) / orders
    below = BETA**2 * precision + recall
    return 100 * np.divide((1 + BETA**2) * precision * recall, below, out=np.zeros(np.shape(below)), where=below > 0)


def chrf(answers: Sequence[str], expected: Sequence[str], word_order: int = 0) -> float:
    """chrF of a corpus; with ``word_order`` 2 chrF++."""
    rows = [chrf_statistics(a, e, word_order) for a, e in zip(answers, expected, strict=True)]
    return float(chrf_value(np.sum(rows, axis=0))) if rows else 0.0


_WORD = re.compile(r"[^\W_]+")


def rouge_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case. rouge-score knows a-z and 0-9 only; on such texts both are the same."""
    return _WORD.findall(text.lower())


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, by Hyyrö's bit-parallel recurrence (2004): one whole-number operation for each element of ``b``."""
    places: dict[str, int] = {}
    for i, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for unit in b:
        hit = row & places.get(unit, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), without stemming; 0.0 where either has no
    word.
    """
    ours, theirs = rouge_words(answer), rouge_words(expected)
    if not ours or not theirs:
        return 0.0
    common = longest_common_subsequence(theirs, ours)
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall) if common else 0.0
