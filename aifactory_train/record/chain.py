"""``events.jsonl``: an append-only file in which every line carries the digest of the line before it.

A line is one event, ``{"seq", "time", "kind", "set", "note", "prev_sha256", "sha256"}``; ``sha256`` is over the
canonical form of all the other keys. ``set`` maps places in the record (``compute/attempts/001``) to values, so that
the record is nothing but its events laid over each other (:func:`fold`) and anybody can compute it again.

A chain without a key proves that nothing was lost, swapped or changed by accident or by an edit of one line; whoever
rewrites every line can forge it, which is what the signed manifest is for.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GENESIS = "0" * 64
_KEYS = ("seq", "time", "kind", "set", "note", "prev_sha256", "sha256")


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that JSON lacks become text, unknown types their ``str``."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and callable(value.item) and getattr(value, "ndim", 1) == 0:
        return plain(value.item())  # a numpy or torch scalar
    return str(value)


def canonical(value: Any) -> bytes:
    """The one way in which a value is written for hashing: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True)
class RecordFault:
    """Something that does not hold: ``kind`` is a stable name, ``where`` the file and line or place, ``what`` a
    sentence.
    """

    kind: str
    where: str
    what: str

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "where": printable(self.where), "what": printable(self.what)}


def printable(text: str, most: int = 500) -> str:
    """Text of a file that may be forged, as any terminal and any encoder can take it: no control characters, no half
    surrogates.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if len(shown) <= most else shown[:most] + " …"


def make_event(seq: int, prev: str, kind: str, values: dict[str, Any], note: str) -> dict[str, Any]:
    body = {"seq": seq, "time": now(), "kind": kind, "set": plain(values), "note": note, "prev_sha256": prev}
    return {**body, "sha256": digest(body)}


def read_events(path: Path) -> tuple[list[dict[str, Any]], list[RecordFault]]:
    """The events of a chain and everything that is wrong with it, in file order.

    Reading goes on behind a fault, so that one edited line is named alone and not every line after it.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            return [], [RecordFault("events-unreadable", path.name, "the event log is not a regular file")]
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], [RecordFault("events-missing", path.name, "there is no event log")]
    except OSError as error:
        return [], [RecordFault("events-unreadable", path.name, f"the event log cannot be read: {error.strerror}")]
    events: list[dict[str, Any]] = []
    faults: list[RecordFault] = []
    lines = raw.split(b"\n")
    torn = lines.pop()  # empty when the file ends with a newline
    expected, prev = 0, GENESIS
    for number, line in enumerate(lines, 1):
        where = f"{path.name}:{number}"
        try:
            event = json.loads(line)
            if not _is_event(event):
                raise ValueError("not an event")
            found = digest({k: v for k, v in event.items() if k != "sha256"})
        except (ValueError, RecursionError):  # no UTF-8, no JSON, nested without end, numbers that JSON lacks
            faults.append(RecordFault("unreadable-event", where, "this line is not an event: it was damaged or edited"))
            expected, prev = expected + 1, ""  # the next event cannot be checked against this one
            continue
        if found != event["sha256"]:
            faults.append(
                RecordFault(
                    "edited-event", where, f"event {event['seq']} ({event['kind']}) does not match its own digest"
                )
            )
        elif prev and event["prev_sha256"] != prev:
            faults.append(
                RecordFault("broken-chain", where, f"event {event['seq']} does not follow the line before it")
            )
        if event["seq"] != expected:
            faults.append(
                RecordFault(
                    "broken-chain", where, f"event {event['seq']} stands where event {expected} should: lines were lost"
                )
            )
        events.append(event)
        expected, prev = int(event["seq"]) + 1, event["sha256"]
    if torn:
        where = f"{path.name}:{len(lines) + 1}"
        faults.append(
            RecordFault(
                "torn-line", where, f"the last line is torn ({len(torn)} bytes): the writer was killed while writing it"
            )
        )
    return events, faults


def _is_event(event: Any) -> bool:
    """Whether it has an event's keys, each with a value of its type: whoever forges a log need not care for either."""
    if not isinstance(event, dict) or set(event) != set(_KEYS):
        return False
    texts = all(isinstance(event[key], str) for key in ("time", "kind", "note", "prev_sha256", "sha256"))
    return texts and isinstance(event["set"], dict) and type(event["seq"]) is int


def fold(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record: all ``set`` values of the events, laid over each other in order."""
    record: dict[str, Any] = {}
    count, head = 0, GENESIS
    for event in events:
        for place, value in event["set"].items():
            node = record
            *blocks, last = place.split("/")
            for block in blocks:
                below = node.get(block)
                if not isinstance(below, dict):
                    below = node[block] = {}
                node = below
            node[last] = json.loads(json.dumps(value))  # a copy: folding must not tie events together
        count, head = count + 1, event["sha256"]
    record["log"] = {"file": "events.jsonl", "events": count, "head_sha256": head}
    return record


class Chain:
    """The writer's end. One process appends at a time; others wait (a lock on the file, where the file system has
    locks).
    """

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        with open(self.path, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                # Lustre without -o flock answers so; the run folder is then guarded by its state file alone.
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            yield file

    def append(self, kind: str, values: dict[str, Any] | None = None, note: str = "") -> dict[str, Any]:
        """Write one event and return it. A torn last line is cut off first, and an event says so."""
        with self._locked() as file:
            seq, prev = self._head(file)
            event = make_event(seq, prev, kind, values or {}, note)
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return event

    def _head(self, file: Any) -> tuple[int, str]:
        """Number and digest for the next event, repairing a torn end (the file must be locked)."""
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return 0, GENESIS
        start, tail = size, b""
        while start > 0 and tail.count(b"\n") < 2:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(size - start)
        body, newline, torn = tail.rpartition(b"\n")
        if torn:
            file.truncate(size - len(torn))
            if not newline:
                return self._note_torn(file, 0, GENESIS, torn)
        last = json.loads(body.rpartition(b"\n")[2])
        seq, prev = int(last["seq"]) + 1, str(last["sha256"])
        return self._note_torn(file, seq, prev, torn) if torn else (seq, prev)

    def _note_torn(self, file: Any, seq: int, prev: str, torn: bytes) -> tuple[int, str]:
        values = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
        event = make_event(
            seq, prev, "torn-line-cut", {f"log_repairs/{seq}": values}, "the last line was torn by a kill"
        )
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
        return seq + 1, event["sha256"]


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """Places at which two JSON values differ, at most twenty."""
    if isinstance(left, dict) and isinstance(right, dict):
        found: list[str] = []
        for key in [*left, *(k for k in right if k not in left)]:
            below = f"{place}/{key}" if place else str(key)
            if key not in left or key not in right:
                found.append(below)
            else:
                found += differences(left[key], right[key], below)
        return found[:20]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        found = []
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            found += differences(a, b, f"{place}/{i}")
        return found[:20]
    return [] if left == right and isinstance(left, bool) == isinstance(right, bool) else [place or "the whole record"]
