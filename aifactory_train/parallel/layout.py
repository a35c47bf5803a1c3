"""Which file of a checkpoint holds which part of a tensor, in words that do not grow with the number of ranks.

Every engine gives a rank one run of the flattened tensor: some rows, a share of a flat buffer, the whole. So a tensor's
layout is ``runs``, ``[file, start, numel, count, stride]``: ``count`` files (``file``, ``file + stride``, …) hold
``numel`` elements each, one run behind the other from ``start``. What is no run is listed box by box (``boxes``), as
format 1 lists everything. A run lies in its file as the boxes that :func:`aifactory_train.parallel.state.boxes` cuts it
into, each under :func:`key_of`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from aifactory_train.core.errors import RunFailed
from aifactory_train.parallel.state import Piece, Sharded, boxes

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def state_file(rank: int) -> str:
    """The file that ``rank`` writes."""
    return f"state-{rank:05d}.safetensors"


def key_of(name: str, offsets: Sequence[int]) -> str:
    """Under which key a box of tensor ``name`` lies in its file."""
    return f"{name}@{','.join(map(str, offsets))}"


def _flat(shape: Sequence[int], place: Sequence[int]) -> int:
    """Position of the element at ``place`` in the flattened tensor."""
    at = 0
    for size, index in zip(shape, place, strict=True):
        at = at * size + index
    return at


def run_of_pieces(entry: Sharded) -> tuple[int, int] | None:
    """``(start, numel)`` of the run that this rank writes of a tensor, ``(0, 0)`` if it writes nothing; None where its
    pieces are no run."""
    held = written(entry)
    if not held:
        return 0, 0
    start, numel = _flat(entry.shape, held[0].offsets), sum(piece.tensor.numel() for piece in held)
    cut = [(offsets, sizes) for offsets, sizes, _ in boxes(entry.shape, start, numel)]
    return (start, numel) if cut == [(tuple(p.offsets), tuple(p.tensor.shape)) for p in held] else None


def written(entry: Sharded) -> list[Piece]:
    """The pieces that this rank writes; empty ones are left out."""
    return [piece for piece in entry.pieces if piece.tensor.numel()] if entry.owned else []


def describe_runs(shape: Sequence[int], starts: np.ndarray, numels: np.ndarray) -> list[list[int]] | None:
    """The ``runs`` of a tensor of which file ``i`` holds ``numels[i]`` elements from ``starts[i]`` (int64 ``[files]``).

    None where they do not hold every element exactly once.
    """
    files = np.flatnonzero(numels)
    files = files[np.argsort(starts[files], kind="stable")]
    begin, size = starts[files], numels[files]
    ends = np.cumsum(size)
    if int(size.sum()) != prod(shape) or not np.array_equal(begin, ends - size):
        return None
    found: list[list[int]] = []
    at = 0
    while at < len(files):
        stride = int(files[at + 1] - files[at]) if at + 1 < len(files) and size[at + 1] == size[at] else 1
        same = (size[at:] == size[at]) & (files[at:] == files[at] + stride * np.arange(len(files) - at))
        count = len(same) if same.all() else int(same.argmin())
        found.append([int(files[at]), int(begin[at]), int(size[at]), count, stride])
        at += count
    return found


def describe_boxes(shape: Sequence[int], held: Sequence[Sequence[Box]]) -> list[dict[str, Any]] | None:
    """The ``boxes`` of a tensor of which file ``i`` holds the boxes ``held[i]``. None where they do not hold every
    element exactly once."""
    listed = sorted((box, file) for file, own in enumerate(held) for box in own)
    if sum(prod(sizes) for (_, sizes), _ in listed) != prod(shape):
        return None
    near: list[Box] = []  # those before it that reach as far as its first row
    for box, _ in listed:
        near = [other for other in near if other[0][0] + other[1][0] > box[0][0]]
        if any(_overlap(box, other) for other in near):
            return None
        near.append(box)
    return [{"offsets": list(o), "sizes": list(s), "file": state_file(file)} for (o, s), file in listed]


def _overlap(one: Box, other: Box) -> Box | None:
    """The box (offsets in the tensor, sizes) that two boxes share; None where they share none."""
    low = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    high = [min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True)]
    sizes = tuple(h - at for at, h in zip(low, high, strict=True))
    return (low, sizes) if all(size > 0 for size in sizes) else None


def stored_boxes(name: str, entry: dict[str, Any], lowest: int, end: int) -> Iterator[tuple[str, str, Box]]:
    """``(file, key, box)`` of what is stored of a tensor; of runs only those with elements from ``lowest`` to ``end``
    of the flattened tensor."""
    for listed in entry.get("boxes", ()):
        box = tuple(listed["offsets"]), tuple(listed["sizes"])
        yield listed["file"], listed.get("key") or key_of(name, box[0]), box
    for file, start, numel, count, stride in entry.get("runs", ()):
        first, last = max(0, (lowest - start) // numel), min(count - 1, (end - 1 - start) // numel)
        for number in range(first, last + 1):
            for offsets, sizes, _ in boxes(tuple(entry["shape"]), start + number * numel, numel):
                yield state_file(file + number * stride), key_of(name, offsets), (offsets, sizes)


def parts_for(name: str, entry: dict[str, Any], wanted: Box) -> Iterator[tuple[str, str, Any, Any]]:
    """``(file, key, slices of the stored box, slices of the wanted box)`` that fill the box ``wanted`` of a tensor.

    Raises :class:`RunFailed` where the checkpoint does not hold all of it.
    """
    shape, missing = entry["shape"], prod(wanted[1])
    last = [at + size - 1 for at, size in zip(*wanted, strict=True)]
    for file, key, box in stored_boxes(name, entry, _flat(shape, wanted[0]), _flat(shape, last) + 1):
        shared = _overlap(wanted, box)
        if shared is None:
            continue
        missing -= prod(shared[1])
        there, here = (
            tuple(slice(at - first, at - first + size) for at, size, first in zip(*shared, frame[0], strict=True))
            for frame in (box, wanted)
        )
        yield file, key, there, here
    if missing:
        raise RunFailed(f"the checkpoint holds only a part of {name}")
