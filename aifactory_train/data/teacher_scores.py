"""A teacher's stored log-probabilities: what ``aifactory teach`` writes and ``methods.distill`` reads.

A folder of ``part-DIGEST.safetensors``, each written once and whole, in any order and by any number of processes:

=============  ===========================  =====================================================================
tensor         type                         content
=============  ===========================  =====================================================================
``documents``  int64 ``[docs]``             :func:`document_key` of each document (tokens and mask)
``counts``     int32 ``[docs]``             its supervised targets
``nll``        fp32 ``[docs]``              nats of the document's targets under the teacher, at temperature 1
``ids``        uint16 or int32 ``[N, k]``   the likeliest tokens of each target, documents end to end
``logps``      fp16 ``[N, k]``              their log-probabilities
``rest``       fp32 ``[N]``                 logarithm of the probability of all other tokens together
=============  ===========================  =====================================================================

The header says whose they are (:class:`TeacherId`), a digest of the tensors and the licence. Documents are found by
their content, never by their place: rows may be sorted, dropped or added.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.private.permissions import folder_mode

if TYPE_CHECKING:
    from aifactory_train.data.store import TokenDataset

FORMAT = "aifactory teacher scores 1"
_NAMES = ("documents", "counts", "nll", "ids", "logps", "rest")
_AGAIN = "move the part away and run 'aifactory teach' again: what is missing is computed anew"


@dataclass(frozen=True)
class TeacherId:
    """Whose log-probabilities these are: ``teacher`` and ``revision`` as the recipe names them, ``weights`` and
    ``vocabulary`` digests of its files and of its tokens, ``tokens`` their number.
    """

    teacher: str
    revision: str | None
    weights: str
    vocabulary: str
    tokens: int
    top_k: int
    temperature: float


def vocabulary_digest(tokens: dict[str, int]) -> str:
    """Of the tokens of a vocabulary and their ids, however they are ordered."""
    ordered = sorted(tokens.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(ordered, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def document_key(dataset: TokenDataset, i: int) -> int:
    """64 bits of the content of document ``i``: its tokens, and which of them carry loss."""
    found = hashlib.sha256(dataset.tokens(i).astype("<u4").tobytes())
    found.update(np.packbits(dataset.mask(i)).tobytes())
    return int.from_bytes(found.digest()[:8], "little", signed=True)


def bytes_per_target(top_k: int, tokens: int) -> int:
    """Bytes that a supervised target takes."""
    return top_k * (2 if tokens <= 1 << 16 else 4) + 2 * top_k + 4


def write_part(
    folder: Path, identity: TeacherId, licence: str, documents: Sequence[int], found: Sequence[dict[str, np.ndarray]]
) -> Path:
    """Write the documents' ``ids`` ``[n, k]``, ``logps`` ``[n, k]``, ``rest`` and ``nll`` ``[n]`` of their targets as
    one part. Raises :class:`RunFailed` where the disk does not take it.
    """
    from safetensors.numpy import save

    narrow = np.dtype("uint16") if identity.tokens <= 1 << 16 else np.dtype("int32")
    tensors: dict[str, np.ndarray] = {
        "documents": np.asarray(documents, dtype=np.int64),
        "counts": np.asarray([len(one["rest"]) for one in found], dtype=np.int32),
        "nll": np.asarray([one["nll"].sum(dtype=np.float64) for one in found], dtype=np.float32),
        "ids": np.concatenate([one["ids"] for one in found]).astype(narrow),
        "logps": np.concatenate([one["logps"] for one in found]).astype(np.float16),
        "rest": np.concatenate([one["rest"] for one in found]).astype(np.float32),
    }
    digest = _digest(tensors)
    header = {
        "format": FORMAT,
        "identity": json.dumps(asdict(identity)),
        "digest": digest,
        "licence": licence,
    }
    path = folder / f"part-{digest[:16]}.safetensors"
    beside = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with beside.open("wb") as file:
            file.write(save(tensors, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(path)) from None
    return path


def _digest(tensors: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in _NAMES:
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


class _Part:
    """One opened part; large tensors are read as they are asked for."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self.file: Any = safe_open(str(path), framework="numpy")
            header = self.file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(f"is no part of stored log-probabilities ({FORMAT})", where=str(path), fix=_AGAIN)
            self.identity = TeacherId(**json.loads(header["identity"]))
            self.digest, self.licence = header["digest"], header["licence"]
            self.nll: np.ndarray = self.file.get_tensor("nll")
            self.documents: np.ndarray = self.file.get_tensor("documents")
            self.counts: np.ndarray = self.file.get_tensor("counts")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"is damaged: {error}", where=str(path), fix=_AGAIN) from None
        self.ends = np.cumsum(self.counts.astype(np.int64))
        self.slices = {name: self.file.get_slice(name) for name in ("ids", "logps", "rest")}

    def rows(self, at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        end = int(self.ends[at])
        start = end - int(self.counts[at])
        return tuple(self.slices[name][start:end] for name in ("ids", "logps", "rest"))  # type: ignore[return-value]


class TeacherScores:
    """The parts of a folder, opened to read. ``identity`` is None where there are none."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts = [_Part(path) for path in sorted(folder.glob("part-*.safetensors"))]
        first = self.parts[0].identity if self.parts else None
        self.identity = first
        for part in self.parts:
            if part.identity != first:
                raise UserError(
                    f"parts of two teachers lie together: {_differs(first, part.identity)}",
                    where=f"{self.parts[0].path}, {part.path.name}",
                    fix="move one of them away, or name another folder with methods.distill.stored",
                )
        self.licence = self.parts[0].licence if self.parts else "unknown"
        keys = [part.documents for part in self.parts]
        every = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
        order = np.argsort(every, kind="stable")
        self._keys, self._order = every[order], order
        self._begins = np.cumsum([0, *(len(one) for one in keys)])

    def has(self, keys: np.ndarray) -> np.ndarray:
        """bool of int64 :func:`document_key` ``[D]``."""
        if not len(self._keys):
            return np.zeros(len(keys), dtype=bool)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.asarray(self._keys[at] == keys)

    def rows(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 ``[n, k]``, fp32 ``[n, k + 1]`` log-probabilities of a whole, the rest last) of the targets of a
        document. What rounding to fp16 did to all ``k`` together is taken back. Raises :class:`KeyError`.
        """
        part, at = self._place(key)
        ids, half, rest = part.rows(at)
        logps = half.astype(np.float32)
        highest = logps.max(axis=1, keepdims=True, initial=-np.inf)
        whole = highest + np.log(np.exp(logps - highest).sum(axis=1, keepdims=True))
        mass = np.log(-np.expm1(rest.astype(np.float64))).astype(np.float32)[:, None]
        return ids.astype(np.int64), np.concatenate([logps - whole + mass, rest[:, None]], axis=1)

    def figures(self, keys: np.ndarray) -> tuple[int, float, float]:
        """(targets, mean mass of the ``k``, mean NLL of a target) of documents; means are NaN of none."""
        targets, mass, nll = 0, 0.0, 0.0
        for key in keys.tolist():
            part, at = self._place(key)
            targets += int(part.counts[at])
            mass += float(-np.expm1(part.rows(at)[2].astype(np.float64)).sum())
            nll += float(part.nll[at])
        return targets, mass / targets if targets else float("nan"), nll / targets if targets else float("nan")

    def _place(self, key: int) -> tuple[_Part, int]:
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or int(self._keys[at]) != key:
            raise KeyError(key)
        place = int(self._order[at])
        number = int(np.searchsorted(self._begins, place, side="right")) - 1
        return self.parts[number], place - int(self._begins[number])

    def verify(self) -> None:
        """Read every part whole. Raises :class:`UserError` for one that is not what was written."""
        from safetensors import SafetensorError

        for part in self.parts:
            try:
                found = _digest({name: part.file.get_tensor(name) for name in _NAMES})
            except (OSError, SafetensorError) as error:
                raise UserError(f"is damaged: {error}", where=str(part.path), fix=_AGAIN) from None
            if found != part.digest:
                raise UserError("is damaged: its digest is another one", where=str(part.path), fix=_AGAIN)


def _differs(one: TeacherId | None, other: TeacherId) -> str:
    assert one is not None
    before, now = asdict(one), asdict(other)
    return ", ".join(f"{key} {before[key]} and {now[key]}" for key in before if before[key] != now[key])


def make_folder(folder: Path) -> None:
    """For parts to be written to. Raises :class:`UserError` where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=folder_mode())
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", where=str(folder), fix="--out FOLDER") from None
