"""MAVLink message definitions (TypeScript, npm package ``mavlink-mappings``) to rows: description to message or field.

MAVLink is how drones and ground vehicles are commanded and observed. The generated TypeScript carries the protocol's
own documentation as comments; it is read as text, nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, plain, read_text

_COMMENT = re.compile(r"/\*\*(.*?)\*/\s*(?:export (?:class|enum) (\w+)|'?(\w+)'?\s*(?::|=))", re.DOTALL)


@asked(
    "MAVLink.",
    {
        "description-to-name": ("Which element? {wording}", "{id}"),
        "name-to-description": ("Describe: {id}", "{wording}"),
    },
    held_out=0.2,
    what="documented message",
    words=(4, 45),
)
def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Everything with a comment in one of the package's ``lib/*.ts``: ``{"id": "Message" or "Message.field",
    "wording"}``.
    """
    owner = ""
    for comment, block, member in _COMMENT.findall(read_text(path)):
        owner = block or owner
        if owner:
            wording = plain(re.sub(r"^\s*\*", " ", comment, flags=re.MULTILINE))
            yield {"id": block or f"{owner}.{member}", "wording": wording}
