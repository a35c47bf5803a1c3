"""The CF standard-name table (XML, package ``compliance-checker``) to rows: what a variable is called, and what it
means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, no_rows, plain, read_xml


@asked(
    "CF standard names.",
    {
        "definition-to-name": ("Which name? {wording}{unit}", "{id}"),
        "name-to-definition": ("Define: {id}{unit}", "{wording}"),
    },
    held_out=0.3,  # large, because most of them are then left out: a sister name has the same sentences
    words=(1, 70),
    once=False,
)
def rows(path: Path, *, topics: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Entries of ``cf-standard-name-table.xml`` with a definition: ``{"id", "unit", "wording"}``.

    The unit is as it follows the text, `` [K]`` or empty.

    Args:
        topics: only names that hold one of these words, e.g. ``[carbon, methane]``.
    """
    entries = read_xml(path).findall("entry")
    if not entries:
        raise no_rows(path, "entry")
    for entry in entries:
        name, text = entry.get("id", ""), plain(entry.findtext("description") or "")
        if topics and not set(topics) & set(re.split("_", name)):
            continue
        unit = plain(entry.findtext("canonical_units") or "")
        yield {"id": name, "unit": f" [{unit}]" if unit else "", "wording": text}
