"""Exact and near-duplicates among texts, by MinHash over shingles of words. numpy, no tokenizer.

A text is the set of its sequences of three words (casefolded; Chinese, Japanese and Thai: characters), without those that more than
a tenth of all texts share: they are wording of a template and say nothing about a single text. Two texts are nearly the same
when their sets have a Jaccard similarity of at least 0.8, found by one-permutation MinHash signatures (Li, Owen and Zhang 2012) with rotation
for empty bins (Shrivastava and Li 2014) and bands of equal rows (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4).
Every candidate is checked on the sets themselves, so the figure has no false finds; pairs at the threshold are missed in less
than one of a thousand cases (1 - (1 - 0.8^4)^32 of them share a band).
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

WORDS = 3
SIMILAR = 0.8
BINS, BANDS = 128, 32
#: A sequence that more texts than this hold, and more than this share of them, is wording of a template.
COMMON_LEAST, COMMON_SHARE = 10, 0.1
#: A text with fewer telling sequences is too short to be judged; equal texts are found all the same.
LEAST = 3
RULE = (
    f"at least {SIMILAR:.0%} of their {WORDS}-word sequences in common (Jaccard), "
    f"not counting those that more than {COMMON_SHARE:.0%} of all rows share"
)
#: Texts that are looked at: beyond, the first ones stand for all, and the report says so.
MOST_TEXTS = 500_000

_WORD = re.compile(r"[぀-ヿ㐀-鿿ก-๛]|[^\W_]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Shingles:
    """Texts as sets of shingles. ``hashes`` uint64 [all], sorted and distinct inside a text; text ``i`` has
    ``hashes[starts[i]:starts[i + 1]]``, none when it is too short to be judged; ``whole`` uint64 [texts]: one hash of all words."""

    hashes: np.ndarray
    starts: np.ndarray
    whole: np.ndarray

    def __len__(self) -> int:
        return len(self.whole)

    def of(self, i: int) -> np.ndarray:
        return self.hashes[self.starts[i] : self.starts[i + 1]]


def shingle(texts: Iterable[str]) -> Shingles:
    """The sets of ``texts``; a text of fewer than three words is a set of one (all its words)."""
    hashes: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    whole: list[np.ndarray] = []
    held: list[list[int]] = []
    size = 0
    for text in texts:
        held.append([zlib.crc32(w.encode()) for w in _WORD.findall(text.casefold())])
        size += len(held[-1])
        if size > 1 << 19:  # half a million words at a time are hashed together
            for out, part in zip((hashes, counts, whole), _hash(held), strict=True):
                out.append(part)
            held, size = [], 0
    for out, part in zip((hashes, counts, whole), _hash(held), strict=True):
        out.append(part)
    starts = np.zeros(sum(map(len, counts)) + 1, dtype=np.int64)
    np.cumsum(np.concatenate(counts), out=starts[1:])
    return Shingles(np.concatenate(hashes), starts, np.concatenate(whole))


def _hash(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the shingles of some texts (sorted and distinct in each), how many each has, and one hash of each whole text."""
    lengths = np.asarray([len(t) for t in texts], dtype=np.int64)
    whole = np.asarray(
        [zlib.crc32(packed) | (zlib.adler32(packed) << 32) for packed in (array("I", t).tobytes() for t in texts)],
        dtype=np.uint64,
    )
    words = np.fromiter((w for t in texts for w in t), dtype=np.uint64, count=int(lengths.sum()))
    owner = np.repeat(np.arange(len(texts)), lengths)
    n = max(0, len(words) - WORDS + 1)
    out = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for j in range(WORDS):
            out = (out ^ words[j : j + n]) * _MIX
            out ^= out >> np.uint64(32)
    inside = owner[:n] == owner[WORDS - 1 :] if n else np.empty(0, dtype=bool)
    short = np.flatnonzero(lengths < WORDS)
    owner = np.concatenate([owner[:n][inside], short])
    out = np.concatenate([out[inside], whole[short]])
    order = np.lexsort((out, owner))
    owner, out = owner[order], out[order]
    first = np.ones(len(out), dtype=bool)
    first[1:] = (owner[1:] != owner[:-1]) | (out[1:] != out[:-1])
    return out[first], np.bincount(owner[first], minlength=len(texts)), whole


def telling(shingles: Shingles) -> Shingles:
    """Without the sequences of a template, and with an empty set for each text that has too few others."""
    n = len(shingles)
    values, times = np.unique(shingles.hashes, return_counts=True)
    common = values[times > max(COMMON_LEAST, COMMON_SHARE * n)]
    owner = np.repeat(np.arange(n), np.diff(shingles.starts))
    keep = ~np.isin(shingles.hashes, common)
    keep &= (np.bincount(owner[keep], minlength=n) >= LEAST)[owner]
    starts = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner[keep], minlength=n), out=starts[1:])
    return Shingles(shingles.hashes[keep], starts, shingles.whole)


