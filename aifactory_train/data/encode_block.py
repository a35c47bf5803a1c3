"""One block of rows: parsed, checked, encoded and laid out as the store keeps it. Runs in every process."""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aifactory_train.core.errors import UserError
from aifactory_train.data import split
from aifactory_train.data.blocks import Block
from aifactory_train.data.cells import RowError, Unused, to_user_error
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.masks import Document
from aifactory_train.data.read_json import parse_lines
from aifactory_train.data.rows import canonical
from aifactory_train.data.store import DROPPED, pack_flags


@dataclass
class Task:
    """A block, and what must be known to read it."""

    block: Block
    format: str
    columns: dict[str, str]
    source: int
    file: int
    rules: split.RowRules | None = None


class RowTally:
    """How often each thing was found, and in how many rows."""

    def __init__(self) -> None:
        self.rows: collections.Counter[str] = collections.Counter()
        self.times: collections.Counter[str] = collections.Counter()

    def in_row(self, things: tuple[str, ...]) -> None:
        self.rows.update(set(things))
        self.times.update(things)

    def update(self, other: RowTally) -> None:
        self.rows.update(other.rows)
        self.times.update(other.times)

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {thing: {"rows": n, "times": self.times[thing]} for thing, n in sorted(self.rows.items())}


@dataclass
class Done:
    """What a block became: arrays in the layout of the store. ``error`` ends the preparation."""

    lines: bytes = b""
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint32))
    flags: bytes = b""
    docs: dict[str, np.ndarray] = field(default_factory=dict)
    counts: collections.Counter = field(default_factory=collections.Counter)
    unused: Unused = field(default_factory=Unused)
    lost: RowTally = field(default_factory=lambda: RowTally())
    controls: RowTally = field(default_factory=lambda: RowTally())
    empty_at: int | None = None  # line of the first row of whose answer nothing is left
    error: UserError | None = None


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _hash(text: str) -> int:
    return _digest(text.encode("utf-8", "surrogatepass"))


