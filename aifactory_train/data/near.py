"""Exact and near-duplicates among texts, by MinHash over shingles of words. numpy, no tokenizer.

A text is the set of its sequences of three words (casefolded; Chinese, Japanese and Thai: characters), without those
that more than a tenth of all texts share: they are wording of a template and say nothing about a single text. Two texts
are nearly the same when their sets have a Jaccard similarity of at least 0.8, found by one-permutation MinHash
signatures (Li, Owen and Zhang 2012) with rotation for empty bins (Shrivastava and Li 2014) and bands of equal rows
(Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4). Every candidate is checked on the sets themselves, so
the figure has no false finds; pairs at the threshold are missed in less than one of a thousand cases (1 - (1 -
0.8^4)^32 of them share a band).
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aifactory_train.data.overlap import Sieve

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
#: The same words in ASCII text, casefolded, for which cutting at blanks is faster.
_ASCII_WORDS = bytes(ord(chr(c).lower()) if c < 128 and chr(c).isalnum() else ord(" ") for c in range(256))
_MIX = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = np.iinfo(np.uint64).max
_AT_A_TIME = 1 << 20  # elements that are compared at once


#: Stands between texts that are cut into words together; it is in no word.
_END = "\0"


class _Numbers(dict):
    """The number of each word: CRC-32 of its UTF-8 bytes; that of ``_END`` is -1."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1 << 18:
            self.clear()  # rows of ever new words: remembering them all would not stay small
        self[word] = number = -1 if word == _END else zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return number


@dataclass
class Shingles:
    """Texts as sets of shingles. ``hashes`` uint64 [all], sorted and distinct inside a text; text ``i`` has
    ``hashes[starts[i]:starts[i + 1]]``; ``whole`` uint64 [texts]: one hash of all words."""

    hashes: np.ndarray
    starts: np.ndarray
    whole: np.ndarray
    _scored: dict[bytes, Shingled] = field(default_factory=dict)
    _between: tuple[Any, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self.whole)

    def of(self, i: int) -> np.ndarray:
        return self.hashes[self.starts[i] : self.starts[i + 1]]

    def scored(self, rows: np.ndarray) -> Shingled:
        """What tells the texts ``rows`` apart: all texts without the sequences that too many of ``rows`` share."""
        common = self._common(rows)
        key = common.tobytes()
        if key not in self._scored:
            self._scored.clear()  # training rows, and training with held-out rows, mostly share the same wording
            self._scored[key] = _score(self, common)
        return self._scored[key]

    def _common(self, rows: np.ndarray) -> np.ndarray:
        """The sequences that too many of ``rows`` share, uint64, ascending. They are counted in groups first: most are
        in none that has so many members."""
        held = self.hashes[_inside(self.starts, rows)]
        most = max(COMMON_LEAST, COMMON_SHARE * len(rows))
        group = (held >> np.uint64(64 - 20)).astype(np.int64)
        many = np.bincount(group, minlength=1 << 20) > most
        found, times = np.unique(held[many[group]], return_counts=True)
        return found[times > most]


@dataclass
class Shingled:
    """Texts as their telling shingles: ``hashes`` uint64 [all], sorted and distinct inside a text, ``starts`` int64
    [texts + 1] (a text that has too few is empty), ``bands`` uint64 [BANDS, texts] (equal entries: candidates)."""

    hashes: np.ndarray
    starts: np.ndarray
    bands: np.ndarray

    def similar(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """bool [pairs]: the texts ``one[i]`` and ``other[i]`` have a Jaccard similarity of at least ``SIMILAR``."""
        sizes = np.diff(self.starts)
        less = np.where(sizes[one] <= sizes[other], one, other)
        more = one + other - less
        out = np.zeros(len(one), dtype=bool)
        # A set that is too small for it cannot be similar even if the other one holds all of it.
        left = np.flatnonzero(sizes[less] >= SIMILAR * sizes[more] - 1)
        left = left[sizes[less[left]] > 0]
        parts = np.cumsum(sizes[less[left]]) // _AT_A_TIME
        for part in np.split(left, np.flatnonzero(np.diff(parts)) + 1):
            small, large = less[part], more[part]
            found = self._held(self.hashes[_inside(self.starts, small)], np.repeat(large, sizes[small]))
            pair = np.repeat(np.arange(len(part)), sizes[small])
            shared = np.bincount(pair[found], minlength=len(part))
            out[part] = shared / (sizes[small] + sizes[large] - shared) >= SIMILAR
        return out

    def _held(self, wanted: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """bool [wanted]: the text ``texts[i]`` has the shingle ``wanted[i]``."""
        place = np.searchsorted(self.keys, self.key(wanted, texts))
        end = self.starts[texts + 1]
        # Of the shingles that begin with the same bits, almost always one, the first; look on where it is another one.
        while True:
            place = np.minimum(place, len(self.hashes) - 1)
            on = (self.hashes[place] < wanted) & (place + 1 < end)
            if not on.any():
                return (self.hashes[place] == wanted) & (self.starts[texts] <= place) & (place < end)
            place += on

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """uint64 [all], ascending: the text, and behind it as many of the first bits of the shingle as there is room
        for.
        """
        return self.key(self.hashes, np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts)))

    def key(self, hashes: np.ndarray, texts: np.ndarray) -> np.ndarray:
        room = np.uint64(64 - max(1, len(self.starts).bit_length()))
        return (texts.astype(np.uint64) << room) | (hashes >> (np.uint64(64) - room))


