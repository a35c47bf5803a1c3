"""The Brick ontology of building systems (Turtle, package ``brickschema``) to rows: definition to class.

Only the blocks ``brick:Name ... skos:definition "..."`` are needed, so the file is read with patterns instead of an RDF library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, distinct, read_text, unescaped

DIRECTIONS = {
    "definition-to-class": ("Which class? {wording}", "{name}"),
    "class-to-definition": ("Define: {name}", "{wording}"),
}
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
    found = distinct(classes(path), path, "brick: class with skos:definition", min_words=3)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def classes(path: Path) -> Iterator[dict[str, Any]]:
    """``{"id", "name", "wording"}`` of every class with a definition of its own."""
    for name, block in _BLOCK.findall(read_text(path)):
        told = _DEFINITION.search(block)
        if told:
            yield {"id": name, "name": name.replace("_", " "), "wording": unescaped(told[1])}
