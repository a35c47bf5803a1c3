"""Which documents make up which optimizer step: a pure function of (seed, epoch, cursor), whatever the number of ranks.

Nothing is drawn from a generator whose stream could change with a library's version: the order of an epoch is the order
of a hash (SplitMix64 [1]) of seed, epoch and document. Resuming therefore needs two integers, and a run continued on
another number of GPUs sees the same documents in the same steps.

[1] Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Cursor:
    """Where the data stands: documents of ``epoch`` (from 0) that were already used. JSON: ``[epoch, position]`` by
    asdict.
    """

    epoch: int = 0
    position: int = 0


def splitmix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 [n]; a bijection."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_order(n: int, seed: int, epoch: int, salt: int = 0) -> np.ndarray:
    """A permutation of ``range(n)``, int64 [n], that depends on the arguments alone."""
    key = np.asarray([seed & (2**64 - 1)], dtype=np.uint64)
    for part in (epoch, salt):
        key = splitmix64(key ^ np.asarray([part & (2**64 - 1)], dtype=np.uint64))
    with np.errstate(over="ignore"):
        keys = splitmix64(np.arange(n, dtype=np.uint64) ^ splitmix64(key)[0])
    return np.argsort(splitmix64(keys + key[0]), kind="stable")


class Sampler:
    """Documents of each optimizer step over *all* ranks.

    Args:
        dataset_lengths: int [num_docs], tokens of each document.
        weights: float [num_docs] or None: how often a document is seen in an epoch. Documents of equal weight ``w``
        form a
            group of ``n``; each is seen ``floor(w)`` times and ``round(frac(w) * n)`` of them, others in each epoch,
            once more.
        seed: decides the order.
        batch_rows: documents per step. An epoch that does not divide evenly is cut into steps that differ by at most
        one
            document, so that no step is tiny.
        batch_tokens: or: as many documents, in order, as fit into so many tokens (at least one).
    """

    def __init__(
        self,
        dataset_lengths: np.ndarray,
        weights: np.ndarray | None = None,
        seed: int = 17,
        batch_rows: int | None = None,
        batch_tokens: int | None = None,
    ):
        if (batch_rows is None) == (batch_tokens is None):
            raise ValueError("give batch_rows or batch_tokens")
        self.lengths = np.asarray(dataset_lengths)
        if len(self.lengths) == 0:
            raise ValueError("a sampler needs at least one document")
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self.seed, self.batch_rows, self.batch_tokens = int(seed), batch_rows, batch_tokens
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None
        self._steps: dict[int, int] = {}

    def order(self, epoch: int) -> np.ndarray:
        """All documents of an epoch in their order, int64."""
        return self._epoch(epoch)[0]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        known = self._cached  # read once: another thread may ask for the next epoch meanwhile
        if known is None or known[0] != epoch:
            docs = self._seen(epoch)
            docs = docs[hash_order(len(docs), self.seed, epoch)]
            ends = np.cumsum(self.lengths[docs], dtype=np.int64) if self.batch_tokens else np.empty(0, dtype=np.int64)
            self._cached = known = (epoch, docs, ends)
        return known[1], known[2]

    def _seen(self, epoch: int) -> np.ndarray:
        n = len(self.lengths)
        if self.weights is None or bool((self.weights == 1.0).all()):
            return np.arange(n, dtype=np.int64)
        parts = []
        for number, weight in enumerate(np.unique(self.weights)):
            group = np.flatnonzero(self.weights == weight)
            whole = math.floor(weight)
            parts += [group] * whole
            extra = round((float(weight) - whole) * len(group))
            if whole == 0 and extra == 0:
                extra = 1  # a small weight still means: sometimes
            if extra:
                parts.append(group[hash_order(len(group), self.seed, epoch, salt=number + 1)[:extra]])
        return np.concatenate(parts).astype(np.int64)

    def step(self, cursor: Cursor) -> tuple[np.ndarray, Cursor]:
        """Documents of the step at ``cursor`` (int64) and the cursor behind it. The epoch's end leads into the next
        one.
        """
        docs, ends = self._epoch(cursor.epoch)
        if cursor.position >= len(docs):
            return self.step(Cursor(cursor.epoch + 1, 0))
        stop = self._stop(cursor.position, len(docs), ends)
        following = Cursor(cursor.epoch, stop) if stop < len(docs) else Cursor(cursor.epoch + 1, 0)
        return docs[cursor.position : stop], following

    def mark_seen(self, seen: np.ndarray, steps: int) -> None:
        """Set the bools of the documents that the first ``steps`` steps use in ``seen`` ``[documents]``."""
        cursor = Cursor(0, 0)
        for _ in range(steps):
            if seen.all():
                return
            documents, cursor = self.step(cursor)
            seen[documents] = True

    def _stop(self, position: int, n: int, ends: np.ndarray) -> int:
        if self.batch_rows is not None:
            left = n - position
            return position + math.ceil(left / math.ceil(left / self.batch_rows))
        base = int(ends[position - 1]) if position else 0
        stop = int(np.searchsorted(ends, base + int(self.batch_tokens or 0), side="right"))
        return max(stop, position + 1)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of one epoch (with ``batch_tokens`` it can differ between epochs)."""
        if self.batch_rows is not None:
            return math.ceil(len(self._seen(epoch)) / self.batch_rows)
        if epoch not in self._steps:
            docs, ends = self._epoch(epoch)
            position = count = 0
            while position < len(docs):
                position = self._stop(position, len(docs), ends)
                count += 1
            self._steps[epoch] = count
        return self._steps[epoch]

    def steps(self, epochs: float, at_most: int | None = None) -> int:
        """Optimizer steps of ``epochs``; a fraction of the last epoch is rounded up. At least one, ``at_most`` if
        given.
        """
        total = 0
        for epoch in range(math.ceil(epochs)):
            total += math.ceil(min(1.0, epochs - epoch) * self.steps_per_epoch(epoch))
            if at_most is not None and total >= at_most:
                return max(1, at_most)
        return max(1, total)


