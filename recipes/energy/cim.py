"""The Common Information Model of the grid (Markdown profile in package ``cim-graph``) to rows: definition to name.

The profile lists each class with its own members; members that are inherited only point to the class that defines them
and are left out, so that each definition stands once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, plain, read_text

_MEMBER = re.compile(r"^\| `?([A-Za-z]\w*) \[[^\]]*\]`?[^|]*\| [^|]*\| (.+?) \| [^|]*\|$")


@asked(
    "Common Information Model.",
    {
        "definition-to-name": ("Which element? {wording}", "{id}"),
        "name-to-definition": ("Define: {id}", "{wording}"),
    },
    held_out=0.2,
    what="class or member definitions",
    words=(6, 50),
)
def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Classes of a ``*.rdfs-t2b.md`` profile and the members that they do not inherit: ``{"id": "Class" or
    "Class.member", "wording"}``.
    """
    text = read_text(path, errors="replace")  # a few Latin-1 apostrophes stand in the UTF-8 file
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("\n")
        name = name.strip()
        own = body.split("#### Inherited Members")[0]
        reported = re.sub(r"```.*?```", "", own.split("#### ")[0], flags=re.DOTALL)
        about = [line for line in reported.splitlines() if line and not line.startswith(("Inheritance path", "{#"))]
        pairs = [(name, " ".join(about))]
        pairs += [(f"{name}.{m[1]}", m[2]) for line in own.splitlines() if (m := _MEMBER.match(line))]
        for key, definition in pairs:
            wording = plain(definition.replace("\ufffd", "'"))
            if not wording.startswith("see ["):
                yield {"id": key, "wording": wording}
