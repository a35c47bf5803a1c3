"""Whatever the ranks write, a checkpoint holds every element once, is read by any other number of ranks, and says so in
words that do not grow with ranks times tensors.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.core.errors import RunFailed
from aifactory_train.parallel import storage
from aifactory_train.parallel.layout import describe_boxes, run_of_pieces, stored_boxes, written
from aifactory_train.parallel.state import Piece, Sharded, rows_of, run_of
from aifactory_train.parallel.storage import StoredParameters, layout_of, read_state, write_state

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)
WAYS = st.sampled_from(["rows", "flat", "whole", "copies", "columns"])


def spread(whole: dict[str, torch.Tensor], ranks: int, way: str) -> list[dict[str, Sharded]]:
    """The tensors as each rank holds them: rows as FSDP2 deals them (``copies``: two groups that take turns), equal
    shares of the flattened tensor as ZeRO does, whole, or columns (which are no run)."""
    worlds = []
    for rank in range(ranks):
        mine = {}
        for number, (name, tensor) in enumerate(whole.items()):
            shape = tuple(tensor.shape)
            copies = 2 if way == "copies" and ranks % 2 == 0 else 1
            shards, at = ranks // copies, rank % (ranks // copies)
            owned = True
            if way in ("rows", "copies") and shape:
                each = -(-shape[0] // shards)
                pieces = rows_of(shape, min(at * each, shape[0]), tensor[at * each : (at + 1) * each].clone())
                owned = number % copies == rank // shards
            elif way == "flat":
                each = -(-tensor.numel() // ranks)
                pieces = run_of(shape, min(rank * each, tensor.numel()), tensor.flatten()[rank * each :][:each].clone())
            elif way == "columns" and len(shape) > 1:
                each = -(-shape[1] // ranks)
                part = tensor[:, rank * each : (rank + 1) * each].clone()
                pieces = [Piece((0, rank * each, *[0] * (len(shape) - 2)), part)] if part.numel() else []
            else:
                pieces, owned = [Piece((0,) * len(shape), tensor.clone())], number % ranks == rank
            mine[name] = Sharded(shape, tensor.dtype, pieces, owned)
        worlds.append(mine)
    return worlds


def described(worlds: list[dict[str, Sharded]]) -> dict:
    """What ``gather_layout`` makes of the ranks' pieces, without ranks."""
    runs = [[run_of_pieces(entry) for entry in world.values()] for world in worlds]
    first = worlds[0]
    if all(run is not None for rank in runs for run in rank):
        facts = {name: (entry.shape, entry.dtype) for name, entry in first.items()}
        return layout_of(facts, np.asarray(runs, dtype=np.int64).reshape(len(worlds), -1, 2))
    found = {}
    for name, entry in first.items():
        held = [[(p.offsets, tuple(p.tensor.shape)) for p in written(w[name])] for w in worlds]
        boxes = describe_boxes(entry.shape, held)
        assert boxes is not None
        found[name] = {"shape": list(entry.shape), "dtype": "F32", "boxes": boxes}
    return found


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    ranks=st.integers(1, 6),
    way=WAYS,
    readers=st.integers(1, 5),
    other=WAYS,
)
def test_any_ranks_read_what_any_ranks_wrote(tmp_path_factory, shapes, ranks, way, readers, other):
    folder = tmp_path_factory.mktemp("layout")
    whole = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    worlds = spread(whole, ranks, way)
    layout = json.loads(json.dumps(described(worlds)))
    for rank, state in enumerate(worlds):
        write_state(folder, rank, state, {"random": torch.zeros(3, dtype=torch.uint8)})
    (folder / "metadata.json").write_text(json.dumps(layout))
    first = {  # the same as format 1 lists it
        name: {
            **{key: entry[key] for key in ("shape", "dtype")},
            "boxes": [
                {"offsets": list(offsets), "sizes": list(sizes), "file": file, "key": key}
                for file, key, (offsets, sizes) in stored_boxes(name, entry, 0, prod(entry["shape"]))
            ],
        }
        for name, entry in layout.items()
    }
    for reader in spread({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, readers, other):
        read_state(folder, first if ranks % 2 else layout, reader)
        for name, entry in reader.items():
            for piece in entry.pieces:
                cut = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))
                assert torch.equal(piece.tensor, whole[name][cut])
    assert all(torch.equal(whole[name], tensor) for name, tensor in StoredParameters(folder, "").items())


