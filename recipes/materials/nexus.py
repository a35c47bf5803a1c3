"""NeXus definitions (XML, package ``pynxtools``) to rows: description of a measured quantity to its field.

NeXus is the vocabulary in which neutron, X-ray and electron-microscopy laboratories describe an experiment on a material.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, child, distinct, plain, read_xml, tag

DIRECTIONS = {
    "description-to-field": ("Which field? {wording}", "{name}"),
    "field-to-description": ("Describe: {name}", "{wording}"),
}
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
    found = distinct(fields(path), path, "documented NeXus field (*.nxdl.xml)", min_words, max_words)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def fields(path: Path) -> Iterator[dict[str, Any]]:
    """``{"id": "file/number", "name": "NXclass/group/field", "wording"}`` of each documented field and attribute."""
    for file in sorted(path.glob("*.nxdl.xml")):
        root = read_xml(file)
        for number, (name, told) in enumerate(_documented(root, root.get("name", file.stem))):
            yield {"id": f"{file.stem}/{number}", "name": name, "wording": plain(told)}


def _documented(node: ElementTree.Element, name: str) -> Iterator[tuple[str, str]]:
    """(path of names, documentation) of the fields and attributes below a definition or group."""
    for below in node:
        kind = tag(below)
        label = below.get("name") or below.get("type", "")
        if kind not in ("field", "attribute", "group") or not label:
            continue
        full = f"{name}/{label}" if kind != "attribute" else f"{name}@{label}"
        told = child(below, "doc")
        if told is not None and told.text:
            yield full, told.text
        yield from _documented(below, full)
