"""The memory-mapped token store and the views on it that training reads.

A *store* is a folder of flat files, written once in order and never changed; a *data set* is a store plus an ordered
list of its documents. Nothing is read before it is asked for, so ten million rows need not fit in memory.

=================  ==========================  ====================================================================
file               type                        content
=================  ==========================  ====================================================================
``tokens.bin``     uint16 or uint32            token ids of all documents, end to end
``flags.bin``      bits                        per document: ``ceil(n/8)`` bytes of mask, then as many of text mask
``lengths.bin``    int32 [docs]                tokens
``supervised.bin`` int32 [docs]                positions whose next token carries loss
``textbytes.bin``  int32 [docs]                UTF-8 bytes of the supervised text
``docrow.bin``     int64 [docs]                row that the document came from
``rows.jsonl``     UTF-8                       canonical rows
``rowlength.bin``  int32 [rows]                bytes of the row's line
``rowsource.bin``  uint16 [rows]               source that the row came from
``rowline.bin``    int32 [rows]                line (or row number) in its file, from 1
``rowfile.bin``    int32 [rows]                file, an index into ``files`` of ``store.json``
``rowdropped.bin`` uint8 [rows]                why the row became no document, an index into ``DROPPED``
=================  ==========================  ====================================================================
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.private import vault

#: Column files besides tokens, flags and rows, and their types.
COLUMNS: dict[str, str] = {
    "lengths": "<i4",
    "supervised": "<i4",
    "textbytes": "<i4",
    "docrow": "<i8",
    "rowlength": "<i4",
    "rowsource": "<u2",
    "rowline": "<i4",
    "rowfile": "<i4",
    "rowdigest": "<u8",
    "rownorm": "<u8",
    "rowgroup": "<u8",
    "rowid": "<u8",
    "rowdropped": "<u1",
}
#: Why a row became no document: it did; too long; cut before its answer; nothing of its answer is in the text; so with
#: one of two.
DROPPED = ("", "long", "masked", "empty", "pair")
CACHE_FIX = "free some space, or set AIFACTORY_CACHE (or --cache-dir) to a folder that has it"


def disk_full(error: OSError, where: Path) -> UserError | None:
    """The message for a full disk, quota or file-size limit; None for another error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError("no space left while the token cache was written", where=str(where), fix=CACHE_FIX)
    return None


