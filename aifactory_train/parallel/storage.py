"""The files of a checkpoint: safetensors and JSON, digests, and how they are written and read.

Each rank writes the boxes of tensors that it owns into one safetensors file; ``metadata.json`` says which file holds
what (:mod:`aifactory_train.parallel.layout`). Reading a checkpoint never unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import file_digest, foreign, misfit, read_json, reading
from aifactory_train.parallel.layout import (
    describe_boxes,
    describe_runs,
    key_of,
    parts_for,
    run_of_pieces,
    state_file,
    stored_boxes,
    written,
)
from aifactory_train.parallel.state import Sharded
from aifactory_train.private import vault

#: What is written. Format 1 lists every box of every tensor, and keeps random numbers in a file a rank.
FORMAT = 2
READS = (1, 2)
MARKER = "COMPLETE"
#: Bytes written between two looks at the digest; also the size of the reads when digests are checked.
CHUNK = 8 * 2**20

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---- files


def write_file(path: Path, chunks: Iterator[memoryview | bytes]) -> dict[str, Any]:
    """Write and fsync a file; returns ``{"bytes", "sha256"}`` of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            put(file, chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_tensors(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """A safetensors file, encrypted as it is written (``NAME.aft``) under the privacy profile ``restricted``.

    Returns its entry in ``files`` of the marker; size and digest are those of the bytes on disk, so faults are found
    without a key.
    """
    chunks: Iterator[memoryview | bytes] = _safetensors(tensors)
    if vault.seals():
        name, chunks = name + ".aft", vault.seal_chunks(chunks)
    return {name: write_file(folder / name, chunks)}


def put(file: BinaryIO, chunk: memoryview | bytes) -> None:
    """All bytes of a checkpoint pass through here (the kill benchmark slows it down to die inside a save)."""
    file.write(chunk)


def bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a host tensor, in chunks of at most :data:`CHUNK`."""
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    view = memoryview(flat.data)
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def _safetensors(tensors: dict[str, torch.Tensor]) -> Iterator[memoryview | bytes]:
    """A safetensors file in chunks, one tensor after the other (the library would build the whole file in memory)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield from bytes_of(tensor)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n").encode()


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def self_digest(marker: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes({k: v for k, v in marker.items() if k != "sha256"})).hexdigest()


# ---- what the ranks write, and read


def write_state(folder: Path, rank: int, state: dict[str, Sharded], more: dict[str, torch.Tensor]) -> dict[str, Any]:
    """This rank's file: the pieces that it writes, and ``more``. Returns its entry in ``files`` of the marker."""
    tensors = {key_of(name, p.offsets): p.tensor for name, entry in state.items() for p in written(entry)}
    return write_tensors(folder, state_file(rank), tensors | more)


def gather_layout(state: dict[str, Sharded], group: dist.ProcessGroup) -> dict[str, Any] | None:
    """``metadata.json`` of what the ranks of ``group`` write, on its first rank; None on the others. Collective.

    Two integers a tensor and rank are sent, unless a tensor is not cut into runs somewhere or not known everywhere:
    then every box is. Raises :class:`RunFailed` on the first rank where a tensor is not written exactly once.
    """
    own = {name: run_of_pieces(entry) for name, entry in sorted(state.items())}
    known = hashlib.sha256(repr([(name, state[name].shape) for name in own]).encode()).digest()[:7]
    number = int.from_bytes(known, "big")
    regular = all(run is not None for run in own.values())
    same = torch.tensor([number, -number, int(not regular)])
    dist.all_reduce(same, op=dist.ReduceOp.MAX, group=group)
    if same.tolist() != [number, -number, 0]:
        return _gather_boxes(state, group)
    runs = torch.tensor([run or (0, 0) for run in own.values()], dtype=torch.int64).reshape(-1, 2)
    first = dist.get_rank(group) == 0
    parts = [torch.empty_like(runs) for _ in range(dist.get_world_size(group))] if first else None
    dist.gather(runs, parts, group_dst=0, group=group)
    if parts is None:
        return None
    return layout_of({name: (state[name].shape, state[name].dtype) for name in own}, torch.stack(parts).numpy())


def layout_of(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], runs: np.ndarray) -> dict[str, Any]:
    """``metadata.json`` where rank ``r`` writes of the ``i``-th of ``tensors`` (shape and type by name) the run
    ``runs[r, i]``: start and length, int64 ``[ranks, tensors, 2]``."""
    return {
        name: _described(name, shape, dtype, "runs", describe_runs(shape, runs[:, at, 0], runs[:, at, 1]))
        for at, (name, (shape, dtype)) in enumerate(tensors.items())
    }


def _gather_boxes(state: dict[str, Sharded], group: dist.ProcessGroup) -> dict[str, Any] | None:
    """:func:`gather_layout` box by box."""
    first = dist.get_rank(group) == 0
    mine = {
        name: (e.shape, e.dtype, [(tuple(p.offsets), tuple(p.tensor.shape)) for p in written(e)])
        for name, e in state.items()
    }
    parts: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(mine, parts, group_dst=0, group=group)
    if parts is None:
        return None
    facts = {name: (shape, dtype) for part in parts for name, (shape, dtype, _) in part.items()}
    return {
        name: _described(
            name, shape, dtype, "boxes", describe_boxes(shape, [part.get(name, (0, 0, ()))[2] for part in parts])
        )
        for name, (shape, dtype) in sorted(facts.items())
    }


def _described(name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str, how: Any) -> dict[str, Any]:
    if how is None:
        raise RunFailed(f"the ranks do not write every element of {name} exactly once")
    return {"shape": list(shape), "dtype": DTYPE_NAMES[dtype], kind: how}


def read_state(folder: Path, layout: dict[str, Any], state: dict[str, Sharded]) -> None:
    """Fill this rank's pieces in place from the files of a checkpoint, slice by slice: files are mapped, not read
    whole; encrypted ones are decrypted tensor by tensor. Raises :class:`UserError` for what is damaged or missing."""
    by_file: dict[str, list[tuple[str, Any, torch.Tensor]]] = {}
    for name, entry in state.items():
        for piece in entry.pieces:
            if not piece.tensor.numel():
                continue
            wanted = tuple(piece.offsets), tuple(piece.tensor.shape)
            for file, key, there, here in parts_for(name, layout[name], wanted):
                by_file.setdefault(file, []).append((key, there, piece.tensor.detach()[here]))
    for file, parts in sorted(by_file.items()):
        with vault.open_tensors(folder / file) as shard, foreign(folder / file, "holds other tensors than it should"):
            for key, there, target in parts:
                target.copy_(shard.get_slice(key)[there] if there else shard.get_tensor(key))


# ---- reading a checkpoint folder


def read_tree(folder: Path, name: str) -> Any:
    """A JSON file of a checkpoint; faults are named."""
    return read_json(folder / name, dict)


def read_marker(folder: Path) -> dict[str, Any]:
    """The COMPLETE marker. Raises :class:`UserError` where it is missing, damaged or of another format."""
    if not (folder / MARKER).is_file():
        raise UserError("has no COMPLETE marker: the save did not end", where=str(folder))
    with reading(folder / MARKER, "is no marker of a checkpoint"):
        return _checked_marker(folder, read_tree(folder, MARKER))


def _checked_marker(folder: Path, marker: dict[str, Any]) -> dict[str, Any]:
    if marker.get("format") not in READS:
        raise UserError(f"is not a marker of format {' or '.join(map(str, READS))}", where=str(folder / MARKER))
    if marker.get("sha256") != self_digest(marker):
        raise UserError("was changed after it was written (its digest differs)", where=str(folder / MARKER))
    step, files = marker.get("step"), marker.get("files")
    if folder.name.startswith("step-") and folder.name != f"step-{step}":
        raise UserError(f"is the checkpoint of step {step} under another step's name", where=str(folder))
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(f, dict) and f.keys() >= {"bytes", "sha256"} for f in files.values())
        or not all(
            misfit(marker.get(key), kind) is None for key, kind in (("step", int), ("world_size", int), ("engine", str))
        )
    ):
        raise UserError("does not list the files of a checkpoint", where=str(folder / MARKER))
    return marker


