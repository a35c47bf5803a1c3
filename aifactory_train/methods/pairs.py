"""Views on token data sets that preference methods need: a chosen with its rejected answer, and answers under wrong questions."""

from __future__ import annotations

import numpy as np

from aifactory_train.data.store import TokenDataset
from aifactory_train.errors import UserError


class PairedTokens(TokenDataset):
    """Rows with two documents each, chosen first. As a data set it holds the chosen ones; ``rejected`` holds the others.

    ``whole``: lengths and supervised targets are those of both documents (what a training step computes and counts).
    ``both`` is the data set underneath: documents ``2 i`` and ``2 i + 1`` belong to pair ``i``.
    """

    def __init__(self, base: TokenDataset, *, whole: bool = False):
        rows = np.asarray(base.store.column("docrow"))[base._docs]
        if len(rows) % 2 or (rows[0::2] != rows[1::2]).any():
            raise UserError(
                "not every row has a chosen and a rejected answer",
                where=f"data: {base.name}",
                fix="rows need prompt, chosen and rejected (docs/methods.md)",
            )
        super().__init__(base.store, base._docs[0::2], base.name, base.report, base._digest)
        self.both = base
        self.rejected = TokenDataset(base.store, base._docs[1::2], f"{base.name}, rejected")
        if whole:
            self.lengths = self.lengths + self.rejected.lengths
            self.supervised = self.supervised + self.rejected.supervised


class Mismatched:
    """Each question of ``base`` with the answer to another one, for KTO's estimate of the KL divergence.

    The other question is half the data set away, so that neighbours which repeat a question do not meet. Behind the part of
    :class:`TokenDataset` that scoring and collating read.
    """

    def __init__(self, base: TokenDataset, longest: int):
        self.base, self.longest, self.name = base, longest, f"{base.name}, answers exchanged"

    def __len__(self) -> int:
        return len(self.base)

    def _part(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        other = (i + max(1, len(self.base) // 2)) % len(self.base)
        asked, answered, mask = self.base.tokens(i), self.base.tokens(other), self.base.mask(other)
        own, begin = int(np.flatnonzero(self.base.mask(i))[0]), int(np.flatnonzero(mask)[0])
        own = min(own, self.longest - 1)  # a target needs a place
        tokens = np.concatenate([asked[:own], answered[begin:]])[: self.longest]
        carries = np.concatenate([np.zeros(own, dtype=bool), mask[begin:]])[: self.longest]
        return tokens, carries

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(self._part(i)[0]) for i in range(len(self.base))], dtype=np.int32)

    def tokens(self, i: int) -> np.ndarray:
        return self._part(i)[0]

    def mask(self, i: int) -> np.ndarray:
        return self._part(i)[1]

    def text_mask(self, i: int) -> np.ndarray:
        return self.mask(i)

    def text_bytes(self, i: int) -> int:
        return 1  # bits per byte of an exchanged answer mean nothing
