"""The Common Information Model of the grid (Markdown profile in package ``cim-graph``) to rows: definition to name.

The profile lists each class with its own members; members that are inherited only point to the class that defines them and
are left out, so that each definition stands once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, distinct, plain, read_text

DIRECTIONS = {
    "definition-to-name": ("Which element? {wording}", "{id}"),
    "name-to-definition": ("Define: {id}", "{wording}"),
}
SYSTEM = "Common Information Model."

_MEMBER = re.compile(r"^\| `?([A-Za-z]\w*) \[[^\]]*\]`?[^|]*\| [^|]*\| (.+?) \| [^|]*\|$")


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "definition-to-name",
    held_out: float = 0.2,
    min_words: int = 6,
    max_words: int = 50,
) -> Iterator[dict[str, Any]]:
    """Rows of a ``*.rdfs-t2b.md`` profile.

    Args:
        path: the Markdown file.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        held_out: share of the definitions that is held out.
        min_words, max_words: shorter and longer definitions are left out.
    """
    found = distinct(definitions(path), path, "class or member definitions", min_words, max_words)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def definitions(path: Path) -> Iterator[dict[str, Any]]:
    """``{"id": "Class" or "Class.member", "wording"}`` of each class and of each member that it does not inherit."""
    text = read_text(path, errors="replace")  # a few Latin-1 apostrophes stand in the UTF-8 file
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("\n")
        name = name.strip()
        own = body.split("#### Inherited Members")[0]
        told = re.sub(r"```.*?```", "", own.split("#### ")[0], flags=re.DOTALL)
        about = [line for line in told.splitlines() if line and not line.startswith(("Inheritance path", "{#"))]
        pairs = [(name, " ".join(about))]
        pairs += [(f"{name}.{m[1]}", m[2]) for line in own.splitlines() if (m := _MEMBER.match(line))]
        for key, definition in pairs:
            wording = plain(definition.replace("\ufffd", "'"))
            if not wording.startswith("see ["):
                yield {"id": key, "wording": wording}
