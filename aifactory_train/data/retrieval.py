"""A view on token data sets for embeddings: rows of a query, its positive and any number of negatives."""

from __future__ import annotations

import hashlib

import numpy as np

from aifactory_train.data.store import TokenDataset


class MatchedTokens(TokenDataset):
    """Rows of texts that belong together. As a data set it holds the query of each row; each row counts as one
    supervised target.

    ``base``: the documents underneath, those of a row side by side: query, positive, negatives. ``first`` int64 and
    ``sizes`` int64 ``[rows]``: where a row's documents begin in ``base``, and how many there are. ``whole``: lengths
    are those of all documents of a row, what a training step computes.
    """

    def __init__(self, base: TokenDataset, *, whole: bool = False):
        rows = np.asarray(base.store.column("docrow"))[base._docs]
        self.first = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]])[: len(rows)]).astype(np.int64)
        self.sizes = np.diff(np.append(self.first, len(rows)))
        super().__init__(base.store, base._docs[self.first], base.name, base.report, base._digest)
        self.base = base
        self.supervised = np.ones(len(self), dtype=np.int32)
        if whole and len(self):
            self.lengths = np.add.reduceat(base.lengths, self.first).astype(np.int32)

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """int64 ``[documents]`` of ``base``, row by row."""
        rows = np.asarray(rows, dtype=np.int64)
        sizes = self.sizes[rows]
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(self.first[rows], sizes) + within

    def corpus(self, rows: np.ndarray) -> Corpus:
        """The queries and candidates among :meth:`documents` of some rows."""
        documents, sizes = self.documents(rows), self.sizes[np.asarray(rows, dtype=np.int64)]
        queries = np.cumsum(sizes) - sizes
        negatives = np.setdiff1d(np.arange(len(documents)), np.concatenate([queries, queries + 1]))
        candidates = np.concatenate([queries + 1, negatives]).astype(np.int64)
        texts = np.asarray([_fingerprint(self.base.tokens(int(d))) for d in documents], dtype=np.int64)
        asked, offered = texts[queries], texts[candidates]
        # what belongs to a query: its own positive, and that of the same query in another row
        belongs = np.zeros((len(queries), len(candidates)), dtype=bool)
        for number, query in enumerate(asked):
            belongs[number] = np.isin(offered, offered[: len(queries)][asked == query])
        return Corpus(documents, queries, candidates, asked, offered, belongs)


class Corpus:
    """Documents of some rows: ``queries`` int64 ``[Q]`` and ``candidates`` int64 ``[C]`` are places among
    ``documents``; the first ``Q`` candidates are the queries' own positives, in their order. ``asked`` int64 ``[Q]``
    and ``offered`` int64 ``[C]`` are equal for equal texts; ``belongs`` bool ``[Q, C]``: candidates that belong to a
    query.
    """

    def __init__(
        self,
        documents: np.ndarray,
        queries: np.ndarray,
        candidates: np.ndarray,
        asked: np.ndarray,
        offered: np.ndarray,
        belongs: np.ndarray,
    ):
        self.documents, self.queries, self.candidates = documents, queries, candidates
        self.asked, self.offered, self.belongs = asked, offered, belongs

    @property
    def left_out(self) -> np.ndarray:
        """bool ``[Q, C]``: candidates that are no negatives of a query, its own positive (the target) apart."""
        out = self.belongs.copy()
        out[np.arange(len(self.queries)), np.arange(len(self.queries))] = False
        return out


def _fingerprint(tokens: np.ndarray) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little") >> 1
