"""Views on token data sets that preference methods need: pairs, rated answers, and answers under other questions.

A *unit* is what the sampler deals out: a pair of answers (DPO, ORPO), a rated answer (KTO), or a replayed document,
which is imitated. The training views :class:`PairedTokens` and :class:`LabelledTokens` have in common:

* ``base``: the data set of documents underneath; ``replayed``: bool ``[units]``;
* ``documents(units)``: the documents (of ``base``) of some units, the two of a pair side by side, chosen first;
* ``desirable``: bool ``[documents]``, the answers to make likelier.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from aifactory_train.core.errors import UserError
from aifactory_train.data.store import TokenDataset


def replayed_documents(base: TokenDataset) -> np.ndarray:
    """bool ``[documents]``: those of a replayed source (``data.train[].share``)."""
    shares = np.asarray([source.get("share") is not None for source in base.store.facts["sources"]], dtype=bool)
    rows = np.asarray(base.store.column("docrow"))[base._docs]
    return shares[np.asarray(base.store.column("rowsource"))[rows]]


class PairedTokens(TokenDataset):
    """Pairs of documents of one row, chosen first, among replayed documents. As a data set it holds the first of each
    unit.

    ``whole``: lengths and supervised targets are those of both documents (what a training step computes and counts).
    ``rejected``: the other answers of a set without replay, in the same order. Raises :class:`UserError` for a row
    without two. ``reference``: of a held-out set, its log-probabilities ``{side: [documents]}`` before the first step,
    once they are known.
    """

    reference: dict[str, np.ndarray] | None = None

    def __init__(self, base: TokenDataset, *, whole: bool = False):
        rows = np.asarray(base.store.column("docrow"))[base._docs]
        replayed = replayed_documents(base)
        paired = np.flatnonzero(~replayed)
        if len(paired) % 2 or (rows[paired[0::2]] != rows[paired[1::2]]).any():
            raise UserError(
                "not every row has a chosen and a rejected answer",
                where=f"data: {base.name}",
                fix="rows need prompt, chosen and rejected (docs/methods.md)",
            )
        self.first = np.sort(np.concatenate([paired[0::2], np.flatnonzero(replayed)]))
        super().__init__(base.store, base._docs[self.first], base.name, base.report, base._digest)
        self.base, self.replayed = base, replayed[self.first]
        self.desirable = np.zeros(len(base), dtype=bool)
        self.desirable[paired[0::2]] = True
        if not replayed.any():
            self.rejected = TokenDataset(base.store, base._docs[paired[1::2]], f"{base.name}, rejected")
        if whole:
            pairs = ~self.replayed
            self.lengths[pairs] += base.lengths[paired[1::2]]
            self.supervised[pairs] += base.supervised[paired[1::2]]

    def documents(self, units: np.ndarray) -> np.ndarray:
        """int64 ``[documents]`` of ``base``."""
        both = np.stack([self.first[units], self.first[units] + 1], axis=1)
        keep = np.stack([np.ones(len(units), dtype=bool), ~self.replayed[units]], axis=1)
        return both[keep]


class LabelledTokens(TokenDataset):
    """Answers that are judged one by one, among replayed documents. Raises :class:`UserError` where labels are all the
    same.
    """

    def __init__(self, base: TokenDataset):
        super().__init__(base.store, base._docs, base.name, base.report, base._digest)
        self.base, self.replayed = base, replayed_documents(base)
        self.desirable = labels_of(base, self.replayed)
        good, bad = self.counts()
        if not good or not bad:
            raise UserError(
                f"all {good + bad:,} rated answers are labelled {'true' if good else 'false'}: KTO weighs desirable "
                f"against "
                "undesirable ones",
                where=f"data: {base.name}",
                fix="add answers with the other label; for desirable ones alone leave methods.preference out",
            )

    def counts(self) -> tuple[int, int]:
        """How many answers are desirable, and how many undesirable."""
        good = int(self.desirable.sum())
        return good, int((~self.replayed).sum()) - good

    def documents(self, units: np.ndarray) -> np.ndarray:
        """The units themselves."""
        return units


class HeldOutLabels(TokenDataset):
    """Held-out rated answers. As a data set it holds the desirable ones, which alone are worth predicting; ``rejected``
    holds the undesirable ones (None where there are none), ``exchanged`` all questions with another one's answer;
    ``reference`` as above."""

    rejected: TokenDataset | None
    reference: dict[str, np.ndarray] | None = None

    def __init__(self, base: TokenDataset, longest: int):
        good = labels_of(base, np.zeros(len(base), dtype=bool))
        if not good.any():
            raise UserError(
                "no held-out answer is desirable: there is nothing to measure bits per byte on",
                where=f"data: {base.name}",
                fix="hold out more rows (data.eval_fraction), or give data.eval",
            )
        super().__init__(base.store, base._docs[good], base.name, base.report, base._digest)
        self.rejected = None if good.all() else TokenDataset(base.store, base._docs[~good], f"{base.name}, undesirable")
        self.exchanged = Mismatched(base, np.arange(len(base)), longest)


def labels_of(base: TokenDataset, replayed: np.ndarray) -> np.ndarray:
    """bool ``[documents]``: desirable answers (False for replayed ones). Raises :class:`UserError` for an answer in
    several pieces.
    """
    rows = np.asarray(base.store.column("docrow"))[base._docs]
    rated = np.flatnonzero(~replayed)
    again = np.flatnonzero(rows[rated][1:] == rows[rated][:-1])
    if len(again):
        raise UserError(
            "a rated answer is longer than data.sequence_length and was split: no piece of it was judged",
            where=base.place(int(rated[again[0]])),
            fix="--set data.long_documents=drop (or truncate), or a longer data.sequence_length",
        )
    out = np.zeros(len(base), dtype=bool)
    out[rated] = [bool(base.row(int(i))["desirable"]) for i in rated]
    return out


class Mismatched:
    """Each question of some documents with the answer to another one of them, for KTO's estimate of the KL divergence.

    documents: int64 ``[n]`` of ``base``, the judged ones; item ``j`` asks what ``documents[j]`` asks. The other
    question is half of them away, so that neighbours which repeat a question do not meet. Behind the part of
    :class:`TokenDataset` that scoring and collating read.
    """

    def __init__(self, base: TokenDataset, documents: np.ndarray, longest: int):
        self.base, self.documents, self.longest = base, documents, longest
        self.name = f"{base.name}, answers exchanged"

    def __len__(self) -> int:
        return len(self.documents)

    def _part(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        asking = int(self.documents[j])
        other = int(self.documents[(j + max(1, len(self) // 2)) % len(self)])
        asked, answered, mask = self.base.tokens(asking), self.base.tokens(other), self.base.mask(other)
        own, begin = int(np.flatnonzero(self.base.mask(asking))[0]), int(np.flatnonzero(mask)[0])
        own = min(own, self.longest - 1)  # a target needs a place
        tokens = np.concatenate([asked[:own], answered[begin:]])[: self.longest]
        carries = np.concatenate([np.zeros(own, dtype=bool), mask[begin:]])[: self.longest]
        return tokens, carries

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(self._part(j)[0]) for j in range(len(self))], dtype=np.int32)

    def tokens(self, j: int) -> np.ndarray:
        return self._part(j)[0]

    def mask(self, j: int) -> np.ndarray:
        return self._part(j)[1]

    def text_mask(self, j: int) -> np.ndarray:
        return self.mask(j)

    def text_bytes(self, j: int) -> int:
        return 1  # bits per byte of an exchanged answer mean nothing


class PairsSubset:
    """Some documents of a data set, behind the part of it that scoring reads. documents: int64 ``[n]``, indices into
    ``base``.
    """

    def __init__(self, base: Any, documents: np.ndarray):
        self.base, self.documents, self.name = base, documents, base.name
        self.lengths = np.asarray(base.lengths)[documents]

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, i: int) -> np.ndarray:
        return self.base.tokens(int(self.documents[i]))

    def mask(self, i: int) -> np.ndarray:
        return self.base.mask(int(self.documents[i]))

    def text_mask(self, i: int) -> np.ndarray:
        return self.base.text_mask(int(self.documents[i]))

    def text_bytes(self, i: int) -> int:
        return self.base.text_bytes(int(self.documents[i]))
