"""How much there is to train on: from the prepared data, from the command line, or from what the recipe declares. It says which."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory_train.config import cache_dir

if TYPE_CHECKING:
    from aifactory_train.config import Recipe


@dataclass(frozen=True)
class Size:
    """Tokens and documents of one epoch; ``None`` where nobody knows. ``source`` is a sentence for people."""

    tokens: float | None
    rows: float | None
    document: float | None  # mean tokens of a document
    supervised: float | None  # share of the positions that carries loss
    source: str


def of_recipe(recipe: Recipe, tokens: float | None = None, *, data_overridden: bool = False) -> Size:
    """The size of one epoch. ``tokens``: the user's own figure, which wins; ``data_overridden``: another ``data.*`` was set on the
    command line, so an earlier preparation of the recipe says nothing."""
    prepared = None if data_overridden else _prepared(recipe)
    if tokens is not None:
        document = prepared.document if prepared else None
        rows = tokens / document if document else None
        return Size(tokens, rows, document, prepared.supervised if prepared else None, "--tokens")
    if prepared:
        return prepared
    declared = [source.max_rows for source in recipe.data.train]
    if declared and all(declared):
        rows = float(sum((source.max_rows or 0) * source.weight for source in recipe.data.train))
        length = recipe.data.sequence_length
        return Size(
            rows * length,
            rows,
            None,
            None,
            f"max_rows of the recipe ({rows:.0f}), each taken to fill {length} tokens: an upper bound; 'aifactory prepare' counts them",
        )
    return Size(None, None, None, None, "unknown: run 'aifactory prepare', or give --tokens")


def _prepared(recipe: Recipe) -> Size | None:
    """The newest preparation of this recipe in the cache."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.id)
    found: list[tuple[float, Path]] = []
    for path in (cache_dir() / "prepared").glob(f"{name}-*/prepared.json"):
        if re.fullmatch(re.escape(name) + r"-[0-9a-f]{16}", path.parent.name):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))["report"]
            train = report["sets"]["train"]
            tokens, documents, supervised = train["tokens"], train["documents"], train["supervised"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # written by another version: not this recipe's size
        if report.get("recipe") != recipe.id or not tokens or not documents:
            continue
        return Size(
            float(tokens),
            float(documents),
            tokens / documents,
            supervised / tokens,
            f"the prepared data {path.parent.name} in the cache ({documents} documents, {tokens} tokens)",
        )
    return None