def shingle(texts: Iterable[str]) -> Shingles:
    """The sets of ``texts``; a text of fewer than three words is a set of one (all its words)."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held: list[str] = []
    size = 0
    number = _Numbers().__getitem__
    for text in texts:
        if text.isascii():
            words = text.encode().translate(_ASCII_WORDS).decode()
        else:
            words = " ".join(_WORD.findall(text.casefold()))
        held.append(words)
        size += len(words)
        if size > 1 << 19:  # half a million characters at a time
            parts.append(_hash(held, number))
            held, size = [], 0
    parts.append(_hash(held, number))
    hashes, counts, whole = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return Shingles(hashes, starts, whole)


def _hash(texts: list[str], number: Callable[[str], int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the shingles of some texts (sorted and distinct in each), how many each has, and one hash of each whole
    text. ``texts``: words with white space between them; ``number``: of a word."""
    found = f" {_END} ".join([*texts, ""]).split()
    numbers = np.fromiter(map(number, found), dtype=np.int64, count=len(found))
    ends = np.flatnonzero(numbers < 0)
    lengths = np.diff(ends, prepend=-1) - 1
    small = np.delete(numbers, ends).astype(np.uint32)
    raw = memoryview(small.tobytes())
    edges = np.cumsum(4 * lengths).tolist()
    pieces = [raw[a:b] for a, b in zip([0, *edges], edges, strict=False)]
    whole = np.asarray([zlib.crc32(piece) | (zlib.adler32(piece) << 32) for piece in pieces], dtype=np.uint64)
    words = small.astype(np.uint64)
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
    order = np.argsort(owner, kind="stable")
    owner, out = owner[order], np.concatenate([out[inside], whole[short]])[order]
    edges = np.cumsum(np.bincount(owner, minlength=len(texts))).tolist()
    for a, b in zip([0, *edges], edges, strict=False):
        out[a:b].sort()
    first = np.ones(len(out), dtype=bool)
    first[1:] = (owner[1:] != owner[:-1]) | (out[1:] != out[:-1])
    return out[first], np.bincount(owner[first], minlength=len(texts)), whole


def _inside(starts: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Places of all shingles of some texts, one text after another."""
    return _ranges(starts[texts], starts[texts + 1] - starts[texts])


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``begins[0], begins[0] + 1, ...`` (``sizes[0]`` numbers), then those from ``begins[1]``, and so on."""
    ends = np.cumsum(sizes)
    return np.repeat(begins - ends + sizes, sizes) + np.arange(int(ends[-1]) if len(ends) else 0)


def _score(shingles: Shingles, common: np.ndarray) -> Shingled:
    """All texts without the shingles ``common``, and with an empty set for each that has too few others."""
    n, hashes = len(shingles), shingles.hashes
    owner = np.repeat(np.arange(n), np.diff(shingles.starts))
    keep = np.ones(len(hashes), dtype=bool)
    suspects = Sieve(common).among(hashes)
    keep[suspects[np.isin(hashes[suspects], common)]] = False
    keep &= (np.bincount(owner[keep], minlength=n) >= LEAST)[owner]
    starts = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner[keep], minlength=n), out=starts[1:])
    hashes = hashes[keep]
    bands = np.zeros((BANDS, n), dtype=np.uint64)
    for at in range(0, n, 1024):  # what is worked on stays in the processor's cache
        end = min(n, at + 1024)
        bands[:, at:end] = _bands(signatures(hashes[starts[at] : starts[end]], np.diff(starts[at : end + 1]), at)).T
    return Shingled(hashes, starts, bands)


