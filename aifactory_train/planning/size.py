"""How much there is to train on: from the prepared data, from the command line, or from what the recipe declares. It
says which.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.config.loading import cache_dir
from aifactory_train.planning.workload import documents_of_a_row, preference_of

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


@dataclass(frozen=True)
class Size:
    """Tokens and rows of one epoch, sources by their weight or share; ``None`` where nobody knows. ``source`` is a
    sentence for people.
    """

    tokens: float | None
    rows: float | None  # what ``train.batch_rows`` counts: documents, for pairs (methods.preference dpo, orpo) pairs
    document: float | None  # mean tokens of a document
    supervised: float | None  # share of the positions that carries loss
    source: str


def of_recipe(recipe: Recipe, tokens: float | None = None, *, data_overridden: bool = False) -> Size:
    """The size of one epoch. ``tokens``: the user's own figure, which wins; ``data_overridden``: another ``data.*`` was
    set on the command line, so an earlier preparation of the recipe says nothing."""
    kept = None if data_overridden else newest_report(recipe)
    prepared = kept[2] if kept else None
    if tokens is not None:
        if prepared is None or not prepared.tokens or not prepared.rows:
            return Size(tokens, None, None, None, "--tokens")
        rows = tokens * prepared.rows / prepared.tokens
        return Size(tokens, rows, prepared.document, prepared.supervised, "--tokens")
    if prepared:
        return prepared
    own = [source for source in recipe.data.train if source.share is None]
    if own and all(source.max_rows for source in own):
        rows = sum((source.max_rows or 0) * source.weight for source in own)
        length = documents_of_a_row(preference_of(recipe)) * recipe.data.sequence_length
        replayed = sum(source.share or 0.0 for source in recipe.data.train)
        rows /= 1 - replayed
        return Size(
            rows * length,
            rows,
            None,
            None,
            f"max_rows of the recipe ({rows:.0f}), each taken to fill {length} tokens: an upper bound; 'aifactory "
            f"prepare' counts them",
        )
    return Size(None, None, None, None, "unknown: run 'aifactory prepare', or give --tokens")


def newest_report(recipe: Recipe) -> tuple[str, dict[str, Any], Size] | None:
    """``(folder's name, report, size)`` of the newest preparation of this recipe in the cache."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.id)
    found: list[tuple[float, Path]] = [
        (path.stat().st_mtime, path)
        for path in (cache_dir() / "prepared").glob(f"{name}-*/prepared.json")
        if re.fullmatch(re.escape(name) + r"-[0-9a-f]{16}", path.parent.name)
    ]
    for _, path in sorted(found, reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))["report"]
            train = report["sets"]["train"]
            tokens, documents, supervised = train["tokens"], train["documents"], train["supervised"]
            if report.get("recipe") != recipe.id or not tokens or not documents:
                continue
            seen = _epoch(report.get("sources", []), float(tokens), float(documents), preference_of(recipe))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            continue  # written by another version: not this recipe's size
        text = f"{documents} documents, {tokens} tokens"
        if abs(seen.tokens - tokens) > 0.5:
            text += f"; by weights and shares of the sources {seen.tokens:.0f} tokens an epoch"
        size = Size(
            seen.tokens,
            seen.rows,
            seen.tokens / seen.documents,
            supervised / tokens,
            f"the prepared data {path.parent.name} in the cache ({text})",
        )
        return path.parent.name, report, size
    return None


@dataclass(frozen=True)
class _Epoch:
    tokens: float
    documents: float
    rows: float


def _epoch(sources: list[dict[str, Any]], tokens: float, documents: float, preference: str | None) -> _Epoch:
    """What an epoch sees of ``tokens`` and ``documents`` of training rows (the rule is that of
    :class:`~aifactory_train.data.store.TokenDataset`).

    The report counts each source before rows were held out or dropped; what is missing afterwards is taken from all
    sources alike, but not from replayed ones, of which nothing is held out.
    """
    per_row = documents_of_a_row(preference)
    own = [s for s in sources if s["role"] == "train" and s.get("share") is None]
    replayed = [s for s in sources if s["role"] == "train" and s.get("share") is not None and s["tokens"]]
    if not own:
        return _Epoch(tokens, documents, documents / per_row)

    def kept(key: str, left: float) -> float:
        """Share of the own sources that was left for training."""
        return (left - sum(s[key] for s in replayed)) / sum(s[key] for s in own)

    own_tokens = kept("tokens", tokens) * sum(s["weight"] * s["tokens"] for s in own)
    own_documents = kept("documents", documents) * sum(s["weight"] * s["documents"] for s in own)
    total = own_tokens / (1 - sum(s["share"] for s in replayed))
    again = sum(s["share"] * total * s["documents"] / s["tokens"] for s in replayed)
    return _Epoch(total, own_documents + again, own_documents / per_row + again)
