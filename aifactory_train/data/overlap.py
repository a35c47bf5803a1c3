"""Training documents that repeat a held-out document, found on token ids with array operations.

A held-out document counts as repeated when one training document holds at least 80 % of its distinct 8-token sequences,
wherever they stand in it (so a long document that contains it is found too). Sequences that occur in more than 5 % of a
sample of training documents are wording of the template or of the question and prove nothing; they are not counted.
Sequence overlap is the usual test for contamination of evaluation data (Brown et al. 2020, appendix C, use 13 words).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aifactory_train.data.store import Store, _runs

LENGTH = 8
SHARE = 0.8
_COMMON_SHARE = 0.05
_COMMON_LEAST = 5
_SAMPLE = 2000
#: A held-out document with fewer telling sequences is too short to be judged; equal texts are found otherwise.
_LEAST = 3


#: Tokens that are hashed at once, so that what is worked on stays in the processor's cache.
_AT_A_TIME = 1 << 15
_MIX = np.uint64(0x9E3779B97F4A7C15)


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of every ``LENGTH`` tokens one after another, uint64 [tokens - LENGTH + 1]: of each token, of two, of twice
    two, and so on.
    """
    assert LENGTH & (LENGTH - 1) == 0
    with np.errstate(over="ignore"):
        out = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX
        out ^= out >> np.uint64(29)
        width = 1
        while width < LENGTH:
            ahead = out[width:]
            out = out[:-width] * _MIX
            out += ahead
            out ^= out >> np.uint64(29)
            width *= 2
    return out


class Sieve:
    """Which numbers may be among some wanted ones (uint64, well mixed): a look at one bit of their highest ones, before
    an exact search.
    """

    def __init__(self, wanted: np.ndarray):
        self._shift = np.uint64(64 - min(22, max(16, len(wanted).bit_length() + 5)))
        self._held = np.zeros(1 << (64 - int(self._shift)), dtype=bool)
        self._held[wanted >> self._shift] = True

    def among(self, numbers: np.ndarray) -> np.ndarray:
        """Places of those that may be, int64; all others are not."""
        return np.flatnonzero(self._held[numbers >> self._shift])


def _sequences(store: Store, docs: np.ndarray, sieve: Sieve | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every ``LENGTH``-token sequence inside some documents, uint64, and the place in ``docs`` (ascending) of
    the document that holds it; with a ``sieve`` only of those that it lets through."""
    hashes, owners = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for at, tokens, lengths in _read(store, docs):
        ends = np.cumsum(lengths)
        for first in range(0, len(tokens) - LENGTH + 1, _AT_A_TIME):
            found = _hashes(tokens[first : first + _AT_A_TIME + LENGTH - 1])
            place = np.arange(len(found)) if sieve is None else sieve.among(found)
            owner = np.searchsorted(ends, first + place, side="right")
            inside = first + place + LENGTH <= ends[owner]
            hashes.append(found[place[inside]])
            owners.append(at + owner[inside])
    return np.concatenate(hashes), np.concatenate(owners)


def _read(store: Store, docs: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Tokens of some documents, end to end, and the length of each, a few thousand documents at a time, with the place
    of the first.
    """
    lengths, starts = np.asarray(store.column("lengths")), store.starts
    for at in range(0, len(docs), 4096):
        some = docs[at : at + 4096]
        if some[-1] - some[0] + 1 == len(some):
            tokens = np.asarray(store.token_map[starts[some[0]] : starts[some[-1] + 1]])
        else:
            tokens = np.concatenate([store.token_map[starts[a] : starts[b]] for a, b in _runs(some)])
        yield at, tokens, lengths[some].astype(np.int64)


def near_duplicates(store: Store, train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the documents ``train`` repeat one of ``held``.

    Both are indices into ``store``, ascending. Returns ``(bool [len(train)], int64 [len(train)])``: whether it does,
    and the place in ``held`` of one that it repeats (-1 where none).
    """
    partner = np.full(len(train), -1, dtype=np.int64)
    if len(train) == 0 or len(held) == 0:
        return partner >= 0, partner
    hashes, owner = _once(*_sequences(store, held))
    step = max(1, len(train) // _SAMPLE)
    sample = train[::step][:_SAMPLE]
    seen, doc = _sequences(store, sample, Sieve(hashes))
    known = _among(seen, hashes)
    often, times = np.unique(_once(seen[known], doc[known])[0], return_counts=True)
    common = often[times > max(_COMMON_LEAST, _COMMON_SHARE * len(sample))]
    telling = ~_among(hashes, common)
    hashes, owner = hashes[telling], owner[telling]
    counts = np.bincount(owner, minlength=len(held))
    needed = np.where(counts >= _LEAST, np.ceil(SHARE * counts), np.iinfo(np.int64).max).astype(np.float64)
    table, begins = np.unique(hashes, return_index=True)
    ends = np.append(begins[1:], len(hashes))
    if len(table) == 0:
        return partner >= 0, partner
    sieve = Sieve(table)
    for at in range(0, len(train), 65_536):
        found, inner = _sequences(store, train[at : at + 65_536], sieve)
        slot = np.minimum(np.searchsorted(table, found), len(table) - 1)
        hit = table[slot] == found
        if hit.any():
            hits = np.sort(inner[hit] * len(table) + slot[hit])
            hits = hits[np.append(True, hits[1:] != hits[:-1])]  # a sequence counts once per training document
            document, slots = hits // len(table), hits % len(table)
            width = ends[slots] - begins[slots]
            docs = np.repeat(document, width)
            shifts = np.arange(int(width.sum())) - np.repeat(np.cumsum(width) - width, width)
            owners = owner[np.repeat(begins[slots], width) + shifts]
            keys, shared = np.unique(docs * len(held) + owners, return_counts=True)
            enough = shared >= needed[keys % len(held)]
            partner[at + keys[enough] // len(held)] = keys[enough] % len(held)
    return partner >= 0, partner


def _among(numbers: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which numbers are among some ascending ones, bool. (``np.isin`` would gather them in a hash table, many times
    slower.)
    """
    if len(ordered) == 0:
        return np.zeros(len(numbers), dtype=bool)
    return ordered[np.minimum(np.searchsorted(ordered, numbers), len(ordered) - 1)] == numbers


def _once(hashes: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs of hash and owner, in order."""
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[first], owner[first]
