"""``split_step`` as it was first written, one slot after the other: slow at thousands of ranks, and easy to believe."""

from __future__ import annotations

import heapq
import math

import numpy as np


def split_step(
    docs: np.ndarray,
    lengths: np.ndarray,
    data_ranks: int,
    grad_accum: int | str = "auto",
    micro_batch_tokens: int = 4096,
    batching: str = "packed",
) -> list[list[np.ndarray]]:
    """Share one step's documents among the ranks and their micro-batches.

    Args:
        docs: int [n], documents of the step.
        lengths: int [num_docs], tokens of each document of the whole data set.
        data_ranks: ranks that have documents of their own (all of them, unless some share a sequence or a matrix).
        grad_accum: micro-batches per rank, or ``"auto"``: as few as keep each within ``micro_batch_tokens``.
        batching: ``packed`` (a micro-batch costs the sum of its tokens) or ``padded`` (rows times the longest).

    Returns ``[rank][micro] -> documents`` (int64). Every document appears once, every rank has the same number of
    micro-batches, some of which may be empty; micro-batches of the same number cost about the same on all ranks,
    because the ranks wait for each other. The result depends on the arguments alone.
    """
    docs = np.asarray(docs, dtype=np.int64)
    own = np.asarray(lengths)[docs]
    share = _share_padded if batching == "padded" else _share_packed
    # Longest first; the place in the step breaks ties, so equal lengths keep their order.
    by_length = np.lexsort((np.arange(len(docs)), -own))
    if grad_accum == "auto":
        total = int(own.sum())
        accum = max(1, math.ceil(total / (data_ranks * micro_batch_tokens)))
        while True:
            slots = share(own, by_length, data_ranks * accum)
            worst = max((_cost(own, s, batching) for s in slots), default=0)
            if worst <= micro_batch_tokens or accum >= len(docs):
                break
            accum += 1
    else:
        accum = int(grad_accum)
        slots = share(own, by_length, data_ranks * accum)
    slots.sort(key=lambda s: (-_cost(own, s, batching), s[:1]))
    out: list[list[np.ndarray]] = [[] for _ in range(data_ranks)]
    spent = [0] * data_ranks
    for micro in range(accum):
        # Of the next `data_ranks` slots, the most expensive goes to the rank that has had the least so far.
        ranks = sorted(range(data_ranks), key=lambda r: (spent[r], r))
        for rank, slot in zip(ranks, slots[micro * data_ranks : (micro + 1) * data_ranks], strict=True):
            spent[rank] += _cost(own, slot, batching)
            out[rank].append(docs[np.sort(np.asarray(slot, dtype=np.int64))])
    return out


def _cost(own: np.ndarray, slot: list[int], batching: str) -> int:
    if not slot:
        return 0
    taken = own[np.asarray(slot)]
    return int(taken.max()) * len(slot) if batching == "padded" else int(taken.sum())


def _share_packed(own: np.ndarray, by_length: np.ndarray, count: int) -> list[list[int]]:
    """Longest first into the slot with the least tokens (LPT: at most 4/3 of the best possible maximum; Graham
    1969).
    """
    heap = [(0, 0, i) for i in range(count)]
    slots: list[list[int]] = [[] for _ in range(count)]
    for j in by_length.tolist():
        load, held, i = heapq.heappop(heap)
        slots[i].append(j)
        heapq.heappush(heap, (load + int(own[j]), held + 1, i))
    return slots


def _share_padded(own: np.ndarray, by_length: np.ndarray, count: int) -> list[list[int]]:
    """Neighbours in length together; the smallest bound on rows x longest that needs no more than ``count`` slots."""
    order = by_length.tolist()
    if not order:
        return [[] for _ in range(count)]

    def cut(bound: int) -> list[list[int]]:
        slots: list[list[int]] = []
        for j in order:
            if slots and int(own[slots[-1][0]]) * (len(slots[-1]) + 1) <= bound:
                slots[-1].append(j)
            else:
                slots.append([j])
        return slots

    low, high = int(own.max()), int(own.max()) * len(order)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= count:
            high = middle
        else:
            low = middle + 1
    slots = cut(low)
    return slots + [[] for _ in range(count - len(slots))]