#: JSON without spaces; one encoder for all rows, because ``json.dumps`` would build one for each.
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
#: Columns of a canonical row that say something about it and are no part of what is learnt.
_BESIDE_CONTENT = frozenset({"id", "group", "language", "label"})


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """The collector of cyclic garbage pauses: rows make tens of thousands of objects that live until their block (or
    the report on them) is done and hold no cycles, and looking through them again and again took a fifth of the whole
    preparation (measured)."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def process(task: Task, encoder: Encoder) -> Done:
    """Parse, validate and encode the rows of one block."""
    with no_collection():
        return _process(task, encoder)


def _process(task: Task, encoder: Encoder) -> Done:
    done = Done()
    try:
        rows, numbers, moments = _parse(task, done)
        lines, keys = _keys(rows, moments)
        documents, docrow, dropped = _encode(task.block, rows, numbers, encoder, done)
    except UserError as error:
        done.error = error
        return done
    n = len(rows)
    done.lines = b"".join(lines)
    done.rows = {
        "rowlength": np.fromiter((len(line) for line in lines), dtype="<i4", count=n),
        "rowsource": np.full(n, task.source, dtype="<u2"),
        "rowline": np.asarray(numbers, dtype="<i4"),
        "rowfile": np.full(n, task.file, dtype="<i4"),
        **{name: np.asarray(values, dtype="<u8") for name, values in keys.items()},
        "rowdropped": dropped,
    }
    _lay_out(documents, docrow, done)
    return done


def _parse(task: Task, done: Done) -> tuple[list[dict[str, Any]], list[int], list[int | None]]:
    """Canonical rows, their lines, and when each was written where the split goes by time. Raises
    :class:`UserError`.
    """
    block = task.block
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    moments: list[int | None] = []
    ruled = [c for c in (task.rules.group, task.rules.time) if c is not None] if task.rules is not None else []
    raw = (
        parse_lines(block)
        if block.lines is not None
        else ((block.number(i), row) for i, row in enumerate(block.rows or []))
    )
    for number, value in raw:
        numbers.append(number)
        try:
            rows.append(canonical(value, task.format, task.columns, done.unused, ruled))
            moments.append(task.rules.apply(value, rows[-1]) if task.rules is not None else None)
        except RowError as error:
            raise to_user_error(error, f"{block.file}:{number}") from None
    return rows, numbers, moments


def _keys(rows: list[dict[str, Any]], moments: list[int | None]) -> tuple[list[bytes], dict[str, list[int]]]:
    """The line of each row, and the hashes by which rows are told apart: as written, without case and blanks, by group,
    by id.
    """
    lines, digests, norms, groups, ids = [], [], [], [], []
    for row, moment in zip(rows, moments, strict=True):
        line = _compact(row).encode("utf-8", "surrogatepass")
        lines.append(line + b"\n")
        if "text" in row:
            whole = question = _normal(row["text"])
        else:
            normal = [(m["role"] != "assistant", _normal(m["content"])) for m in row["messages"]]
            whole = " ".join(text for _, text in normal if text)
            question = " ".join(text for asked, text in normal if asked and text)
            if any("tool_calls" in m for m in row["messages"]):
                whole += json.dumps([m.get("tool_calls") for m in row["messages"]])
        if _BESIDE_CONTENT.isdisjoint(row):
            digests.append(_digest(line))
        else:
            digests.append(_hash(_compact({k: v for k, v in row.items() if k not in _BESIDE_CONTENT})))
        norms.append(_hash(whole))
        if moment is not None:
            groups.append(moment)
        else:
            groups.append(_hash(f"group:{row['group']}") if "group" in row else _hash(question or whole))
        ids.append(_hash(row["id"]) | 1 if "id" in row else 0)
    return lines, {"rowdigest": digests, "rownorm": norms, "rowgroup": groups, "rowid": ids}


def _encode(
    block: Block, rows: list[dict[str, Any]], numbers: list[int], encoder: Encoder, done: Done
) -> tuple[list[Document], list[int], np.ndarray]:
    """The documents, the row of each, and why rows have none (uint8 [rows]). Counts into ``done``; raises
    :class:`UserError`.
    """
    documents: list[Document] = []
    docrow: list[int] = []
    dropped = np.zeros(len(rows), dtype="<u1")
    counts = done.counts
    for i, result in enumerate(encoder.encode(rows)):
        if isinstance(result, RowError):
            raise to_user_error(result, f"{block.file}:{numbers[i]}")
        if result.flags:
            counts.update(result.flags)
        if result.lost:
            done.lost.in_row(result.lost)
        if result.controls:
            done.controls.in_row(result.controls)
        if (
            result.dropped == "masked"
            and not any(d.cut for d in result.documents)
            and encoder.spec.long_documents != "truncate"
        ):
            raise UserError(
                "all tokens of this row are masked: nothing to learn from it", where=f"{block.file}:{numbers[i]}"
            )
        if result.dropped:
            counts[f"dropped: {result.dropped}"] += 1
            dropped[i] = DROPPED.index(result.dropped)
            if result.dropped == "empty" and done.empty_at is None:
                done.empty_at = numbers[i]
        if len(result.documents) > 1 and not ("rejected" in rows[i] or "positive" in rows[i]):
            counts["split"] += 1
        elif any(document.cut for document in result.documents):
            counts["truncated"] += 1
        documents += result.documents
        docrow += [i] * len(result.documents)
    return documents, docrow, dropped


def _lay_out(documents: list[Document], docrow: list[int], done: Done) -> None:
    """Tokens end to end, flags packed, and one column entry a document."""
    lengths = np.fromiter((len(d.tokens) for d in documents), dtype=np.int64, count=len(documents))
    supervised = np.zeros(0)
    if documents:
        done.tokens = np.concatenate([d.tokens for d in documents]).astype(np.uint32)
        mask = np.concatenate([d.mask for d in documents])
        supervised = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)  # no document is empty
        done.flags = pack_flags(mask, np.concatenate([d.text_mask for d in documents]), lengths)
    done.docs = {
        "lengths": lengths.astype("<i4"),
        "supervised": supervised.astype("<i4"),
        "textbytes": np.asarray([d.text_bytes for d in documents], dtype="<i4"),
        "docrow": np.asarray(docrow, dtype="<i8"),
    }