def signatures(hashes: np.ndarray, sizes: np.ndarray, number: int = 0) -> np.ndarray:
    """MinHash signatures, uint64 [texts, BINS]: equal entries of two texts estimate their Jaccard similarity.

    ``hashes``: of all texts, end to end; ``sizes``: of each. ``number``: the number of the first text (a text without
    hashes gets a signature from its number alone, so that it shares no band with any other).
    """
    n = len(sizes)
    flat = np.full(n * BINS, _EMPTY, dtype=np.uint64)
    place = np.repeat(np.arange(n) * BINS, sizes) + (hashes % np.uint64(BINS)).astype(np.int64)
    np.minimum.at(flat, place, hashes // np.uint64(BINS))
    out = flat.reshape(n, BINS)
    # An empty bin takes the value of the next full one to its right, marked with the distance.
    column = np.arange(BINS)
    full = np.where(out == _EMPTY, 2 * BINS, column)
    around = full.min(axis=1, initial=2 * BINS, keepdims=True) + BINS
    following = np.minimum(np.minimum.accumulate(full[:, ::-1], axis=1)[:, ::-1], around)
    distance = np.minimum(following - column, BINS - 1)
    values = np.take_along_axis(out, following % BINS, axis=1)
    with np.errstate(over="ignore"):
        out = values * _FACTOR[distance] + _TERM[distance]
        blank = np.flatnonzero(sizes == 0)
        out[blank] = ((blank + number).astype(np.uint64)[:, None] + np.uint64(1)) * _MIX
    return out


def _marks() -> tuple[np.ndarray, np.ndarray]:
    """Factor and term that mark a value with its distance: ``value * _MIX + 2**k`` for each bit ``k`` of it."""
    factor, term = np.ones(BINS, dtype=np.uint64), np.zeros(BINS, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for bit in range(BINS.bit_length()):
            far = (np.arange(BINS) >> bit) & 1 == 1
            factor[far] *= _MIX
            term[far] = term[far] * _MIX + np.uint64(1 << bit)
    return factor, term


_FACTOR, _TERM = _marks()


def _bands(values: np.ndarray) -> np.ndarray:
    """One number for the bins of each band, uint64 [texts, BANDS]."""
    width = BINS // BANDS
    out = np.zeros((len(values), BANDS), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for j in range(width):
            out = (out ^ values[:, j::width]) * _MIX
            out ^= out >> np.uint64(29)
    return out


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted arrays without repeats."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def within(texts: Iterable[str] | Shingles, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``(exact, near)``: bool [texts] each, texts that repeat an earlier one word for word, or nearly so (not exactly).

    ``rows``: of shingles that are there already, the texts to look at, in this order.
    """
    shingles = texts if isinstance(texts, Shingles) else shingle(texts)
    rows = np.arange(len(shingles)) if rows is None else rows
    exact = np.ones(len(rows), dtype=bool)
    exact[np.unique(shingles.whole[rows], return_index=True)[1]] = False
    scored = shingles.scored(rows)
    later, earlier = _candidates(scored.bands[:, rows], ~exact)
    found = scored.similar(rows[later], rows[earlier])
    near = np.zeros(len(rows), dtype=bool)
    near[later[found]] = True
    return exact, near


def between(
    shingles: Shingles, train: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training texts that repeat a held-out text, and held-out texts that are repeated; both are rows of ``shingles``.

    Returns ``(exact [train], near [train], exact [held], near [held])``, bool; near: not exactly, but nearly so. The
    last answer is remembered: where the overlap left nothing to take out, the report asks the same once more.
    """
    asked = (train.tobytes(), held.tobytes())
    if shingles._between is None or shingles._between[0] != asked:
        shingles._between = asked, _between(shingles, train, held)
    return shingles._between[1]


def _between(
    shingles: Shingles, train: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    ours, theirs = shingles.whole[held], shingles.whole[train]
    exact_train, exact_held = np.isin(theirs, ours), np.isin(ours, theirs)
    near_train, near_held = np.zeros(len(train), dtype=bool), np.zeros(len(held), dtype=bool)
    scored = shingles.scored(np.concatenate([train, held]))
    for band in range(BANDS):
        keys, wanted = scored.bands[band][train], scored.bands[band][held]
        met = Sieve(wanted).among(keys)
        met = met[np.isin(keys[met], wanted)]
        order = met[np.argsort(keys[met], kind="stable")]
        left = np.searchsorted(keys[order], wanted, side="left")
        many = np.searchsorted(keys[order], wanted, side="right") - left
        for part in np.split(np.arange(len(held)), np.flatnonzero(np.diff(np.cumsum(many) // _AT_A_TIME)) + 1):
            mine = np.repeat(part, many[part])
            other = order[_ranges(left[part], many[part])]
            open_ = ~(near_train[other] & near_held[mine]) & (theirs[other] != ours[mine])
            mine, other = mine[open_], other[open_]
            found = scored.similar(train[other], held[mine])
            near_train[other[found]] = near_held[mine[found]] = True
    return exact_train, near_train & ~exact_train, exact_held, near_held & ~exact_held


def _candidates(bands: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs ``(later, earlier)`` that share a band: each text (of those in the mask ``of``) with the first and with the
    previous one of its bucket."""
    rows = np.flatnonzero(of)
    pairs: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for band in range(BANDS):
        keys = bands[band][rows]
        group = (keys >> np.uint64(64 - 17)).astype(np.int64)
        some = np.flatnonzero((np.bincount(group) > 1)[group])  # those alone in their group have no equal
        keys = keys[some]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        begins = np.ones(len(order), dtype=bool)
        begins[same] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
        pairs.extend(some[order[same]] * len(rows) + some[order[earlier]] for earlier in (first[same], same - 1))
    found = np.unique(np.concatenate(pairs))
    return rows[found // max(1, len(rows))], rows[found % max(1, len(rows))]
