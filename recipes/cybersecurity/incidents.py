"""Incidents with AI systems (package ``genai-incidents``, JSON) to rows: title and description to severity.

Only entries with a CVE number are read: their text comes under the CVE terms of use. The data set also aggregates news
monitors whose titles were written by a language model from articles of unresolved ownership; its own notice says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.recipes.common import chat, no_rows, parted, plain, read_text

LABELS = ("Low", "Medium", "High", "Critical")
SYSTEM = "Severity: Low, Medium, High or Critical."


def rows(path: Path, *, part: str = "train", held_out: float = 0.1, max_words: int = 45) -> Iterator[dict[str, Any]]:
    """Rows "<title>. <description>" to one of :data:`LABELS`.

    Args:
        path: ``incidents.min.json``.
        part: ``train`` or ``held_out``; incidents of the same wording go to one of them.
        held_out: share that is held out.
        max_words: longer descriptions are cut at the end of a word.
    """
    for entry in parted(incidents(path, max_words), part, held_out):
        yield chat(entry, entry["id"], entry["wording"], entry["label"], SYSTEM)


def incidents(path: Path, max_words: int) -> Iterator[dict[str, Any]]:
    """``{"id", "wording", "label"}``. A severity outside the schema is a :class:`UserError` that names the incident."""
    found = json.loads(read_text(path)).get("incidents") or []
    if not found:
        raise no_rows(path, "incidents")
    for item in found:
        if not item.get("cve_ids") or not item.get("description"):
            continue
        if item["severity"] not in LABELS:
            raise UserError(
                f"the label '{item['severity']}' is not in the schema",
                where=f"{path}: incident {item['id']}",
                fix=f"labels: {', '.join(LABELS)}",
            )
        text = " ".join(plain(f"{item['title']}. {item['description']}").split()[: max_words + 12])
        yield {"id": item["id"], "wording": text, "label": item["severity"]}
