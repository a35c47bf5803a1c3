"""OPC UA companion specifications (XML node sets, npm package ``node-opcua-nodesets``) to rows: node to description."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, child, distinct, no_rows, plain, read_xml, tag

DIRECTIONS = {
    "node-to-description": ("Describe: {name} ({kind}, {spec})", "{wording}"),
    "description-to-node": ("Which node? {wording}", "{name}"),
}
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
    found = distinct(nodes(path, files), path, "node with a description", min_words, max_words)
    return asked(found, DIRECTIONS, direction, part=part, held_out=held_out, system=SYSTEM)


def nodes(path: Path, files: list[str] | None) -> Iterator[dict[str, Any]]:
    """``{"id", "name", "kind", "spec", "wording"}`` of every node; the wording of some is empty."""
    sources = sorted(p for p in path.glob("*.xml") if p.name != "Opc.Ua.NodeSet2.xml")
    if files:
        sources = [p for p in sources if any(word.lower() in p.name.lower() for word in files)]
    if not sources:
        raise no_rows(path, "node set (*.xml)")
    for source in sources:
        spec = source.name.split(".NodeSet")[0].split(".Nodeset")[0].split(".nodeset")[0].rpartition("Opc.Ua.")[2]
        for node in read_xml(source):
            kind = tag(node)
            if not kind.startswith("UA"):
                continue
            told = child(node, "Description")
            yield {
                "id": f"{spec}/{node.get('NodeId')}",
                "name": node.get("BrowseName", "").rpartition(":")[2],
                "kind": kind[2:],
                "spec": spec,
                "wording": plain(told.text or "") if told is not None else "",
            }
