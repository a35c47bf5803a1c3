"""Goldfish loss: some tokens never carry loss, so that no text can be recited word for word.

Hans et al. 2024, "Be like a Goldfish, Don't Memorize!", arXiv 2406.10209: a token is left out of the loss where a hash
of the ``context`` tokens before it falls below 1/k. The same passage is masked alike wherever and however often it
occurs, so what one copy withholds, no other copy teaches. The first ``context`` tokens of a document have too short a
past and always carry loss.
"""

from __future__ import annotations

import numpy as np

from aifactory_train.data.sampler import splitmix64
from aifactory_train.data.store import TokenDataset


def withheld(tokens: np.ndarray, k: int, context: int) -> np.ndarray:
    """bool [n]: tokens that the goldfish forgets, one in ``k`` on average. A function of the tokens before each one
    alone.
    """
    n = len(tokens)
    out = np.zeros(n, dtype=bool)
    if n <= context:
        return out
    state = np.zeros(n - context, dtype=np.uint64)
    for back in range(context, 0, -1):
        state = splitmix64(state ^ tokens[context - back : n - back].astype(np.uint64))
    out[context:] = state < np.uint64((1 << 64) // k)
    return out


class GoldfishTokens(TokenDataset):
    """A data set whose masks leave the withheld tokens out; everything else is that of ``base``."""

    def __init__(self, base: TokenDataset, k: int, context: int):
        super().__init__(base.store, base._docs, base.name, base.report, base._digest)
        self.k, self.context = k, context
        self.supervised = np.asarray([int(self.mask(i).sum()) for i in range(len(base))], dtype=np.int32)

    def mask(self, i: int) -> np.ndarray:
        """bool [length]. A document that would lose all its targets keeps the first one: no step is left without a
        loss.
        """
        whole = super().mask(i)
        kept = whole & ~withheld(self.tokens(i), self.k, self.context)
        if whole.any() and not kept.any():
            kept[np.flatnonzero(whole)[0]] = True
        return kept
