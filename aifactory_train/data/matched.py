"""Rows that an embedding learns from: a query, the text that belongs to it, and texts that do not.

The canonical row is ``{"text": query, "positive": text, "negatives": [text, ...]}``.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from aifactory_train.data.cells import RawRow, RowError, Unused, blank, column_error, kind_of, parse_json, unseen

#: Columns of each part under the names that are in use, most specific first.
QUERIES = ("query", "anchor", "question", "prompt", "text", "sentence")
POSITIVES = ("positive", "positives", "pos", "passage", "document", "answer")
NEGATIVES = re.compile(r"negatives?|neg|negative_\d+|negative\d+")
#: Columns that grade how alike two texts are.
SCORES = ("score", "similarity", "similarity_score")
#: What one text without a match is called.
_TEXTS = ("text", *QUERIES, *POSITIVES)


def matched(row: RawRow) -> dict[str, Any]:
    """The canonical row. Raises :class:`RowError` for one without a positive, and for one whose texts contradict."""
    cells = row.cells
    graded = next((name for name in SCORES if not blank(cells.get(name))), None)
    if graded is None and _is_verdict(cells.get("label")):
        graded = "label"
    if graded is not None:
        raise RowError(
            f"'{graded}' grades how alike two texts are, and an embedding learns from texts that belong together",
            "keep the rows that do as query and positive, and leave the column out",
        )
    query = next((name for name in QUERIES if name in cells), None)
    positive = next((name for name in POSITIVES if name in cells and name != query), None)
    if query is None or positive is None:
        raise RowError(
            f"an embedding learns from pairs, and the column '{'query' if query is None else 'positive'}' is missing "
            f"(found: {', '.join(map(str, list(cells)[:12]))})",
            "rename with data.train.0.columns={mine: query, other: positive}",
        )
    asked, found = _text(row.get(query), query, cells), _texts(row.get(positive), positive)
    if not found:
        raise RowError(f"'{positive}' is empty: an embedding pair without a positive", "give it one, or leave it out")
    if len(found) > 1:
        raise RowError(f"'{positive}' holds {len(found)} texts", "a row has one positive: write a row for each")
    others = [text for name in cells if NEGATIVES.fullmatch(str(name)) for text in _texts(row.get(name), str(name))]
    for what, text in (("the query", asked), ("a negative", found[0])):
        if text in (found if what == "the query" else others):
            raise RowError(f"{what} is the same text as '{positive}'", "correct the row, or leave it out")
    return {"text": asked, "positive": found[0], "negatives": list(dict.fromkeys(others))}


def texts_in(row: dict[str, Any]) -> list[str]:
    """The texts of a canonical row in the order of its documents: query, positive, negatives."""
    return [row["text"], row["positive"], *row["negatives"]]


def text_alone(raw: Any, columns: dict[str, str]) -> str:
    """The text of a row that is to be embedded. Raises :class:`RowError`."""
    if not isinstance(raw, dict):
        raise RowError(f"a row is an object of named columns, this is {kind_of(raw)}")
    row = RawRow(raw, columns, Unused())
    name = next((name for name in _TEXTS if name in row.cells), None)
    if name is None:
        raise column_error("text", row.cells)
    return _text(row.cells[name], name, row.cells)


def _is_verdict(value: Any) -> bool:
    """Whether a ``label`` says that two texts belong together or do not (a name in words is for the slices)."""
    return not blank(value) and (isinstance(value, (bool, int, float)) or str(value).strip().lower() in _VERDICTS)


_VERDICTS = frozenset({"0", "1", "true", "false", "0.0", "1.0"})


def _text(value: Any, name: str, cells: dict[str, Any]) -> str:
    if not isinstance(value, str):
        raise column_error(name, cells)
    if unseen(value):
        raise RowError(f"'{name}' is empty: there is nothing to embed")
    return value


def _texts(value: Any, name: str) -> list[str]:
    """The texts of a cell: text, a list, or a list as JSON (CSV)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(json.JSONDecodeError):  # a text may begin so
            read = parse_json(value)
            value = read if isinstance(read, list) and all(isinstance(item, str) for item in read) else value
    listed = value if isinstance(value, list) else [] if blank(value) else [value]
    for item in listed:
        if not isinstance(item, str):
            raise RowError(f"'{name}' holds {kind_of(item)}, not text")
        if unseen(item):
            raise RowError(f"'{name}' holds an empty text", "leave it out")
    return listed
