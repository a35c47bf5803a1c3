"""OPC UA companion specifications (XML node sets, npm package ``node-opcua-nodesets``) to rows: node to description."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, child, no_rows, plain, read_xml, tag


@asked(
    "OPC UA.",
    {
        "node-to-description": ("Describe: {name} ({kind}, {spec})", "{wording}"),
        "description-to-node": ("Which node? {wording}", "{name}"),
    },
    what="node with a description",
    words=(5, 50),
)
def rows(path: Path, *, files: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Nodes of the package's ``nodesets`` folder: ``{"id", "name", "kind", "spec", "wording"}``; the wording of some is
    empty.

    Args:
        files: parts of file names that are read, e.g. ``[Robotics, MachineTool]``; default every companion
        specification
            (the base model of OPC UA itself is left out).
    """
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
            description = child(node, "Description")
            yield {
                "id": f"{spec}/{node.get('NodeId')}",
                "name": node.get("BrowseName", "").rpartition(":")[2],
                "kind": kind[2:],
                "spec": spec,
                "wording": plain(description.text or "") if description is not None else "",
            }
