"""What all systems of one centre share: ``centres/<centre>.yaml``, laid under the profiles that it names.

``sections`` holds what is said of every system, ``of`` what differs for one. A profile's own value wins, key by key;
what is taken brings its source along, so that a fact of a centre is shown and checked like any other.
"""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

from pydantic import Field

from aifactory_train.sites.catalogue import ROOM
from aifactory_train.sites.fields import SiteModel
from aifactory_train.sites.paths import covering, leaves
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.schema import FactEntry, Source
from aifactory_train.sites.services import SECTIONS

CENTRES = ROOM / "centres"
#: Sections that a centre may speak of.
SHARED = (*SECTIONS, "access")


class Centre(SiteModel):
    """One file in ``centres/``."""

    operator: str
    systems: list[str] = Field(min_length=1)
    sections: dict[str, dict[str, Any]] = {}
    of: dict[str, dict[str, dict[str, Any]]] = {}  # system -> sections
    sources: dict[str, Source] = {}
    facts: list[FactEntry] = []


def read_centre(path: Path) -> Centre:
    """One centre; a section or system that it may not speak of is an error. Raises ValueError."""
    centre = Centre.model_validate(read_yaml(path))
    if not re.search(r"^systems: \[.*\]$", path.read_text(encoding="utf-8"), re.MULTILINE):
        raise ValueError("'systems' is a list in brackets on one line")
    for sections in (centre.sections, *centre.of.values()):
        for key in sections:
            if key not in SHARED:
                raise ValueError(f"'{key}' is no section of a centre: {', '.join(SHARED)}")
    strangers = sorted(set(centre.of) - set(centre.systems))
    if strangers:
        raise ValueError(f"'of' names {', '.join(strangers)}, which 'systems' does not")
    return centre


@functools.cache
def centre_of(system: str) -> Centre | None:
    """The centre that runs a system. Only its own file is parsed: launching reads one profile, and is to be quick."""
    for path in sorted(CENTRES.glob("*.yaml")):
        named = re.search(r"^systems: \[(.*)\]$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if named is not None and system in re.split(r"[,\s]+", named[1]):
            return read_centre(path)
    return None


def with_centre(raw: dict[str, Any], centre: Centre | None = None) -> dict[str, Any]:
    """A raw profile with what its centre says; the same object where no centre names it.

    Facts of the centre stand before the profile's own, one path a value that was taken.
    """
    name = raw.get("id")
    if centre is None:
        centre = centre_of(name) if isinstance(name, str) and raw.get("status") == "usable" else None
    if centre is None or not _well_formed(raw):
        return raw  # what is malformed is refused when the profile is validated
    out = copy.deepcopy(raw)
    table = {path: entry for entry in centre.facts for path in entry.at}
    taken: list[dict[str, Any]] = []
    for key in SHARED:
        said = _lay(centre.sections.get(key), centre.of.get(str(name), {}).get(key))
        own = out.get(key) or {}
        if not said:
            continue
        unknown = {k: v for k, v in said.pop("unknown", {}).items() if own.get(k) is None and said.get(k) is None}
        new = {k: v for k, v in said.items() if own.get(k) is None and k not in own.get("unknown", {})}
        for path, _ in leaves(new, key):
            entry = covering(path, table)
            if entry is not None:
                source = f"centre-{entry.source}" if entry.source in centre.sources else entry.source
                taken.append({**entry.model_dump(exclude_none=True), "at": [path], "source": source})
        out[key] = own | new
        if unknown:
            out[key]["unknown"] = unknown | own.get("unknown", {})
    out["facts"] = [*taken, *(out.get("facts") or [])]
    used = {entry["source"] for entry in taken}
    sources = {f"centre-{k}": v.model_dump() for k, v in centre.sources.items() if f"centre-{k}" in used}
    out["sources"] = sources | (out.get("sources") or {})
    return out


def _well_formed(raw: dict[str, Any]) -> bool:
    """Whether what is laid under has the kinds that laying needs."""
    sections = [raw.get(key) or {} for key in SHARED]
    unknown = [s.get("unknown", {}) for s in sections if isinstance(s, dict)]
    return isinstance(raw.get("facts") or [], list) and all(
        isinstance(part, dict) for part in (*sections, *unknown, raw.get("sources") or {})
    )


def _lay(below: dict[str, Any] | None, above: dict[str, Any] | None) -> dict[str, Any]:
    """Two sections, the second on top; their ``unknown`` lists are joined."""
    said = copy.deepcopy(below or {}) | copy.deepcopy(above or {})
    unknown = {**(below or {}).get("unknown", {}), **(above or {}).get("unknown", {})}
    return said | ({"unknown": unknown} if unknown else {})
