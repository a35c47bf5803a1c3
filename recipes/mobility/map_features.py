"""The OpenStreetMap tagging schema (npm package ``@openstreetmap/id-tagging-schema``, JSON) to rows.

The name that a person uses for a feature of roads, rails, waterways or airfields, in any European language, to the tag that a
map and a router use. A feature is held out in every language or in none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.errors import UserError
from aifactory_train.recipes.common import check_part, check_share, no_rows, read_text, share_of

#: First parts of tags that have to do with moving people and goods.
MODES = ("aerialway", "aeroway", "amenity", "barrier", "cycleway", "footway", "highway", "parking", "public_transport")
MODES += ("railway", "route", "traffic_calming", "traffic_sign", "type", "waterway")
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
    check_part(part)
    check_share(held_out)
    presets = json.loads(read_text(path / "presets.json"))
    wanted = tuple(modes or MODES)
    count = 0
    for language in languages:
        file = path / "translations" / f"{language}.json"
        if not re.fullmatch(r"[A-Za-z-]{2,10}", language) or not file.is_file():
            known = sorted(p.stem for p in (path / "translations").glob("*.json") if ".min" not in p.name)
            raise UserError(f"no translation '{language}'", where=str(path), fix=f"one of {', '.join(known)}")
        names = json.loads(read_text(file))[language]["presets"]["presets"]
        for key, text in names.items():
            tags = {k: v for k, v in (presets.get(key, {}).get("tags") or {}).items() if v != "*"}
            if key.split("/")[0] not in wanted or not tags or not text.get("name"):
                continue
            # one name for a feature and all that differs only in a detail of it
            group = "/".join(key.split("/")[:2])
            if (share_of(group) < held_out) != (part == "held_out"):
                continue
            other = _list(text.get("terms")) or _list(text.get("aliases"))
            shown = f" ({', '.join(other[:3])})" if other else ""
            answer = "; ".join(f"{k}={v}" for k, v in tags.items())
            count += 1
            yield {
                "id": f"{language}/{key}",
                "group": group,
                "prompt": f"{language}: {text['name']}{shown}",
                "completion": answer,
                "system": SYSTEM,
            }
    if not count:
        raise no_rows(path, f"feature of {', '.join(wanted)}")


def _list(value: Any) -> list[str]:
    """Other names of a feature: the file has them as a list or as one string."""
    parts = re.split(r"[,\n]", value) if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts if str(part).strip()]
