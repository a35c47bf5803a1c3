"""The OpenStreetMap tagging schema (npm package ``@openstreetmap/id-tagging-schema``, JSON) to rows.

The name that a person uses for a feature of roads, rails, waterways or airfields, in any European language, to the tag
that a map and a router use. A feature is held out in every language or in none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.recipes.common import chat, parted, read_text, some

#: First parts of tags that have to do with moving people and goods.
MODES = (
    *("aerialway", "aeroway", "amenity", "barrier", "cycleway", "footway", "highway", "parking", "public_transport"),
    *("railway", "route", "traffic_calming", "traffic_sign", "type", "waterway"),
)
SYSTEM = "OpenStreetMap tag for this feature."


def rows(
    path: Path, *, languages: list[str], part: str = "train", held_out: float = 0.15, modes: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows "<language>: <name> (<other names>)" to the tag, e.g. ``highway=cycleway``.

    Args:
        path: the package's ``dist`` folder.
        languages: names of files in ``translations``, e.g. ``[en, de, fr]``.
        part: ``train`` or ``held_out``.
        held_out: share of the features that is held out.
        modes: first parts of the tags that are read; default :data:`MODES`.
    """
    wanted = tuple(modes or MODES)
    found = some(features(path, languages, wanted), path, f"feature of {', '.join(wanted)}")
    for entry in parted(found, part, held_out):
        language = entry["id"].split("/")[0]
        row = chat(entry, entry["id"], f"{language}: {entry['name']}", entry["answer"], SYSTEM)
        yield {**row, "language": language}  # names are too short to tell it from


def features(path: Path, languages: list[str], modes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """``{"id", "group", "wording", "name", "answer"}`` of each feature in each language.

    The group is the first two parts of the feature's key (``highway/path`` with all that differs only in a detail of
    it), so that it falls into one part in every language. The wording is the name: one that also stands for a training
    feature, as words of transport do across languages, is not held out.
    """
    presets = json.loads(read_text(path / "presets.json"))
    for language in languages:
        file = path / "translations" / f"{language}.json"
        if not re.fullmatch(r"[A-Za-z-]{2,10}", language) or not file.is_file():
            known = sorted(p.stem for p in (path / "translations").glob("*.json") if ".min" not in p.name)
            raise UserError(f"no translation '{language}'", where=str(path), fix=f"one of {', '.join(known)}")
        for key, text in json.loads(read_text(file))[language]["presets"]["presets"].items():
            tags = {k: v for k, v in (presets.get(key, {}).get("tags") or {}).items() if v != "*"}
            if key.split("/")[0] not in modes or not tags or not text.get("name"):
                continue
            other = _list(text.get("terms")) or _list(text.get("aliases"))
            yield {
                "id": f"{language}/{key}",
                "group": "/".join(key.split("/")[:2]),
                "wording": text["name"],
                "name": text["name"] + (f" ({', '.join(other[:3])})" if other else ""),
                "answer": "; ".join(f"{k}={v}" for k, v in tags.items()),
            }


def _list(value: Any) -> list[str]:
    """Other names of a feature: the file has them as a list or as one string."""
    parts = re.split(r"[,\n]", value) if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts if str(part).strip()]
