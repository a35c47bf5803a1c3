"""The Common Weakness Enumeration (XML, package ``cwe2``) to rows: name of a weakness to its description and consequences."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.errors import UserError
from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain

DIRECTIONS = ("name-to-description", "description-to-name")
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
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(weaknesses(path), part, held_out):
        if direction == "name-to-description":
            prompt, completion = f"Describe: {entry['name']}", entry["wording"]
        else:
            prompt, completion = f"Which weakness? {entry['wording']}", entry["name"]
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def weaknesses(path: Path) -> Iterator[dict[str, Any]]:
    """Weaknesses that are not deprecated: ``{"id", "name", "wording"}`` (name without the bracketed short form)."""
    found = 0
    try:
        for _, node in ElementTree.iterparse(path):
            if node.tag.rpartition("}")[2] != "Weakness" or node.get("Status") == "Deprecated":
                continue
            description = next((c for c in node if c.tag.rpartition("}")[2] == "Description"), None)
            text = plain("".join(description.itertext())) if description is not None else ""
            if text:
                found += 1
                yield {"id": f"CWE-{node.get('ID')}", "name": node.get("Name", ""), "wording": text}
            node.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"not XML: {error}", where=str(path)) from None
    if not found:
        raise no_rows(path, "Weakness")
