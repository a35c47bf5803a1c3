"""A chart of accounts (XML of a Tryton module) to rows: name of an account to its position in the financial
statement.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import chat, parted, plain, read_xml, some

SYSTEM = "Position im Jahresabschluss."


def rows(path: Path, *, part: str = "train", held_out: float = 0.2) -> Iterator[dict[str, Any]]:
    """Rows "<number> <name>" to the position, e.g. "Immaterielle Vermögensgegenstände".

    Args:
        path: the module's ``account_*.xml``.
        part: ``train`` or ``held_out``.
        held_out: share of the account names that is held out.
    """
    for entry in parted(some(accounts(path), path, "account with a type"), part, held_out):
        yield chat(entry, entry["id"], entry["wording"], entry["position"], SYSTEM)


def accounts(path: Path) -> Iterator[dict[str, Any]]:
    """``{"id", "wording", "position"}`` of every account with a type; the group is the name without the number."""
    records = list(read_xml(path).iter("record"))
    types = {
        r.get("id"): plain(_field(r, "name").text or "")
        for r in records
        if r.get("model") == "account.account.type.template" and _field(r, "name") is not None
    }
    for record in records:
        if record.get("model") != "account.account.template":
            continue
        name, kind, code = _field(record, "name"), _field(record, "type"), _field(record, "code")
        position = types.get(kind.get("ref")) if kind is not None else None
        if name is None or not plain(name.text or "") or not position:
            continue
        number = plain(code.text or "") if code is not None else ""
        yield {
            "id": str(record.get("id")),
            "wording": f"{number} {plain(name.text or '')}".strip(),
            "position": position,
        }


def _field(record: ElementTree.Element, name: str) -> Any:
    return next((f for f in record.findall("field") if f.get("name") == name), None)