def split_step(
    docs: np.ndarray,
    lengths: np.ndarray,
    data_ranks: int,
    grad_accum: int | str = "auto",
    micro_batch_tokens: int = 4096,
    batching: str = "packed",
) -> Shares:
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
    own = np.asarray(lengths)[docs].astype(np.int64)
    # Longest first; the place in the step breaks ties, so equal lengths keep their order.
    by_length = stable_order(own.max() - own) if len(own) else np.empty(0, dtype=np.int64)
    sizes = own[by_length]
    share = _share_padded if batching == "padded" else _share_packed
    if grad_accum == "auto":
        accum = max(1, math.ceil(int(own.sum()) / (data_ranks * micro_batch_tokens)))
        while True:
            slot = share(sizes, data_ranks * accum)
            cost = _costs(sizes, slot, data_ranks * accum, batching)
            if int(cost.max()) <= micro_batch_tokens or accum >= len(docs):
                break
            accum += 1
    else:
        accum = int(grad_accum)
        slot = share(sizes, data_ranks * accum)
        cost = _costs(sizes, slot, data_ranks * accum, batching)
    count = data_ranks * accum
    first = np.full(
        count, -1, dtype=np.int64
    )  # the longest document of each slot; the empty ones come first among equals
    first[slot[::-1]] = by_length[::-1]  # of several assignments the last one stays
    dearest = np.lexsort((first, -cost))
    place, spent = np.empty(count, dtype=np.int64), np.zeros(data_ranks, dtype=np.int64)
    for micro in range(accum):
        # Of the next `data_ranks` slots, the most expensive goes to the rank that has had the least so far.
        ranks = np.argsort(spent, kind="stable")
        mine = dearest[micro * data_ranks : (micro + 1) * data_ranks]
        place[mine] = ranks * accum + micro
        spent[ranks] += cost[mine]
    placed = np.empty(len(docs), dtype=np.int64)
    placed[by_length] = place[slot]
    ends = np.concatenate([[0], np.cumsum(np.bincount(placed, minlength=count))])
    return Shares(docs[stable_order(placed)], ends, accum)


class Shares(Sequence[list[np.ndarray]]):
    """``[rank][micro] -> documents``, cut out when it is asked for: each rank of thousands needs its own part alone.

    Args:
        dealt: int64 [n], documents of the step by rank and micro-batch.
        ends: int64 [ranks * micros + 1], where each micro-batch begins in ``dealt``, and the end.
        micros: micro-batches a rank.
    """

    def __init__(self, dealt: np.ndarray, ends: np.ndarray, micros: int):
        self.dealt, self.ends, self.micros = dealt, ends, micros

    def __len__(self) -> int:
        return (len(self.ends) - 1) // self.micros

    @overload
    def __getitem__(self, rank: int) -> list[np.ndarray]: ...
    @overload
    def __getitem__(self, rank: slice) -> list[list[np.ndarray]]: ...
    def __getitem__(self, rank: int | slice) -> list[np.ndarray] | list[list[np.ndarray]]:
        if isinstance(rank, slice):
            return [self[one] for one in range(*rank.indices(len(self)))]
        first = range(len(self))[rank] * self.micros
        cuts = self.ends[first : first + self.micros + 1].tolist()
        return [self.dealt[begin:end] for begin, end in itertools.pairwise(cuts)]

    def longest(self, lengths: np.ndarray) -> np.ndarray:
        """For each document dealt, the length of the longest in its micro-batch (what padding makes of it).

        ``lengths``: int [num_docs], of all documents; returns int64 [n] in the order of ``dealt``.
        """
        held = np.diff(self.ends)
        if not len(self.dealt):
            return np.empty(0, dtype=np.int64)
        most = np.maximum.reduceat(np.asarray(lengths)[self.dealt], self.ends[:-1][held > 0])
        return np.repeat(most.astype(np.int64), held[held > 0])


