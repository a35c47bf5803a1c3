"""``aifactory verify``: does the record still say what was written, and are the files still those it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aifactory_train.record.chain import Fault, differences, fold, read_events
from aifactory_train.record.digests import file_digest
from aifactory_train.record.recorder import DATA_MANIFEST, EVENTS, RECORD
from aifactory_train.record.signing import check_manifest


def verify(folder: Path, *, key: Path | None = None, inputs: bool = False) -> dict[str, Any]:
    """``{"ok", "faults": [{kind, where, what}], "notes", "checked"}``.

    The chain, the record against the chain, the digests of data manifest, export and evidence, the signature against ``key``;
    with ``inputs`` also the base model's files and the data's, where they still lie.
    """
    faults: list[Fault] = []
    notes: list[str] = []
    checked = {"events": 0, "files": 0}
    events, chain_faults = read_events(folder / EVENTS)
    faults += chain_faults
    checked["events"] = len(events)
    record = fold(events) if events else {}
    if events:
        faults += _check_record(folder / RECORD, events, record, notes)
    listed = [("artefact", f) for f in _files(record.get("artefact", {}).get("files"))]
    listed += [("data manifest", f) for f in _files([record["data_manifest"]] if "data_manifest" in record else [])]
    seen: set[str] = set()
    for what, entry in listed:
        checked["files"] += 1
        seen.add(entry["path"])
        fault = _check_file(folder, entry, what)
        if fault:
            faults.append(fault)
    manifest_faults, manifest_notes = check_manifest(folder, key)
    # A changed file is named once, by whoever noticed first.
    named = {f.where for f in faults}
    faults += [f for f in manifest_faults if f.where not in named]
    notes += manifest_notes
    if inputs:
        faults += _check_inputs(record, notes, checked)
    return {
        "ok": not faults,
        "faults": [f.as_dict() for f in faults],
        "notes": notes,
        "checked": checked,
    }


def _files(value: Any) -> list[dict[str, Any]]:
    return [f for f in value if isinstance(f, dict) and "sha256" in f] if isinstance(value, list) else []


def _check_record(path: Path, events: list[dict[str, Any]], record: dict[str, Any], notes: list[str]) -> list[Fault]:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        count = written["log"]["events"]
    except FileNotFoundError:
        return [
            Fault(
                "record-missing",
                path.name,
                "there is an event log but no record: aifactory record show RUN writes it again",
            )
        ]
    except (ValueError, KeyError, TypeError):
        return [Fault("record-unreadable", path.name, "the record is damaged or was edited")]
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
        Fault("record-edited", f"{path.name}: {place}", "the record does not say here what its events say")
        for place in places
    ]


def _check_file(folder: Path, entry: dict[str, Any], what: str) -> Fault | None:
    path = folder / entry["path"]
    name = entry["path"]
    if ".." in Path(name).parts or Path(name).is_absolute():
        return Fault("record-unreadable", name, "this path points outside the run folder")
    if not path.is_file():
        return Fault("file-missing", name, f"the record lists this {what}, but it is not here")
    if path.stat().st_size != entry["bytes"]:
        return Fault(
            "file-changed", name, f"this {what} has {path.stat().st_size} bytes, the record says {entry['bytes']}"
        )
    if file_digest(path) != entry["sha256"]:
        return Fault("file-changed", name, f"the SHA-256 of this {what} differs from the record's")
    return None


def _check_inputs(record: dict[str, Any], notes: list[str], checked: dict[str, int]) -> list[Fault]:
    from aifactory_train.config import DataSource, ModelConfig
    from aifactory_train.errors import UserError
    from aifactory_train.sources import resolve_data, resolve_model

    faults: list[Fault] = []
    base = record.get("base", {})
    try:
        folder = resolve_model(
            ModelConfig(base=base["id"], revision=None if base["revision"] == "as fetched" else base["revision"])
        )
        for entry in _files(base.get("files")):
            checked["files"] += 1
            fault = _check_file(folder, entry, "base model file")
            if fault:
                faults.append(Fault(fault.kind, f"base model: {fault.where}", fault.what))
    except (UserError, KeyError) as error:
        notes.append(f"the base model was not checked: {error}")
    for entry in record.get("data", []):
        try:
            found = _content(resolve_data(DataSource(source=entry["source"], revision=entry.get("revision"))))
        except (UserError, KeyError) as error:
            notes.append(f"the data '{entry.get('name')}' was not checked: {error}")
            continue
        checked["files"] += 1
        if entry.get("sha256") and found != entry["sha256"]:
            faults.append(
                Fault("file-changed", f"data: {entry['name']}", "its content differs from what was trained on")
            )
    return faults


def _content(path: Path) -> str:
    """What the token cache calls a source's content: its file's digest with its name, or those of a folder's files. Read anew."""
    import hashlib

    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{file_digest(file)}\n".encode())
    return found.hexdigest()


__all__ = ["DATA_MANIFEST", "verify"]
