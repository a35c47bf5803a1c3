"""A trial before the first step: which documents make the largest micro-batch of a run, and what a step holds at
most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import DeviceBatch, Engine


def largest_micro_batch(lengths: np.ndarray, micro_batch_tokens: int) -> np.ndarray:
    """Documents (int64 ``[K]``, at least one) that fill ``micro_batch_tokens`` with the longest of ``lengths`` (int
    ``[N]``).
    """
    order = np.asarray(lengths).argsort()[::-1]
    budget, chosen = micro_batch_tokens, []
    for index in order:
        if int(lengths[index]) > budget:
            break
        chosen.append(int(index))
        budget -= int(lengths[index])
    return np.asarray(chosen or [int(order[0])], dtype=np.int64)


def try_step(engine: Engine, batch: DeviceBatch, *, accumulates: bool) -> None:
    """Forward and backward of ``batch`` with all that later steps hold: the optimizer's moments, which torch makes at
    the first update, and where a step has several micro-batches the gradients of one while the next is computed.
    Nothing of it is left."""
    updates = engine.updates
    engine.prepare_state(max(1, updates))
    try:
        if accumulates:
            engine.forward_backward(batch, 0.0, last=False)
        engine.forward_backward(batch, 0.0, last=True)
        engine.discard()
    finally:
        engine.prepare_state(updates)
