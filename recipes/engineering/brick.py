"""The Brick ontology of building systems (Turtle, package ``brickschema``) to rows: definition to class.

Only the blocks ``brick:Name ... skos:definition "..."`` are needed, so the file is read with patterns instead of an RDF
library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, read_text, unescaped

_BLOCK = re.compile(r"^brick:(\w+)\s(.*?)\s\.\s*$", re.DOTALL | re.MULTILINE)
_DEFINITION = re.compile(r'skos:definition\s+"((?:[^"\\]|\\.)*)"')


@asked(
    "Brick classes of building equipment, points and locations.",
    {
        "definition-to-class": ("Which class? {wording}", "{name}"),
        "class-to-definition": ("Define: {name}", "{wording}"),
    },
    held_out=0.2,
    what="brick: class with skos:definition",
    words=(3, float("inf")),
)
def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Classes of ``Brick.ttl`` with a definition of their own: ``{"id", "name", "wording"}``."""
    for name, block in _BLOCK.findall(read_text(path)):
        definition = _DEFINITION.search(block)
        if definition:
            yield {"id": name, "name": name.replace("_", " "), "wording": unescaped(definition[1])}
