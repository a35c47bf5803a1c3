"""Rows that heads learn from, and recipes on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers

COLOURS = ["black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow"]


def labelled_rows(count: int, *, start: int = 0, several: bool = False) -> list[dict[str, Any]]:
    """Texts of unequal lengths whose label is the colour of their first thing (``several``: all their colours)."""
    rows = []
    for i in range(start, start + count):
        said = [helpers.row_text(i + 1000 * k) for k in range(1 + i % 3)]
        colours = [text.rstrip(".").rpartition(" ")[2] for text in said]
        rows.append({"text": " ".join(said), "label": sorted(set(colours)) if several else colours[0]})
    return rows


def write_head(folder: Path, model: Path, kind: str, *, rows: int = 48, held: int = 16, **settings: Any) -> Path:
    """A recipe with ``train.jsonl`` and ``eval.jsonl`` beside it."""
    several = kind == "multi_label"
    off = {"eval.before": False, "record.pack": False, "checkpoint.at_end": False, "train.epochs": 20}
    path = helpers.write_recipe(folder, model, settings={**off, "methods.head.kind": kind, **settings})
    helpers.write_jsonl(folder / "train.jsonl", labelled_rows(rows, several=several))
    helpers.write_jsonl(folder / "eval.jsonl", labelled_rows(held, start=500, several=several))
    return path


def figures(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval.json").read_text())
