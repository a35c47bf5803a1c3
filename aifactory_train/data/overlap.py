"""Training documents that repeat a held-out document, found on token ids with array operations.

A held-out document counts as repeated when one training document holds at least 80 % of its distinct 8-token sequences,
wherever they stand in it (so a long document that contains it is found too). Sequences that occur in more than 5 % of a
sample of training documents are wording of the template or of the question and prove nothing; they are not counted.
Sequence overlap is the usual test for contamination of evaluation data (Brown et al. 2020, appendix C, use 13 words).
"""

from __future__ import annotations

import numpy as np

from aifactory_train.data.store import Store, _runs

LENGTH = 8
SHARE = 0.8
_COMMON_SHARE = 0.05
_COMMON_LEAST = 5
_SAMPLE = 2000
#: A held-out document with fewer telling sequences is too short to be judged; equal texts are found otherwise.
_LEAST = 3


def _sequences(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every ``LENGTH``-token sequence inside a document, uint64, and the document (0, 1, ...) that holds it."""
    n = len(tokens) - LENGTH + 1
    if n <= 0:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    hashes = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for j in range(LENGTH):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += tokens[j : j + n].astype(np.uint64) + np.uint64(1)
            hashes ^= hashes >> np.uint64(29)
    document = np.repeat(np.arange(len(lengths)), lengths)
    inside = document[:n] == document[LENGTH - 1 :]
    return hashes[inside], document[:n][inside]


def near_duplicates(store: Store, train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the documents ``train`` repeat one of ``held``.

    Both are indices into ``store``. Returns ``(bool [len(train)], int64 [len(train)])``: whether it does, and the place in
    ``held`` of one that it repeats (-1 where none).
    """
    partner = np.full(len(train), -1, dtype=np.int64)
    if len(train) == 0 or len(held) == 0:
        return partner >= 0, partner
    hashes, owner = _of(store, held)
    pairs = np.unique(np.stack([hashes, owner.astype(np.uint64)]), axis=1)
    hashes, owner = pairs[0], pairs[1].astype(np.int64)
    step = max(1, len(train) // _SAMPLE)
    sample = train[::step][:_SAMPLE]
    seen, doc = _of(store, sample)
    known = np.isin(seen, hashes)
    often, times = np.unique(
        np.unique(np.stack([seen[known], doc[known].astype(np.uint64)]), axis=1)[0], return_counts=True
    )
    common = often[times > max(_COMMON_LEAST, _COMMON_SHARE * len(sample))]
    telling = ~np.isin(hashes, common)
    hashes, owner = hashes[telling], owner[telling]
    counts = np.bincount(owner, minlength=len(held))
    needed = np.where(counts >= _LEAST, np.ceil(SHARE * counts), np.iinfo(np.int64).max).astype(np.float64)
    table, begins = np.unique(hashes, return_index=True)
    ends = np.append(begins[1:], len(hashes))
    if len(table) == 0:
        return partner >= 0, partner
    at = 0
    for first, last in _runs(train):
        found, inner = _of(store, np.arange(first, last))
        slot = np.minimum(np.searchsorted(table, found), len(table) - 1)
        hit = table[slot] == found
        if hit.any():
            hits = np.unique(np.stack([inner[hit], slot[hit]]), axis=1)  # a sequence counts once per training document
            width = ends[hits[1]] - begins[hits[1]]
            docs = np.repeat(hits[0], width)
            shifts = np.arange(int(width.sum())) - np.repeat(np.cumsum(width) - width, width)
            owners = owner[np.repeat(begins[hits[1]], width) + shifts]
            keys, shared = np.unique(docs * len(held) + owners, return_counts=True)
            enough = shared >= needed[keys % len(held)]
            partner[at + keys[enough] // len(held)] = keys[enough] % len(held)
        at += last - first
    return partner >= 0, partner


def _of(store: Store, docs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.asarray(store.column("lengths"))
    parts = [np.asarray(store.token_map[store.starts[a] : store.starts[b]]) for a, b in _runs(docs)]
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    return _sequences(tokens, lengths[docs])