def stable_order(keys: np.ndarray) -> np.ndarray:
    """``np.argsort(keys, kind="stable")`` of integers from 0 to 2^32: NumPy sorts 16 bits at a time in linear time."""
    if not len(keys) or int(keys.max()) >> 32 or int(keys.min()) < 0:
        return np.argsort(keys, kind="stable")
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    if int(keys.max()) >> 16:
        order = order[np.argsort((keys[order] >> 16).astype(np.uint16), kind="stable")]
    return order


def _costs(sizes: np.ndarray, slot: np.ndarray, count: int, batching: str) -> np.ndarray:
    """What each of ``count`` slots costs, int64; ``sizes`` descend, ``slot`` says where each document is."""
    held = np.bincount(slot, minlength=count)
    if batching != "padded":
        return np.bincount(slot, weights=sizes, minlength=count).astype(np.int64)
    longest = np.zeros(count, dtype=np.int64)
    longest[slot[::-1]] = sizes[::-1]  # of several assignments the last one stays
    return longest * held


#: Below so many documents placed at once, one after the other is faster.
_TOGETHER = 64


def _share_packed(sizes: np.ndarray, count: int) -> np.ndarray:
    """Longest first into the slot with the least tokens (LPT: at most 4/3 of the best possible maximum; Graham 1969),
    among equals with the fewest documents. ``sizes`` int64 ``[n]`` descend; returns each document's slot.

    Many at once: in the order of their loads, slots take one document each as long as none before them is, with its new
    one, still the least loaded.
    """
    n = len(sizes)
    slot = np.empty(n, dtype=np.int64)
    load, held, number = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64), np.arange(count)
    done = 0
    while done < n:
        free = np.lexsort((number, held, load))[: n - done]
        before = load[free]
        after = before + sizes[done : done + len(free)]
        # Of equal loads, the one with the fewer documents is first: a slot that has just taken one may come behind or
        # before.
        least = np.minimum.accumulate(after)[:-1]
        late = np.flatnonzero(before[1:] >= least)
        taken = int(late[0]) + 1 if len(late) else len(free)
        if taken < min(_TOGETHER, n - done):
            return _one_by_one(sizes, slot, done, load, held)
        mine = free[:taken]
        slot[done : done + taken] = mine
        load[mine], held[mine] = after[:taken], held[mine] + 1
        done += taken
    return slot


def _one_by_one(sizes: np.ndarray, slot: np.ndarray, done: int, load: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The rest of :func:`_share_packed` from document ``done`` on."""
    heap = list(zip(load.tolist(), held.tolist(), range(len(load)), strict=True))
    heapq.heapify(heap)
    for j, size in enumerate(sizes[done:].tolist(), start=done):
        least, documents, i = heap[0]
        slot[j] = i
        heapq.heapreplace(heap, (least + size, documents + 1, i))
    return slot


def _share_padded(sizes: np.ndarray, count: int) -> np.ndarray:
    """Neighbours in length together; the smallest bound on rows x longest that needs no more than ``count`` slots.
    ``sizes`` int64 ``[n]`` descend; returns each document's slot."""
    n = len(sizes)
    if not n:
        return np.empty(0, dtype=np.int64)
    longest = sizes.tolist()

    def begins(bound: int) -> list[int]:
        """Where each slot begins; cut short where they are too many."""
        found: list[int] = []
        at = 0
        while at < n and len(found) <= count:
            found.append(at)
            at += max(1, bound // longest[at]) if longest[at] else n
        return found

    low = max(longest[0], -(-int(sizes.sum()) // count))  # no slot costs less than its tokens
    high = low
    while len(begins(high)) > count:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if len(begins(middle)) <= count:
            high = middle
        else:
            low = middle + 1
    marks = np.zeros(n, dtype=np.int64)
    marks[begins(low)[1:]] = 1
    return np.cumsum(marks)
