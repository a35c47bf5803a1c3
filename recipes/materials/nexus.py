"""NeXus definitions (XML, package ``pynxtools``) to rows: description of a measured quantity to its field.

NeXus is the vocabulary in which neutron, X-ray and electron-microscopy laboratories describe an experiment on a
material.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, child, plain, read_xml, tag


@asked(
    "NeXus.",
    {
        "description-to-field": ("Which field? {wording}", "{name}"),
        "field-to-description": ("Describe: {name}", "{wording}"),
    },
    what="documented NeXus field (*.nxdl.xml)",
    words=(5, 50),
)
def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Documented fields and attributes of a folder of ``*.nxdl.xml`` files: ``{"id": "file/number", "name":
    "NXclass/group/field", "wording"}``.
    """
    for file in sorted(path.glob("*.nxdl.xml")):
        root = read_xml(file)
        for number, (name, text) in enumerate(_documented(root, root.get("name", file.stem))):
            yield {"id": f"{file.stem}/{number}", "name": name, "wording": plain(text)}


def _documented(node: ElementTree.Element, name: str) -> Iterator[tuple[str, str]]:
    """(path of names, documentation) of the fields and attributes below a definition or group."""
    for below in node:
        kind = tag(below)
        label = below.get("name") or below.get("type", "")
        if kind not in ("field", "attribute", "group") or not label:
            continue
        full = f"{name}/{label}" if kind != "attribute" else f"{name}@{label}"
        doc = child(below, "doc")
        if doc is not None and doc.text:
            yield full, doc.text
        yield from _documented(below, full)