class StoreWriter:
    """Appends to the files of a store. ``wide``: token ids need more than 16 bits."""

    def __init__(self, folder: Path, *, wide: bool):
        self.folder = folder
        folder.mkdir(parents=True)
        self.token_type = np.dtype("<u4" if wide else "<u2")
        # Plain files, or encrypted ones under the privacy profile "restricted" (nothing plain touches the disk then).
        self._files = {name: vault.create(folder / f"{name}.bin") for name in (*COLUMNS, "tokens", "flags")}
        self._rows = vault.create(folder / "rows.jsonl")
        self.rows = self.docs = self.tokens = 0

    def append_rows(self, lines: bytes, columns: dict[str, np.ndarray]) -> None:
        """``lines``: canonical rows end to end, each with its newline; ``columns``: the ``row*`` columns."""
        self._rows.write(lines)
        for name, values in columns.items():
            self._files[name].write(values.astype(COLUMNS[name], copy=False).tobytes())
        self.rows += len(columns["rowlength"])

    def append_documents(self, tokens: np.ndarray, flags: bytes, columns: dict[str, np.ndarray]) -> None:
        """``tokens`` end to end, ``flags`` packed as the module says, and the columns of the documents."""
        self._files["tokens"].write(tokens.astype(self.token_type, copy=False).tobytes())
        self._files["flags"].write(flags)
        for name, values in columns.items():
            self._files[name].write(values.astype(COLUMNS[name], copy=False).tobytes())
        self.docs += len(columns["lengths"])
        self.tokens += len(tokens)

    def close(self, facts: dict[str, Any]) -> None:
        for file in (*self._files.values(), self._rows):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        facts = {
            **facts,
            "token_type": self.token_type.str,
            "rows": self.rows,
            "docs": self.docs,
            "tokens": self.tokens,
        }
        (self.folder / "store.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    def abandon(self) -> None:
        """Close the files without finishing the store (after an error; the folder is removed by the caller)."""
        for file in (*self._files.values(), self._rows):
            try:
                file.close()
            except OSError:
                continue  # a full disk may refuse the last flush; the folder goes away anyway


def _gone(path: Path, error: OSError) -> RunFailed:
    return RunFailed(
        f"the token cache cannot be read any more: {error.strerror}", where=str(path), fix="start again: it is rebuilt"
    )


class Store:
    """A finished store, opened read-only. Columns are memory-mapped arrays named as in the table above.

    ``files``: what the files of the rows are called now, where that may have changed since the store was written."""

    def __init__(self, folder: Path, files: list[str] | None = None):
        self.folder = Path(folder)
        self.facts = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
        if files is not None:
            self.facts["files"] = files
        self._token_map: np.ndarray | None = None
        self._flag_map: np.ndarray | None = None
        self._columns: dict[str, np.ndarray] = {}
        self._starts: np.ndarray | None = None
        self._flag_starts: np.ndarray | None = None
        self._row_starts: np.ndarray | None = None
        self._rows: bytes | None = None  # all rows in memory, where the file is encrypted

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "files": self.facts["files"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["files"])  # type: ignore[misc]

    def _map(self, name: str, dtype: str | np.dtype) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        decrypted = vault.content(path)
        if decrypted is not None:
            return np.frombuffer(decrypted, dtype=dtype)
        try:
            if path.stat().st_size == 0:
                return np.empty(0, dtype=dtype)
            return np.memmap(path, dtype=dtype, mode="r")
        except OSError as error:
            raise _gone(path, error) from None

    def column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._map(name, COLUMNS[name])
        return self._columns[name]

    @property
    def token_map(self) -> np.ndarray:
        if self._token_map is None:
            self._token_map = self._map("tokens", self.facts["token_type"])
        return self._token_map

    @property
    def starts(self) -> np.ndarray:
        """int64 [docs + 1]: where each document begins in ``tokens.bin``."""
        if self._starts is None:
            self._starts = _starts(self.column("lengths"))
        return self._starts

    @property
    def row_starts(self) -> np.ndarray:
        if self._row_starts is None:
            self._row_starts = _starts(self.column("rowlength"))
        return self._row_starts

    def flags(self, doc: int) -> tuple[np.ndarray, np.ndarray]:
        """Mask and text mask of a document, bool [n] each."""
        if self._flag_map is None:
            self._flag_map = self._map("flags", "u1")
            self._flag_starts = _starts(2 * ((self.column("lengths").astype(np.int64) + 7) // 8))
        assert self._flag_starts is not None
        n = int(self.column("lengths")[doc])
        block = self._flag_map[self._flag_starts[doc] : self._flag_starts[doc + 1]]
        half = len(block) // 2
        return (
            np.unpackbits(block[:half], count=n).astype(bool),
            np.unpackbits(block[half:], count=n).astype(bool),
        )

    def row_line(self, row: int) -> bytes:
        a, b = int(self.row_starts[row]), int(self.row_starts[row + 1])
        path = self.folder / "rows.jsonl"
        if self._rows is None and not path.is_file():
            self._rows = vault.content(path)
        if self._rows is not None:
            return self._rows[a:b]
        try:
            with path.open("rb") as file:
                return os.pread(file.fileno(), b - a, a)
        except OSError as error:  # a cache may be cleared under a run that names its rows
            raise _gone(path, error) from None

    def rows(self, rows: np.ndarray | None = None) -> Iterator[dict[str, Any]]:
        """Some canonical rows (None: all of them), from one opened file."""
        path, starts = self.folder / "rows.jsonl", self.row_starts
        if not path.is_file() or path.stat().st_size == 0:
            chosen = range(len(starts) - 1) if rows is None else rows
            yield from (json.loads(self.row_line(int(row))) for row in chosen)
            return
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        if rows is not None:
            yield from (json.loads(raw[starts[row] : starts[row + 1]].tobytes()) for row in rows)
            return
        for first in range(0, len(starts) - 1, 1000):
            lines = raw[starts[first] : starts[min(first + 1000, len(starts) - 1)]].tobytes()
            # Line ends inside a text are escaped, so those that are left stand between rows.
            yield from json.loads(b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]")

    def place(self, row: int) -> str:
        """``file:line`` of a row."""
        return f"{self.facts['files'][int(self.column('rowfile')[row])]}:{int(self.column('rowline')[row])}"


def _starts(lengths: np.ndarray) -> np.ndarray:
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


class TokenDataset:
    """Documents of a store in a fixed order; memory-mapped and read-only.

    Attributes:
        lengths: int32 [num_docs], tokens of each document.
        supervised: int32 [num_docs], supervised *targets*: positions whose next token carries loss.
        weights: float64 [num_docs], how often a document is seen in an epoch (the weight of its source).
        report: counts of what was read, dropped, cut, and the licences of the sources.
        digest: hex sha256 over tokens, masks and order.
        name: label of the set.
    """

    def __init__(
        self,
        store: Store,
        docs: np.ndarray,
        name: str = "data",
        report: dict[str, Any] | None = None,
        digest: str | None = None,
    ):
        self.store = store
        self.name = name
        self._docs = docs
        self.report = report or {}
        self._digest = digest
        self.lengths: np.ndarray = np.asarray(store.column("lengths")[docs], dtype=np.int32)
        self.supervised: np.ndarray = np.asarray(store.column("supervised")[docs], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._docs)

    @property
    def weights(self) -> np.ndarray:
        source = self.store.column("rowsource")[self.store.column("docrow")[self._docs]]
        facts = self.store.facts["sources"]
        table = np.asarray([s["weight"] for s in facts], dtype=np.float64)
        shares = np.asarray([s.get("share") or 0.0 for s in facts])
        if shares.any():
            # A replayed source gets the weight that makes its tokens the wanted share of an epoch's.
            tokens = np.bincount(source, weights=self.lengths, minlength=len(facts))
            total = float((tokens * table)[shares == 0].sum()) / (1.0 - float(shares.sum()))
            there = (shares > 0) & (tokens > 0)
            table[there] = (shares * total)[there] / tokens[there]
        return table[source]

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = content_digest(self.store, self._docs)
        return self._digest

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of document ``i``: int64 [length] (a copy)."""
        doc = int(self._docs[i])
        starts = self.store.starts
        return self.store.token_map[starts[doc] : starts[doc + 1]].astype(np.int64)

    def mask(self, i: int) -> np.ndarray:
        """bool [length]: token carries loss as a target. The first token never does."""
        return self.store.flags(int(self._docs[i]))[0]

    def text_mask(self, i: int) -> np.ndarray:
        """bool [length]: supervised text only, without end-of-turn and template tokens (for bits per byte)."""
        return self.store.flags(int(self._docs[i]))[1]

    def text_bytes(self, i: int) -> int:
        """UTF-8 bytes of the text that :meth:`text_mask` marks."""
        return int(self.store.column("textbytes")[int(self._docs[i])])

    def row(self, i: int) -> dict[str, Any]:
        """The canonical row that document ``i`` came from."""
        return json.loads(self.store.row_line(self._row(i)))

    def row_id(self, i: int) -> str:
        """The row's own id, or a digest of its content."""
        row = self._row(i)
        own = json.loads(self.store.row_line(row)).get("id")
        return own if own is not None else f"{int(self.store.column('rowdigest')[row]):016x}"

    def source(self, i: int) -> str:
        """Name of the data source."""
        return self.store.facts["sources"][int(self.store.column("rowsource")[self._row(i)])]["name"]

    def place(self, i: int) -> str:
        """``file:line`` of the row."""
        return self.store.place(self._row(i))

    def _row(self, i: int) -> int:
        return int(self.store.column("docrow")[int(self._docs[i])])

    def __repr__(self) -> str:
        return f"TokenDataset({self.name!r}, {len(self)} documents, {int(self.lengths.sum(dtype=np.int64))} tokens)"


def content_digest(store: Store, docs: np.ndarray) -> str:
    """sha256 over lengths, tokens and masks of ``docs`` in their order."""
    digest = hashlib.sha256()
    lengths = store.column("lengths")
    digest.update(np.asarray(lengths[docs], dtype="<i4").tobytes())
    flags_starts = _starts(2 * ((lengths.astype(np.int64) + 7) // 8))
    flag_map = store._map("flags", "u1")
    for first, last in _runs(docs):
        a, b = int(store.starts[first]), int(store.starts[last])
        for at in range(a, b, 1 << 22):
            digest.update(store.token_map[at : min(b, at + (1 << 22))].astype("<u4").tobytes())
        digest.update(flag_map[int(flags_starts[first]) : int(flags_starts[last])].tobytes())
    return digest.hexdigest()


def _runs(docs: np.ndarray) -> list[tuple[int, int]]:
    """``docs`` as runs ``[first, last)`` of neighbours, none longer than 65,536 documents."""
    if len(docs) == 0:
        return []
    breaks = np.flatnonzero(np.diff(docs) != 1) + 1
    edges = np.concatenate([[0], breaks, [len(docs)]])
    out = []
    for a, b in itertools.pairwise(edges):
        for at in range(int(a), int(b), 65_536):
            end = min(int(b), at + 65_536)
            out.append((int(docs[at]), int(docs[end - 1]) + 1))
    return out


def pack_flags(mask: np.ndarray, text_mask: np.ndarray, lengths: np.ndarray) -> bytes:
    """The bits of ``flags.bin`` for some documents: bool [all tokens] each, documents end to end; ``lengths`` int64
    [documents].
    """
    width = 8 * ((lengths + 7) // 8)
    ends = np.cumsum(2 * width)
    starts = np.cumsum(lengths) - lengths
    place = np.repeat(ends - 2 * width - starts, lengths) + np.arange(len(mask))
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=bool)
    bits[place] = mask
    bits[place + np.repeat(width, lengths)] = text_mask
    return np.packbits(bits).tobytes()
