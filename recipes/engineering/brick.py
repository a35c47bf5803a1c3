"""The Brick ontology of building systems (Turtle, package ``brickschema``) to rows: definition to class.

Only the blocks ``brick:Name ... skos:definition "..."`` are needed, so the file is read with patterns instead of an RDF library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain, read_text

DIRECTIONS = ("definition-to-class", "class-to-definition")
SYSTEM = "Brick classes of building equipment, points and locations."

_BLOCK = re.compile(r"^brick:(\w+)\s(.*?)\s\.\s*$", re.DOTALL | re.MULTILINE)
_DEFINITION = re.compile(r'skos:definition\s+"((?:[^"\\]|\\.)*)"')


def rows(
    path: Path, *, part: str = "train", direction: str = "definition-to-class", held_out: float = 0.2
) -> Iterator[dict[str, Any]]:
    """Rows of ``Brick.ttl``.

    Args:
        path: the Turtle file.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        held_out: share of the definitions that is held out.
    """
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(classes(path), part, held_out):
        name = entry["id"].replace("_", " ")
        if direction == "definition-to-class":
            prompt, completion = f"Which class? {entry['wording']}", name
        else:
            prompt, completion = f"Define: {name}", entry["wording"]
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def classes(path: Path) -> Iterator[dict[str, Any]]:
    """``{"id", "wording"}`` of every class with a definition of its own."""
    seen: set[str] = set()
    for name, block in _BLOCK.findall(read_text(path)):
        told = _DEFINITION.search(block)
        wording = plain(re.sub(r"\\(.)", lambda m: " " if m[1] == "n" else m[1], told[1])) if told else ""
        if len(wording.split()) < 3 or wording in seen:
            continue
        seen.add(wording)
        yield {"id": name, "wording": wording}
    if not seen:
        raise no_rows(path, "brick: class with skos:definition")