def faults(folder: Path, part: int = 0, parts: int = 1, marker: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with a checkpoint, by name of the file; empty if every size and digest is right.

    ``part`` of ``parts``: check only these files, so that ranks share the reading. ``marker``: what
    :func:`read_marker` gave, where it was read already.
    """
    try:
        marker = marker or read_marker(folder)
    except UserError as error:
        return [str(error)]
    found = []
    for name, entry in sorted(marker["files"].items())[part::parts]:
        path = folder / name
        try:
            size = path.stat().st_size
            if not path.is_file():  # a pipe would be waited for without end
                found.append(f"{path}: is no regular file")
            elif size != entry["bytes"]:
                found.append(f"{path}: has {size} bytes, {entry['bytes']} were written")
            elif file_digest(path) != entry["sha256"]:
                found.append(f"{path}: its content was changed (SHA-256 differs)")
        except FileNotFoundError:
            found.append(f"{path}: is missing")
        except (OSError, ValueError) as error:
            found.append(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
    return found


def steps_in(checkpoints: Path) -> list[int]:
    """Steps that have a folder, complete or not, newest first."""
    found = []
    for path in checkpoints.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and path.is_dir():
            found.append(int(number))
    return sorted(found, reverse=True)


class StoredParameters(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name (without ``prefix``), each read when it is asked for, without a process
    group.

    Memory: the tensor, and one of the boxes that ranks wrote of it.
    """

    def __init__(self, folder: Path, prefix: str = "model/"):
        self.folder, self.prefix = folder, prefix
        self.entries = {
            name.removeprefix(prefix): entry
            for name, entry in sorted(read_tree(folder, "metadata.json").items())
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        whole = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        for file, key, (offsets, sizes) in stored_boxes(self.prefix + name, entry, 0, prod(entry["shape"])):
            with vault.open_tensors(self.folder / file) as shard:
                where = tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))
                whole[where] = shard.get_tensor(key)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_parameters(folder: Path, prefix: str = "model/") -> Iterator[tuple[str, torch.Tensor]]:
    """``(parameter name, full tensor)`` one at a time: for export and comparison. Names come without ``prefix``."""
    yield from StoredParameters(folder, prefix).items()


def same_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that differ in any bit between two checkpoints, whatever wrote them. Empty: bitwise equal."""
    left, right = dict(read_parameters(one, "")), dict(read_parameters(other, ""))
    different = [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or not _same_bits(left[name], right[name])
    ]
    return different


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if prod(one.shape) == 0:
        return True
    return bool(torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)))
