"""MAVLink message definitions (TypeScript, npm package ``mavlink-mappings``) to rows: description to message or field.

MAVLink is how drones and ground vehicles are commanded and observed. The generated TypeScript carries the protocol's own
documentation as comments; it is read as text, nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, distinct, plain, read_text

DIRECTIONS = {
    "description-to-name": ("Which element? {wording}", "{id}"),
    "name-to-description": ("Describe: {id}", "{wording}"),
}
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
    found = distinct(elements(path), path, "documented message", min_words, max_words)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def elements(path: Path) -> Iterator[dict[str, Any]]:
    """``{"id": "Message" or "Message.field", "wording"}`` of everything with a comment."""
    owner = ""
    for comment, block, member in _COMMENT.findall(read_text(path)):
        owner = block or owner
        if owner:
            wording = plain(re.sub(r"^\s*\*", " ", comment, flags=re.MULTILINE))
            yield {"id": block or f"{owner}.{member}", "wording": wording}
