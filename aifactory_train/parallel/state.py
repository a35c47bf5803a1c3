"""How an engine shows its state: every tensor as the boxes of it that this rank holds.

A checkpoint must not depend on who wrote it. So each engine describes a trained parameter (and each optimizer moment of
it) by its global shape and by *pieces*: boxes of the global tensor, each with a live view of this rank's memory. FSDP2
holds rows, ZeRO holds runs of the flattened tensor (cut into boxes here), DDP holds everything; names and global shapes
are the same.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch


@dataclass
class Piece:
    """One box: ``tensor`` (a live view, any device) lies at ``offsets`` of the global tensor."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass
class Sharded:
    """One global tensor as this rank holds it.

    ``owned`` says whether this rank writes its pieces into a checkpoint: of ranks that hold the same piece exactly one
    does.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece]
    owned: bool = True

    def nbytes(self) -> int:
        """Bytes of this rank's pieces."""
        return sum(p.tensor.numel() * p.tensor.element_size() for p in self.pieces)


#: Bytes a second of a whole checkpoint that even a busy file system writes.
SLOWEST = 20e6


def patience(model: dict[str, Sharded], timeout_s: float) -> datetime.timedelta:
    """How late a rank may be with its part of a save before the others give up: the time-out, and what writing may take
    (every parameter in fp32, with two moments)."""
    return datetime.timedelta(seconds=timeout_s + sum(12 * prod(entry.shape) for entry in model.values()) / SLOWEST)


def boxes(shape: tuple[int, ...], start: int, numel: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the run ``[start, start + numel)`` of the flattened tensor into boxes ``(offsets, sizes, position in the
    run)``.

    At most ``2 * ndim - 1`` boxes: a partial first row, whole rows, a partial last row, and so on inwards.
    """
    if numel <= 0:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (numel,) * len(shape), 0
        return
    row = prod(shape[1:])
    first, skipped = divmod(start, row)
    done = 0
    if skipped:
        head = min(row - skipped, numel)
        for offsets, sizes, at in boxes(shape[1:], skipped, head):
            yield (first, *offsets), (1, *sizes), at
        done, first = head, first + 1
    rows = (numel - done) // row
    if rows:
        yield (first, *[0] * (len(shape) - 1)), (rows, *shape[1:]), done
        done, first = done + rows * row, first + rows
    if done < numel:
        for offsets, sizes, at in boxes(shape[1:], 0, numel - done):
            yield (first, *offsets), (1, *sizes), done + at


def run_of(shape: tuple[int, ...], start: int, flat: torch.Tensor) -> list[Piece]:
    """The pieces of a run ``flat`` (1-D) that begins at position ``start`` of the flattened tensor of ``shape``."""
    return [
        Piece(offsets, flat.narrow(0, at, prod(sizes)).view(sizes))
        for offsets, sizes, at in boxes(shape, start, flat.numel())
    ]


def rows_of(shape: tuple[int, ...], first: int, rows: torch.Tensor) -> list[Piece]:
    """The one piece of a block of whole rows; none where the block is empty."""
    return [Piece((first, *[0] * (len(shape) - 1)), rows)] if rows.numel() else []
