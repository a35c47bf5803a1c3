"""Held-out rows by language, length and label, so that a good mean cannot hide a bad part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Values of one dimension that are shown on their own; rarer ones are pooled. Fewer rows than this are not cut by
#: length.
MOST_VALUES, LEAST_ROWS = 12, 6
OTHER = "other"


def by_length(lengths: Sequence[int]) -> list[str] | None:
    """A third of the rows each: short, middle, long, with the tokens that bound them. None for few rows or equal
    lengths.
    """
    tokens = np.asarray(lengths)
    if len(tokens) < LEAST_ROWS or tokens.min() == tokens.max():
        return None
    low, high = (int(x) for x in np.quantile(tokens, [1 / 3, 2 / 3], method="lower"))
    names = (f"to {low} tokens", f"to {high} tokens", f"above {high} tokens")
    return [names[int(n > low) + int(n > high)] for n in tokens]


def tags(rows: Sequence[dict[str, Any]], lengths: Sequence[int], labels: Sequence[str | None]) -> dict[str, list[str]]:
    """``{dimension: value of each row}`` for the dimensions in which the rows differ.

    rows: canonical rows (``language`` and ``label`` where the data gives them); labels: what stands in for a missing
    ``label`` (the expected answer of a classification), or None.
    """
    found: dict[str, list[str | None] | list[str] | None] = {
        "language": [row.get("language") for row in rows],
        "length": by_length(lengths),
        "label": [row.get("label") or label for row, label in zip(rows, labels, strict=True)],
    }
    out: dict[str, list[str]] = {}
    for name, values in found.items():
        if values is None or all(v is None for v in values):
            continue
        shown = ["not given" if v is None else str(v) for v in values]
        counts = Counter(shown)
        if len(counts) < 2 or (name == "label" and len(counts) > len(rows) / 2):
            continue  # nothing to tell apart, or every row is its own label
        common = {value for value, _ in counts.most_common(MOST_VALUES)}
        out[name] = [value if value in common else OTHER for value in shown]
    return out


def groups(values: Sequence[str]) -> dict[str, np.ndarray]:
    """``{value: rows}``, the largest first."""
    array = np.asarray(values)
    return {value: np.flatnonzero(array == value) for value, _ in Counter(values).most_common()}
