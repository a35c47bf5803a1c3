"""NeXus definitions (XML, package ``pynxtools``) to rows: description of a measured quantity to its field.

NeXus is the vocabulary in which neutron, X-ray and electron-microscopy laboratories describe an experiment on a material.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.errors import UserError
from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain

DIRECTIONS = ("description-to-field", "field-to-description")
SYSTEM = "NeXus."


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "description-to-field",
    held_out: float = 0.15,
    min_words: int = 5,
    max_words: int = 50,
) -> Iterator[dict[str, Any]]:
    """Rows of a folder of ``*.nxdl.xml`` files.

    Args:
        path: e.g. the package's ``definitions/base_classes``.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        held_out: share of the descriptions that is held out.
        min_words, max_words: shorter and longer descriptions are left out.
    """
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(fields(path, min_words, max_words), part, held_out):
        if direction == "description-to-field":
            prompt, completion = f"Which field? {entry['wording']}", entry["name"]
        else:
            prompt, completion = f"Describe: {entry['name']}", entry["wording"]
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def fields(path: Path, min_words: int, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id": "file/NXclass/group/field", "name": "NXclass/group/field", "wording"}``; the same wording is yielded once."""
    seen: set[str] = set()
    for file in sorted(path.glob("*.nxdl.xml")):
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise UserError(f"not XML: {error}", where=str(file)) from None
        for number, (name, told) in enumerate(_documented(root, root.get("name", file.stem))):
            wording = plain(told)
            if wording in seen or not min_words <= len(wording.split()) <= max_words:
                continue
            seen.add(wording)
            yield {"id": f"{file.stem}/{number}", "name": name, "wording": wording}
    if not seen:
        raise no_rows(path, "documented NeXus field (*.nxdl.xml)")


def _documented(node: ElementTree.Element, name: str) -> Iterator[tuple[str, str]]:
    """(path of names, documentation) of the fields and attributes below a definition or group."""
    for child in node:
        kind = child.tag.rpartition("}")[2]
        label = child.get("name") or child.get("type", "")
        if kind not in ("field", "attribute", "group") or not label:
            continue
        below = f"{name}/{label}" if kind != "attribute" else f"{name}@{label}"
        told = next((c.text for c in child if c.tag.rpartition("}")[2] == "doc"), None)
        if told:
            yield below, told
        yield from _documented(child, below)
