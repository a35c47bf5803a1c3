"""The Common Weakness Enumeration (XML, package ``cwe2``) to rows: name of a weakness to its description and
consequences.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, child, not_xml, plain, tag


@asked(
    "Common Weakness Enumeration.",
    {
        "name-to-description": ("Describe: {name}", "{wording}"),
        "description-to-name": ("Which weakness? {wording}", "{name}"),
    },
    what="Weakness",
    once=False,
)
def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Weaknesses of ``cwec_v*.xml`` that are not deprecated: ``{"id", "name", "wording"}`` (name without the bracketed
    short form).
    """
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
