"""MAVLink message definitions (TypeScript, npm package ``mavlink-mappings``) to rows: description to message or field.

MAVLink is how drones and ground vehicles are commanded and observed. The generated TypeScript carries the protocol's own
documentation as comments; it is read as text, nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain, read_text

DIRECTIONS = ("description-to-name", "name-to-description")
SYSTEM = "MAVLink."

_COMMENT = re.compile(r"/\*\*(.*?)\*/\s*(?:export (?:class|enum) (\w+)|'?(\w+)'?\s*(?::|=))", re.DOTALL)


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "description-to-name",
    held_out: float = 0.2,
    min_words: int = 4,
    max_words: int = 45,
) -> Iterator[dict[str, Any]]:
    """Rows of ``common.ts``.

    Args:
        path: one of the package's ``lib/*.ts``.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        held_out: share of the descriptions that is held out.
        min_words, max_words: shorter and longer descriptions are left out.
    """
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(elements(path, min_words, max_words), part, held_out):
        if direction == "description-to-name":
            prompt, completion = f"Which element? {entry['wording']}", entry["id"]
        else:
            prompt, completion = f"Describe: {entry['id']}", entry["wording"]
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def elements(path: Path, min_words: int, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id": "Message" or "Message.field", "wording"}``; the same wording is yielded once."""
    seen: set[str] = set()
    owner = ""
    for comment, block, member in _COMMENT.findall(read_text(path)):
        owner = block or owner
        wording = plain(re.sub(r"^\s*\*", " ", comment, flags=re.MULTILINE))
        if not owner or wording in seen or not min_words <= len(wording.split()) <= max_words:
            continue
        seen.add(wording)
        yield {"id": block or f"{owner}.{member}", "wording": wording}
    if not seen:
        raise no_rows(path, "documented message")