def signatures(shingles: Shingles) -> np.ndarray:
    """MinHash signatures, uint64 [texts, BINS]: equal entries of two texts estimate their Jaccard similarity."""
    n = len(shingles)
    empty = np.iinfo(np.uint64).max
    out = np.full((n, BINS), empty, dtype=np.uint64)
    owner = np.repeat(np.arange(n), np.diff(shingles.starts))
    np.minimum.at(
        out, (owner, (shingles.hashes % np.uint64(BINS)).astype(np.int64)), shingles.hashes // np.uint64(BINS)
    )
    # An empty bin takes the value of the next full one to its right, marked with the distance.
    for _ in range(BINS.bit_length()):
        gaps = out == empty
        if not gaps.any():
            break
        distance = 1 << _
        with np.errstate(over="ignore"):
            moved = np.roll(out, -distance, axis=1) * _MIX + np.uint64(distance)
        moved[np.roll(gaps, -distance, axis=1)] = empty
        out[gaps] = moved[gaps]
    # Texts that are not judged share no band with any other.
    blank = np.flatnonzero(np.diff(shingles.starts) == 0)
    out[blank] = (blank.astype(np.uint64)[:, None] + np.uint64(1)) * _MIX
    return out


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted arrays without repeats."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def within(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """``(exact, near)``: bool [texts] each, texts that repeat an earlier one word for word, or nearly so (not exactly)."""
    shingles = telling(shingle(texts))
    exact = np.ones(len(shingles), dtype=bool)
    exact[np.unique(shingles.whole, return_index=True)[1]] = False
    near = np.zeros(len(shingles), dtype=bool)
    for later, earlier in _candidates(signatures(shingles), ~exact):
        if not near[later]:
            near[later] = similarity(shingles.of(later), shingles.of(earlier)) >= SIMILAR
    return exact, near


def across(train: Iterable[str], held: Iterable[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training texts that repeat a held-out text, and held-out texts that are repeated.

    Returns ``(exact [train], near [train], exact [held], near [held])``, bool; near: not exactly, but nearly so.
    """
    train, held = list(train), list(held)
    both = telling(shingle([*train, *held]))
    n = len(train)
    ours, theirs = both.whole[n:], both.whole[:n]
    exact_train, exact_held = np.isin(theirs, ours), np.isin(ours, theirs)
    near_train, near_held = np.zeros(n, dtype=bool), np.zeros(len(held), dtype=bool)
    values = signatures(both)
    for band in range(BANDS):
        keys = _band(values, band)
        order = np.argsort(keys[:n], kind="stable")
        left = np.searchsorted(keys[:n], keys[n:], side="left", sorter=order)
        right = np.searchsorted(keys[:n], keys[n:], side="right", sorter=order)
        for i in np.flatnonzero(right > left):
            for other in order[left[i] : right[i]]:
                if near_train[other] and near_held[i]:
                    continue
                same = both.whole[n + i] == both.whole[other]
                if not same and similarity(both.of(n + int(i)), both.of(int(other))) >= SIMILAR:
                    near_train[other] = near_held[i] = True
    return exact_train, near_train & ~exact_train, exact_held, near_held & ~exact_held


def _band(values: np.ndarray, band: int) -> np.ndarray:
    """One number for the rows of a band, uint64 [texts]."""
    width = BINS // BANDS
    out = np.zeros(len(values), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for j in range(band * width, (band + 1) * width):
            out = (out ^ values[:, j]) * _MIX
            out ^= out >> np.uint64(29)
    return out


def _candidates(values: np.ndarray, of: np.ndarray) -> list[tuple[int, int]]:
    """Pairs ``(later, earlier)`` that share a band: each text (of those in the mask ``of``) with the first and with the previous
    one of its bucket."""
    rows = np.flatnonzero(of)
    pairs: list[np.ndarray] = []
    for band in range(BANDS):
        keys = _band(values, band)[rows]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        if len(same) == 0:
            continue
        begins = np.ones(len(order), dtype=bool)
        begins[same] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
        for earlier in (first[same], same - 1):
            pairs.append(order[same] * len(rows) + order[earlier])
    if not pairs:
        return []
    found = np.unique(np.concatenate(pairs))
    return list(zip(rows[found // len(rows)].tolist(), rows[found % len(rows)].tolist(), strict=True))
