"""Views on token data sets for heads: what is the label, or the labels, of each document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.data.store import TokenDataset


class ClassifiedTokens(TokenDataset):
    """Documents with labels: ``targets`` int64 ``[documents]``, places in ``names``; with ``several`` bool
    ``[documents, labels]``.

    Each document counts as one supervised target, whatever its length: the loss of a step is a mean over documents.
    ``ends``: :func:`ends_of` them. Raises :class:`UserError` for a label that is not among ``names``.
    """

    def __init__(self, base: TokenDataset, names: Sequence[str], *, several: bool, pad_id: int):
        super().__init__(base.store, base._docs, base.name, base.report, base._digest)
        self.names, self.several = list(names), several
        self.supervised = np.ones(len(self), dtype=np.int32)
        place = {name: number for number, name in enumerate(self.names)}
        marks = np.zeros((len(self), len(self.names)), dtype=bool)
        for number, labels in enumerate(labels_of(base)):
            for label in labels:
                if label not in place:
                    raise UserError(
                        f"the label '{label[:60]}' is not in data.labels{did_you_mean(label, self.names)}",
                        where=self.place(number),
                        fix="correct the row, or name all labels: --set 'data.labels=[A, B]'",
                    )
                marks[number, place[label]] = True
        self.targets = marks if several else marks.argmax(axis=1)
        self.ends = ends_of(base, pad_id)

    @property
    def label_digest(self) -> str:
        """sha256 over names and targets: which label a text has stands in the rows, not in their tokens."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()

    def counts(self) -> np.ndarray:
        """int64 ``[labels]``: documents of each label."""
        if self.several:
            return self.targets.sum(axis=0)
        return np.bincount(self.targets, minlength=len(self.names))


def ends_of(base: TokenDataset, pad_id: int) -> np.ndarray:
    """int64 ``[documents]``: the place that a head reads in each document, the last one that is no padding token. That
    is the last one, but where a text (or a chat template) ends with the token that pads; transformers' classifiers,
    which see no length, look before it, and so does training.
    """
    ends = base.lengths.astype(np.int64) - 1
    last = base.store.token_map[base.store.starts[np.asarray(base._docs) + 1] - 1]
    for number in np.flatnonzero(last == pad_id):
        real = np.flatnonzero(base.tokens(int(number)) != pad_id)
        ends[number] = real[-1] if len(real) else 0
    return ends


def labels_of(base: TokenDataset) -> list[list[str]]:
    """The labels of each document, as its row says them."""
    rows = np.asarray(base.store.column("docrow"))[base._docs]
    return [row["labels"] for row in base.store.rows(rows)]


def names_of(sets: Sequence[TokenDataset]) -> list[str]:
    """All labels of some sets in a fixed order: whole numbers by their value, anything else by the alphabet."""
    found = {label for rows in sets for labels in labels_of(rows) for label in labels}
    numbers = all(label.removeprefix("-").isdecimal() and label.isascii() for label in found)
    return sorted(found, key=int) if numbers else sorted(found)
