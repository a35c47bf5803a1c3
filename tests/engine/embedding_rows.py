"""Rows that embeddings learn from, and recipes on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers


def matched_rows(count: int, *, start: int = 0, negatives: bool = True) -> list[dict[str, Any]]:
    """Queries whose positive says the same in other words; every third row has one or two negatives."""
    rows = []
    for i in range(start, start + count):
        said = helpers.row_text(i)
        row: dict[str, Any] = {"query": said, "positive": f"This is what was said: {said} {'so ' * (i % 4)}"}
        if negatives and i % 3 == 0:
            others = [f"Another thing: {helpers.row_text(i + 7 + k)}" for k in range(1 + i % 2)]
            row["negative"] = others if len(others) > 1 else others[0]
        rows.append(row)
    return rows


def write_embedding(folder: Path, model: Path, *, rows: int = 48, held: int = 24, **settings: Any) -> Path:
    """A recipe with ``train.jsonl`` and ``eval.jsonl`` beside it."""
    off = {"eval.before": False, "record.pack": False, "checkpoint.at_end": False, "train.epochs": 20}
    path = helpers.write_recipe(folder, model, settings={**off, "methods.head.kind": "embedding", **settings})
    helpers.write_jsonl(folder / "train.jsonl", matched_rows(rows))
    helpers.write_jsonl(folder / "eval.jsonl", matched_rows(held, start=500))
    return path
