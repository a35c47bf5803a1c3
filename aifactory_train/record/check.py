"""``aifactory verify``: does the record still say what was written, and are the files still those it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aifactory_train.core.missing import is_missing
from aifactory_train.record.chain import RecordFault, differences, fold, printable, read_events
from aifactory_train.record.digests import file_digest, inside
from aifactory_train.record.files import DATA_MANIFEST, EVENTS, RECORD
from aifactory_train.record.signing import check_manifest, compare


def verify(folder: Path, *, key: Path | None = None, inputs: bool = False) -> dict[str, Any]:
    """``{"ok", "faults": [{kind, where, what}], "notes", "checked"}``.

    The chain, the record against the chain, the digests of data manifest, export and evidence, the signature against
    ``key``; with ``inputs`` also the base model's files and the data's, where they still lie. The folder may be forged
    in any way: whatever stands in its files becomes a finding.
    """
    faults: list[RecordFault] = []
    notes: list[str] = []
    checked = {"events": 0, "files": 0}
    events, chain_faults = read_events(folder / EVENTS)
    faults += chain_faults
    checked["events"] = len(events)
    record: dict[str, Any] = {}
    listed: list[tuple[str, dict[str, Any]]] = []
    try:
        record = fold(events) if events else {}
        if events:
            faults += _check_record(folder / RECORD, events, record, notes)
    except RecursionError:
        faults.append(
            RecordFault("record-unreadable", EVENTS, "the events are nested deeper than this program ever writes")
        )
    for what, value in (
        ("artefact", _block(record, "artefact", faults).get("files")),
        ("data manifest", [record["data_manifest"]] if "data_manifest" in record else None),
    ):
        listed += [(what, entry) for entry in _files(value, what, faults)]
    for what, entry in listed:
        checked["files"] += 1
        fault = _check_file(folder, entry, what)
        if fault:
            faults.append(fault)
    manifest_faults, manifest_notes = check_manifest(folder, key, [entry["path"] for _, entry in listed])
    # A changed file is named once, by whoever noticed first.
    named = {f.where for f in faults}
    faults += [f for f in manifest_faults if f.where not in named]
    notes += manifest_notes
    if inputs:
        faults += _check_inputs(record, notes, checked)
    return {
        "ok": not faults,
        "faults": [f.as_dict() for f in faults],
        "notes": ["\n".join(printable(line, 2500) for line in text.splitlines()) for text in notes],
        "checked": checked,
    }


def _block(record: dict[str, Any], name: str, faults: list[RecordFault]) -> dict[str, Any]:
    """The block ``name`` of the record; a value of another type is a fault, and empty."""
    found = record.get(name, {})
    if isinstance(found, dict):
        return found
    faults.append(RecordFault("record-unreadable", f"{RECORD}: {name}", "this is not a block as the program writes it"))
    return {}


def _files(value: Any, what: str, faults: list[RecordFault]) -> list[dict[str, Any]]:
    """The entries ``{path, bytes, sha256}`` of a list; what is none of them is a fault. Text stands for a list that is
    MISSING.
    """
    if value is None or is_missing(value):
        return []
    if not isinstance(value, list):
        faults.append(RecordFault("record-unreadable", f"{RECORD}: {what}", "this is not a list of files"))
        return []
    good = []
    for number, entry in enumerate(value):
        texts = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("path", "sha256"))
        if texts and type(entry.get("bytes")) is int:
            good.append(entry)
        else:
            where = f"{RECORD}: {what}, entry {number}"
            faults.append(
                RecordFault("record-unreadable", where, "this entry has no path, size and SHA-256 of their types")
            )
    return good


def _check_record(
    path: Path, events: list[dict[str, Any]], record: dict[str, Any], notes: list[str]
) -> list[RecordFault]:
    unreadable = [RecordFault("record-unreadable", path.name, "the record is damaged or was edited")]
    try:
        if path.exists() and not path.is_file():
            return unreadable  # a pipe would be waited for without end
        written = json.loads(path.read_text(encoding="utf-8"))
        count = written["log"]["events"]
    except FileNotFoundError:
        return [
            RecordFault(
                "record-missing",
                path.name,
                "there is an event log but no record: aifactory record show RUN writes it again",
            )
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return unreadable
    if written == record:
        return []
    if isinstance(count, int) and 0 < count < len(events) and written == fold(events[:count]):
        notes.append(
            f"record.json is {len(events) - count} events behind events.jsonl (a kill between the two): "
            "aifactory record show RUN writes it again"
        )
        return []
    places = differences(record, written)
    return [
        RecordFault("record-edited", f"{path.name}: {place}", "the record does not say here what its events say")
        for place in places
    ]


def _check_file(folder: Path, entry: dict[str, Any], what: str) -> RecordFault | None:
    path = inside(folder, entry["path"])
    if path is None:
        return RecordFault("record-unreadable", entry["path"], f"this path of the {what} is none inside the folder")
    return compare(path, entry["sha256"], entry["path"], f"the record's {what}", entry["bytes"])


def _check_inputs(record: dict[str, Any], notes: list[str], checked: dict[str, int]) -> list[RecordFault]:
    from aifactory_train.config.data_blocks import DataSource
    from aifactory_train.config.schema import ModelConfig
    from aifactory_train.core.errors import UserError
    from aifactory_train.sources import resolve_data, resolve_model

    faults: list[RecordFault] = []
    base = _block(record, "base", faults)
    try:
        folder = resolve_model(
            ModelConfig(base=base["id"], revision=None if base["revision"] == "as fetched" else base["revision"])
        )
        for entry in _files(base.get("files"), "base model files", faults):
            checked["files"] += 1
            fault = _check_file(folder, entry, "base model file")
            if fault:
                faults.append(RecordFault(fault.kind, f"base model: {fault.where}", fault.what))
    except (UserError, KeyError) as error:
        notes.append(f"the base model was not checked: {error}")
    except (ValueError, TypeError, OSError):
        faults.append(RecordFault("record-unreadable", f"{RECORD}: base", "this does not say which model was the base"))
    sources = record.get("data", [])
    if not isinstance(sources, list):
        return [*faults, RecordFault("record-unreadable", f"{RECORD}: data", "this is not a list of sources")]
    for number, entry in enumerate(sources):
        try:
            found = _content(resolve_data(DataSource(source=entry["source"], revision=entry.get("revision"))))
            name, stated = str(entry["name"]), entry.get("sha256")
        except (UserError, KeyError) as error:
            notes.append(f"the data '{entry.get('name')}' was not checked: {error}")
            continue
        except (ValueError, TypeError, AttributeError, OSError):
            faults.append(
                RecordFault("record-unreadable", f"{RECORD}: data, entry {number}", "this is not a source of data")
            )
            continue
        checked["files"] += 1
        if stated and found != stated:
            faults.append(RecordFault("file-changed", f"data: {name}", "its content differs from what was trained on"))
    return faults


def _content(path: Path) -> str:
    """What the token cache calls a source's content: its file's digest with its name, or those of a folder's files.
    Read anew.
    """
    import hashlib

    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{file_digest(file)}\n".encode())
    return found.hexdigest()


__all__ = ["DATA_MANIFEST", "verify"]
