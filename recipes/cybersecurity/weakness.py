"""The Common Weakness Enumeration (XML, package ``cwe2``) to rows: name of a weakness to its description and consequences."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, child, not_xml, plain, some, tag

DIRECTIONS = {
    "name-to-description": ("Describe: {name}", "{wording}"),
    "description-to-name": ("Which weakness? {wording}", "{name}"),
}
SYSTEM = "Common Weakness Enumeration."


def rows(
    path: Path, *, part: str = "train", direction: str = "name-to-description", held_out: float = 0.15
) -> Iterator[dict[str, Any]]:
    """Rows of ``cwec_v*.xml``; see :func:`weaknesses` for what is read.

    Args:
        path: the XML file.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        held_out: share of the weaknesses that is held out.
    """
    found = some(weaknesses(path), path, "Weakness")
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def weaknesses(path: Path) -> Iterator[dict[str, Any]]:
    """Weaknesses that are not deprecated: ``{"id", "name", "wording"}`` (name without the bracketed short form)."""
    try:
        for _, node in ElementTree.iterparse(path):
            if tag(node) != "Weakness" or node.get("Status") == "Deprecated":
                continue
            description = child(node, "Description")
            text = plain("".join(description.itertext())) if description is not None else ""
            if text:
                yield {"id": f"CWE-{node.get('ID')}", "name": node.get("Name", ""), "wording": text}
            node.clear()
    except ElementTree.ParseError as error:
        raise not_xml(path, error) from None
