"""Which documents make the largest micro-batch of a run, for a trial before the first step."""

from __future__ import annotations

import numpy as np


def largest_micro_batch(lengths: np.ndarray, micro_batch_tokens: int) -> np.ndarray:
    """Documents (int64 ``[K]``, at least one) that fill ``micro_batch_tokens`` with the longest of ``lengths`` (int ``[N]``)."""
    order = np.asarray(lengths).argsort()[::-1]
    budget, chosen = micro_batch_tokens, []
    for index in order:
        if int(lengths[index]) > budget:
            break
        chosen.append(int(index))
        budget -= int(lengths[index])
    return np.asarray(chosen or [int(order[0])], dtype=np.int64)
