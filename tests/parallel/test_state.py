"""Boxes of global tensors: any run of the flattened tensor is cut into boxes that cover it once, in order."""

from __future__ import annotations

import itertools
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train.parallel.state import boxes, rows_of, run_of

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_cover_the_run_and_nothing_else(shape: tuple[int, ...], data: st.DataObject) -> None:
    total = prod(shape)
    start = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - start))
    seen = torch.zeros(shape, dtype=torch.int64)
    found = list(boxes(shape, start, count))
    for offsets, sizes, _ in found:
        seen[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    expected = torch.zeros(total, dtype=torch.int64)
    expected[start : start + count] = 1
    assert torch.equal(seen.flatten(), expected)
    assert len(found) <= 2 * len(shape) - 1


@given(shapes, st.data())
def test_pieces_are_live_views_that_rebuild_the_tensor(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Any way to cut the flattened tensor into runs (as ZeRO's partitions do) gives pieces that rebuild it."""
    whole = torch.arange(prod(shape), dtype=torch.float32)
    cuts = sorted({0, prod(shape), *data.draw(st.lists(st.integers(0, prod(shape)), max_size=3))})
    rebuilt = torch.full(shape, -1.0)
    for begin, end in itertools.pairwise(cuts):
        flat = whole[begin:end].clone()
        for piece in run_of(shape, begin, flat):
            rebuilt[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.tensor.shape, strict=True))] = (
                piece.tensor
            )
            piece.tensor.add_(1)  # writes through
        assert torch.equal(flat, whole[begin:end] + 1)
    assert torch.equal(rebuilt.flatten(), whole)


def test_an_empty_block_of_rows_has_no_piece() -> None:
    assert rows_of((3, 4), 3, torch.empty(0, 4)) == []
    (piece,) = rows_of((3, 4), 1, torch.ones(2, 4))
    assert piece.offsets == (1, 0)
