"""The files of a checkpoint: safetensors and JSON behind torch.distributed.checkpoint, digests, and how they are read.

torch.distributed.checkpoint plans who writes and who reads which box of a tensor; its own storage keeps the plan in a
pickle. Here the plan is ``metadata.json`` and the boxes are safetensors, so reading a checkpoint never unpickles
anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import file_digest, misfit, read_json, reading
from aifactory_train.parallel.state import Piece, Sharded
from aifactory_train.private import vault

FORMAT = 1
MARKER = "COMPLETE"
#: Bytes written between two looks at the digest; also the size of the reads when digests are checked.
CHUNK = 8 * 2**20

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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


# ---- planning and storage, behind torch.distributed.checkpoint


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)


class PieceSavePlanner(DefaultSavePlanner):
    """Each rank writes the pieces it owns; torch checks that together they cover every tensor exactly once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items, self.tensors = [], {}
        for name, entry in self.state_dict.items():
            for piece in entry.pieces if entry.owned else ():
                index = MetadataIndex(name, torch.Size(piece.offsets))
                data = TensorWriteData(_chunk(piece), TensorProperties(dtype=entry.dtype), torch.Size(entry.shape))
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
                self.tensors[index] = piece.tensor
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.tensors[write_item.index]


class PieceLoadPlanner(DefaultLoadPlanner):
    """Each rank reads what overlaps its pieces, straight into the views of its memory."""

    def __init__(self, state: dict[str, Sharded]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state = state

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The default looks for meta tensors to allocate inside the values, and would empty ours.
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        requests, self.tensors = [], {}
        for name, entry in self.state.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)  # the only kind that these files hold
            chunks = []
            for piece in entry.pieces:
                self.tensors[MetadataIndex(name, torch.Size(piece.offsets))] = piece.tensor
                chunks.append(_chunk(piece))
            requests += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.tensors[index]


class SafetensorsWriter(StorageWriter):
    """One safetensors file per rank, one metadata.json from rank 0. ``written`` are this rank's files and digests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        self.written = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data=f"state-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: Any) -> torch.futures.Future[list[WriteResult]]:
        name, tensors, results = plan.storage_data, {}, []
        for item in plan.items:
            key = f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"
            tensors[key] = planner.resolve_data(item)
            results.append(WriteResult(item.index, tensors[key].nbytes, (name, key)))
        self.written |= write_tensors(self.folder, name, tensors)
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for part in results for result in part}
        tree = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            boxes = []
            for chunk in entry.chunks:
                file, key = places[MetadataIndex(name, chunk.offsets)]
                boxes.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": file, "key": key})
            tree[name] = {"shape": list(entry.size), "dtype": DTYPE_NAMES[entry.properties.dtype], "boxes": boxes}
        self.written["metadata.json"] = write_file(self.folder / "metadata.json", iter([json_bytes(tree)]))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads what :class:`SafetensorsWriter` wrote, slice by slice (files are mapped, not read whole; encrypted ones
    tensor by tensor).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries = {}
        for name, entry in read_tree(self.folder, "metadata.json").items():
            chunks = []
            for box in entry["boxes"]:
                chunk = ChunkStorageMetadata(torch.Size(box["offsets"]), torch.Size(box["sizes"]))
                self.places[MetadataIndex(name, chunk.offsets)] = (box["file"], box["key"])
                chunks.append(chunk)
            properties = TensorProperties(dtype=_DTYPES[entry["dtype"]])
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(entries)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> torch.futures.Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            file, key = self.places[item.storage_index]
            by_file[file].append((key, item))
        for file, items in sorted(by_file.items()):
            with vault.open_tensors(self.folder / file) as shard:
                for key, item in items:
                    box = tuple(
                        slice(at, at + size) for at, size in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(shard.get_slice(key)[box])
                    planner.commit_tensor(item, target)
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


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
    if marker.get("format") != FORMAT:
        raise UserError(f"is not a marker of format {FORMAT}", where=str(folder / MARKER))
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


def faults(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, by name of the file; empty if every size and digest is right.

    ``part`` of ``parts``: check only these files, so that ranks share the reading.
    """
    try:
        marker = read_marker(folder)
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
        self.folder = folder
        self.entries = {
            name.removeprefix(prefix): entry
            for name, entry in sorted(read_tree(folder, "metadata.json").items())
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        whole = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        for box in entry["boxes"]:
            with vault.open_tensors(self.folder / box["file"]) as shard:
                where = tuple(slice(at, at + n) for at, n in zip(box["offsets"], box["sizes"], strict=True))
                whole[where] = shard.get_tensor(box["key"])
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
