"""Whether a token cache is still what was written: sizes at every opening, contents before a run trains on it.

``prepared.json`` is written last and lists size and SHA-256 of every other file (as it lies on the disk, encrypted ones
too) and a digest of itself. Caches of the first version have no such list; what they always had, the digests of tokens
and masks of each set, is computed again, and the sizes of the other files follow from the numbers of rows, documents
and tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from aifactory_train.core.errors import UserError
from aifactory_train.data.store import COLUMNS, Store, content_digest
from aifactory_train.private import vault
from aifactory_train.sources.digests import sha256_of

PREPARED = "prepared.json"


def with_digests(folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """``prepared`` with size and digest of every file in ``folder``, and of itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = sha256_of(paths, fresh=True)
    files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": digests[p]} for p in paths}
    whole = json.loads(json.dumps({**prepared, "files": files}))  # as it will be read again
    whole["sha256"] = _own_digest(whole)
    return whole


def _own_digest(prepared: dict[str, Any]) -> str:
    rest = {key: value for key, value in prepared.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def faults(folder: Path, *, content: bool) -> list[str]:
    """What is wrong with a token cache, by file; empty if nothing is. ``content``: read the files, not only their
    sizes.
    """
    path = folder / PREPARED
    if not path.is_file():
        return [f"{PREPARED} is missing"]
    try:
        prepared = json.loads(path.read_text(encoding="utf-8"))
        if "files" not in prepared:
            return _faults_of_older(folder, prepared, content)
        if prepared["sha256"] != _own_digest(prepared):
            return [f"{PREPARED} was changed after it was written"]
        return _changed(folder, prepared["files"], content)
    except OSError as error:
        return [f"{error.filename or PREPARED} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return [f"{PREPARED} or store.json is damaged ({type(error).__name__})"]


def _changed(folder: Path, files: dict[str, Any], content: bool) -> list[str]:
    found, right = [], []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes, {entry['bytes']:,} were written")
        else:
            right.append(name)
    if content:
        try:
            digests = sha256_of([folder / name for name in right], fresh=True)
        except UserError as error:
            return [*found, str(error)]
        found += [
            f"{name} has other content than was written"
            for name in right
            if digests[folder / name] != files[name]["sha256"]
        ]
    return found


def _faults_of_older(folder: Path, prepared: dict[str, Any], content: bool) -> list[str]:
    store = Store(folder / "store")
    facts = store.facts
    plain = {
        f"{n}.bin": facts["rows" if n.startswith("row") else "docs"] * np.dtype(t).itemsize for n, t in COLUMNS.items()
    }
    plain["tokens.bin"] = facts["tokens"] * np.dtype(facts["token_type"]).itemsize
    found = [_other_size(store.folder / name, size) for name, size in plain.items()]
    if not any(found):
        bits = 2 * int(((store.column("lengths").astype(np.int64) + 7) // 8).sum())
        found.append(_other_size(store.folder / "flags.bin", bits))
        found.append(_other_size(store.folder / "rows.jsonl", int(store.column("rowlength").sum(dtype=np.int64))))
    if any(found) or not content:
        return [fault for fault in found if fault]
    for entry in [prepared["train"], *prepared["evals"]]:
        raw = vault.content(folder / entry["file"])
        docs = np.frombuffer((folder / entry["file"]).read_bytes() if raw is None else raw, dtype="<i8")
        if len(docs) and not (docs.min() >= 0 and docs.max() < facts["docs"]):
            return [f"{entry['file']} names documents that are not there"]
        if content_digest(store, docs) != entry["digest"]:
            return [f"tokens.bin, flags.bin, lengths.bin or {entry['file']} has other content than was written"]
    return []


def _other_size(path: Path, size: int) -> str | None:
    if not path.is_file():
        return (
            None if vault.sealed(path).is_file() else f"{path.name} is missing"
        )  # an encrypted file is proof against changes
    there = path.stat().st_size
    return None if there == size else f"{path.name} has {there:,} bytes, {size:,} were written"
