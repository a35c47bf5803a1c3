"""OPC UA companion specifications (XML node sets, npm package ``node-opcua-nodesets``) to rows: node to description."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.errors import UserError
from aifactory_train.recipes.common import chat, choose, no_rows, parted, plain

DIRECTIONS = ("node-to-description", "description-to-node")
SYSTEM = "OPC UA."


def rows(
    path: Path,
    *,
    part: str = "train",
    direction: str = "node-to-description",
    files: list[str] | None = None,
    held_out: float = 0.15,
    min_words: int = 5,
    max_words: int = 50,
) -> Iterator[dict[str, Any]]:
    """Rows of the node sets in a folder.

    Args:
        path: the package's ``nodesets`` folder.
        part: ``train`` or ``held_out``.
        direction: one of :data:`DIRECTIONS`.
        files: parts of file names that are read, e.g. ``[Robotics, MachineTool]``; default every companion specification
            (the base model of OPC UA itself is left out).
        held_out: share of the descriptions that is held out.
        min_words, max_words: shorter and longer descriptions are left out.
    """
    choose(direction, DIRECTIONS, "direction")
    for entry in parted(nodes(path, files, min_words, max_words), part, held_out):
        if direction == "node-to-description":
            prompt, completion = f"Describe: {entry['name']} ({entry['kind']}, {entry['spec']})", entry["wording"]
        else:
            prompt, completion = f"Which node? {entry['wording']}", entry["name"]
        yield chat(entry, f"{entry['id']}/{direction}", prompt, completion, SYSTEM)


def nodes(path: Path, files: list[str] | None, min_words: int, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id", "name", "kind", "spec", "wording"}`` of every node with a description of its own."""
    sources = sorted(p for p in path.glob("*.xml") if p.name != "Opc.Ua.NodeSet2.xml")
    if files:
        sources = [p for p in sources if any(word.lower() in p.name.lower() for word in files)]
    if not sources:
        raise no_rows(path, "node set (*.xml)")
    seen: set[str] = set()
    for source in sources:
        spec = source.name.split(".NodeSet")[0].split(".Nodeset")[0].split(".nodeset")[0].rpartition("Opc.Ua.")[2]
        try:
            root = ElementTree.parse(source).getroot()
        except ElementTree.ParseError as error:
            raise UserError(f"not XML: {error}", where=str(source)) from None
        for node in root:
            kind = node.tag.rpartition("}")[2]
            if not kind.startswith("UA"):
                continue
            told = next((c for c in node if c.tag.rpartition("}")[2] == "Description"), None)
            wording = plain(told.text or "") if told is not None else ""
            if wording in seen or not min_words <= len(wording.split()) <= max_words:
                continue
            seen.add(wording)
            name = node.get("BrowseName", "").rpartition(":")[2]
            yield {
                "id": f"{spec}/{node.get('NodeId')}",
                "name": name,
                "kind": kind[2:],
                "spec": spec,
                "wording": wording,
            }