@pytest.mark.parametrize("way", ["rows", "flat", "whole", "copies"])
def test_the_layout_does_not_grow_with_ranks_times_tensors(way):
    """Of 60 tensors, 4,096 ranks are described in as many bytes as 8, but for the digits."""
    shapes = {f"model/layers.{i}.weight": (4096 + i, 64) for i in range(60)}

    def size(ranks: int) -> int:
        number, runs = np.arange(ranks), []
        for at, (rows, columns) in enumerate(shapes.values()):
            copies = 8 if way == "copies" else 1
            shards = ranks // copies
            each = {"flat": -(-rows * columns // ranks), "whole": 0}.get(way, -(-rows // shards) * columns)
            start = np.minimum(number % shards * each, rows * columns)
            numel = np.minimum(each, rows * columns - start) * (number // shards == at % copies)
            if way == "whole":
                start, numel = 0 * number, rows * columns * (number == at % ranks)
            runs.append(np.stack([start, numel], axis=1))
        facts = {name: (shape, torch.float32) for name, shape in shapes.items()}
        return len(json.dumps(layout_of(facts, np.stack(runs, axis=1))))

    assert size(4096) < size(8) + 60 * 50


def test_shares_of_one_flat_buffer_cost_a_few_numbers_a_rank():
    """ZeRO 1 and 2 cut the concatenation of all tensors: a rank adds a boundary, not a box a tensor."""

    def size(ranks: int) -> int:
        lengths = np.full(60, 64 * 4096)
        ends = np.cumsum(lengths)
        cuts = np.linspace(0, ends[-1], ranks + 1).astype(int)
        low = np.clip(cuts[:-1, None], ends - lengths, ends) - (ends - lengths)
        high = np.clip(cuts[1:, None], ends - lengths, ends) - (ends - lengths)
        facts = {f"t{i}": ((4096, 64), torch.float32) for i in range(60)}
        return len(json.dumps(layout_of(facts, np.stack([low, high - low], axis=2))))

    assert (size(4096) - size(8)) / 4088 < 100


def test_what_is_written_twice_or_not_at_all_is_refused():
    facts = {"w": ((4, 2), torch.float32)}
    for runs in ([[0, 4], [3, 4]], [[0, 4], [5, 3]], [[0, 8], [0, 8]], [[0, 0], [0, 0]], [[0, 4], [4, 3]]):
        with pytest.raises(RunFailed, match="exactly once"):
            layout_of(facts, np.asarray(runs, dtype=np.int64)[:, None])
    whole, half = ((0, 0), (4, 2)), ((0, 0), (4, 1))
    assert describe_boxes((4, 2), [[half], [((0, 1), (4, 1))]]) is not None
    assert describe_boxes((4, 2), [[half], [half]]) is None and describe_boxes((4, 2), [[whole], [half]]) is None


def test_a_part_that_is_missing_is_named(tmp_path: Path):
    tensor = torch.arange(8.0).reshape(4, 2)
    first = {"w": Sharded((4, 2), torch.float32, rows_of((4, 2), 0, tensor[:2]))}
    write_state(tmp_path, 0, first, {})
    layout = {"w": {"shape": [4, 2], "dtype": "F32", "runs": [[0, 0, 4, 1, 1]]}}
    target = {"w": Sharded((4, 2), torch.float32, rows_of((4, 2), 0, torch.zeros(4, 2)))}
    with pytest.raises(RunFailed, match="only a part of w"):
        read_state(tmp_path, layout, target)


def test_ranks_that_know_other_tensors_are_gathered_box_by_box(monkeypatch):
    """Pipeline stages hold tensors of their own: two ranks, whose collectives are played here."""
    worlds = [
        {"a": Sharded((2, 2), torch.float32, [Piece((0, 0), torch.ones(2, 2))])},
        {"b": Sharded((3,), torch.bfloat16, [Piece((0,), torch.ones(3))])},
    ]
    sent: list = []

    def gather_object(mine, parts, **more):
        sent.append(mine)
        if parts is not None:
            parts[:] = [mine, *sent[:1]]

    played = SimpleNamespace(
        ReduceOp=SimpleNamespace(MAX=None),
        all_reduce=lambda tensor, **more: tensor.copy_(torch.tensor([5, 5, 0])),
        get_world_size=lambda group: 2,
        gather_object=gather_object,
    )
    monkeypatch.setattr(storage, "dist", played)
    played.get_rank = lambda group: 1
    assert storage.gather_layout(worlds[1], None) is None
    played.get_rank = lambda group: 0
    found = storage.gather_layout(worlds[0], None)
    boxes = [
        {"offsets": offsets, "sizes": sizes, "file": f"state-0000{rank}.safetensors"}
        for rank, (offsets, sizes) in enumerate([([0, 0], [2, 2]), ([0], [3])])
    ]
    assert found == {
        "a": {"shape": [2, 2], "dtype": "F32", "boxes": boxes[:1]},
        "b": {"shape": [3], "dtype": "BF16", "boxes": boxes[1:]},
    }
