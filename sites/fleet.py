"""All usable systems at once: ``fleet.json`` holds each resolved profile, so that asking all of them takes a moment.

Reading the YAML of every profile, centre and GPU takes seconds; the file is built from them by
``aifactory sites check --write-index`` and used where its digest is theirs.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from aifactory_train.sites import index
from aifactory_train.sites.catalogue import ROOM, gpu_provenance
from aifactory_train.sites.finding import user_file
from aifactory_train.sites.profiles import load
from aifactory_train.sites.system import System

FLEET = ROOM / "fleet.json"
FORMAT = 1


def digest() -> str:
    """SHA-256 over what the file is built from: the index's files and those of the centres."""
    total = hashlib.sha256(index.digest().encode())
    for path in sorted((ROOM / "centres").glob("*.yaml")):
        total.update(path.name.encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def members_systems() -> list[str]:
    """Ids of the usable systems of the 32, in the order of the index."""
    found = index.load_index()
    named = {name for member in found["members"] for name in member["systems"]}
    return [s["id"] for s in found["systems"] if s["id"] in named]


def load_all() -> list[System]:
    """The usable systems of the 32, as :func:`aifactory_train.sites.load` gives them (the user's overlays included)."""
    rows = _rows()
    return [
        load(name) if name not in rows or user_file(name) is not None else _system(rows[name])
        for name in members_systems()
    ]


@functools.lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, Any]]:
    """The file's systems by id; none where it is missing or was built from other files."""
    if not FLEET.is_file():
        return {}
    kept = json.loads(FLEET.read_text(encoding="utf-8"))
    fresh = kept.get("format") == FORMAT and kept.get("digest") == digest()
    return {row["profile"]["id"]: row for row in kept["systems"]} if fresh else {}


def _system(row: dict[str, Any]) -> System:
    system = System.model_validate(row["profile"])
    table = {path: entry for entry in system.facts for path in entry.at}
    sources, tables = gpu_provenance()
    inherited = row["inherits"]
    gpu = ({}, {}) if inherited is None else (tables[inherited], sources)
    return system.attach(table, *gpu, frozenset(row["own_gpu"]))


def _row(system: System) -> dict[str, Any]:
    profile = system.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {"profile": profile, "inherits": system.gpu.sku, "own_gpu": sorted(system.own_gpu)}


def write_fleet() -> Path:
    """Build and write ``fleet.json``; returns its path."""
    rows = [_row(load(name, overlay=False)) for name in members_systems()]
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    head = f'{{"format": {FORMAT}, "digest": "{digest()}", "systems": [\n'
    FLEET.write_text(head + lines + "\n]}\n", encoding="utf-8")
    _rows.cache_clear()
    return FLEET
