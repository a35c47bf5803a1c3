"""The built index: what list commands need, in one JSON file, so that they answer without reading seventy YAML files.

``index.json`` is generated (``aifactory sites check --write-index``) and carries a digest of every file it was built
from. A reader whose files differ (somebody is editing) rebuilds it in memory, so the index can never tell an old story.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.sites.system import System

ROOM = Path(__file__).resolve().parent
INDEX = ROOM / "index.json"
FORMAT = 1

#: What has been tried on a system (``readiness.yaml``), least first. Only *run* and *reported* say anything of the site
#: itself: a twin is built from the same profile as the scripts that it judges.
READINESS_WORDS = {
    "announced": "announced",
    "documented": "documented",
    "twin": "accepted by its scheduler twin",
    "run": "run by us",
    "reported": "reported by a user",
}


def source_files() -> list[Path]:
    """The files the index is built from, in a fixed order."""
    named = [ROOM / "factories.yaml", ROOM / "gpus.yaml", ROOM / "sources.yaml", ROOM / "readiness.yaml"]
    return [p for p in named if p.is_file()] + sorted((ROOM / "systems").glob("*.yaml"))


def digest() -> str:
    """SHA-256 over names and contents of the source files."""
    total = hashlib.sha256()
    for path in source_files():
        total.update(path.name.encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@functools.lru_cache(maxsize=1)
def load_index() -> dict[str, Any]:
    """``{"members": [...], "systems": [...], ...}`` from the file where it is fresh, else built now."""
    current = digest()
    if INDEX.is_file():
        index = json.loads(INDEX.read_text(encoding="utf-8"))
        if index.get("format") == FORMAT and index.get("digest") == current:
            return index
    return build_index(current)


def build_index(current: str | None = None) -> dict[str, Any]:
    """The index from the YAML files."""
    from aifactory_train.sites import catalogue, reading
    from aifactory_train.sites.resolving import resolve  # here: a fresh index is read without pydantic

    systems = [_system_row(resolve(reading.read_yaml(path), path)) for path in sorted(catalogue.SYSTEMS.glob("*.yaml"))]
    raw = reading.read_yaml(catalogue.FACTORIES)
    status = {s["id"]: s["status"] for s in systems}
    by_id = {m["id"]: m for m in raw["members"]}
    members = [_member_row(m, by_id, status, raw["countries"]) for m in raw["members"]]
    return {"format": FORMAT, "digest": current or digest(), "members": members, "systems": systems}


def _system_row(system: System) -> dict[str, Any]:
    from aifactory_train.sites.resolving import readiness_of

    level, evidence = readiness_of(system)
    longest = [v for v in (system.limits(p)["max_time"] for p in system.partitions) if v]
    qos_longest = [q.max_time for q in system.qos.values() if q.max_time]
    return {
        "id": system.id,
        "name": system.name,
        "aliases": list(system.aliases),
        "status": system.status,
        "status_reason": system.status_reason,
        "operator": system.operator,
        "country": system.country,
        "arch": system.gpu.arch,
        "gpu": system.gpu.model,
        "sku": system.gpu.sku,
        "gpu_memory_gib": system.gpu.memory_gib,
        "gpus_per_node": system.node.gpus,
        "nodes": system.node.count,
        "isa": system.node.isa,
        "scheduler": system.scheduler.kind,
        "partitions": list(system.partitions),
        "max_time": max(longest + qos_longest) if longest or qos_longest else None,
        "max_nodes": system.max_nodes,
        "internet": system.internet.compute,
        "readiness": level,
        "readiness_evidence": evidence,
        "complete": system.complete if system.usable else False,
        "missing": list(system.missing),
        "expires": system.expires.isoformat(),
        "detect": system.detect.model_dump(),
    }


def _member_row(
    m: dict[str, Any], by_id: dict[str, Any], status: dict[str, str], countries: dict[str, str]
) -> dict[str, Any]:
    linked = [
        s for link in m.get("links", []) for s in by_id.get(link, {}).get("systems", []) if status.get(s) == "usable"
    ]
    return {
        "id": m["id"],
        "name": m["name"],
        "kind": m["kind"],
        "country": m["country"],
        "country_name": countries.get(m["country"], m["country"]),
        "host": m["host"],
        "wave": m.get("wave"),
        "sectors": m.get("sectors", []),
        "sectors_reason": m.get("sectors_reason"),
        "focus": m.get("focus"),
        "links": m.get("links", []),
        "systems": [s for s in m.get("systems", []) if status.get(s) == "usable"],
        "announced": [s for s in m.get("announced", []) if status.get(s) == "announced"],
        "unsuitable": [s for s in m.get("unsuitable", []) if status.get(s) == "unsuitable"],
        "linked_systems": list(dict.fromkeys(linked)),
        "reason": m.get("reason"),
    }


def write_index() -> Path:
    """Build and write ``index.json``; returns its path."""
    load_index.cache_clear()
    index = build_index()
    lines = [f'{{"format": {index["format"]}, "digest": "{index["digest"]}",']
    for key in ("members", "systems"):
        lines.append(f' "{key}": [')
        rows = [json.dumps(row, ensure_ascii=False) for row in index[key]]
        lines.append(",\n".join("  " + row for row in rows))
        lines.append(" ]" + ("," if key == "members" else "}"))
    INDEX.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return INDEX


def write_schemas() -> list[Path]:
    """Write the JSON Schemas of profile and overlay beside the index; returns their paths."""
    from aifactory_train.sites.schema import json_schema

    paths = []
    for which, name in (("profile", "site.schema.json"), ("overlay", "overlay.schema.json")):
        path = ROOM / name
        path.write_text(json.dumps(json_schema(which), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
