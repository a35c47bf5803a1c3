"""The CF standard-name table (XML, package ``compliance-checker``) to rows: what a variable is called, and what it means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, no_rows, plain, read_xml

DIRECTIONS = {
    "definition-to-name": ("Which name? {wording}{unit}", "{id}"),
    "name-to-definition": ("Define: {id}{unit}", "{wording}"),
}
SYSTEM = "CF standard names."


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "definition-to-name",
    topics: list[str] | None = None,
    held_out: float = 0.3,
    max_words: int = 70,
) -> Iterator[dict[str, Any]]:
    """Rows of ``cf-standard-name-table.xml``.

    Args:
        path: the XML file.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        topics: only names that hold one of these words, e.g. ``[carbon, methane]``.
        held_out: share of the wordings that is held out; most of them are then left out because a sister name has the same
            sentences, which is why the share is large.
        max_words: longer definitions are left out.
    """
    found = names(path, topics, max_words)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def names(path: Path, topics: list[str] | None, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id", "unit", "wording"}`` of each entry with a definition; the unit as it follows the text, `` [K]`` or empty."""
    entries = read_xml(path).findall("entry")
    if not entries:
        raise no_rows(path, "entry")
    for entry in entries:
        name, text = entry.get("id", ""), plain(entry.findtext("description") or "")
        if not text or len(text.split()) > max_words:
            continue
        if topics and not set(topics) & set(re.split("_", name)):
            continue
        unit = plain(entry.findtext("canonical_units") or "")
        yield {"id": name, "unit": f" [{unit}]" if unit else "", "wording": text}
