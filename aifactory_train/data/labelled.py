"""Rows that a head learns from: a text and its label or labels.

``label`` (or ``labels``) beside ``text``, or a question and the label as its answer, so that rows which a model was
fine-tuned on to write labels serve a head as they are. What a head reads of a conversation is what was said before the
last answer, without system turns, turns divided by a blank line.
"""

from __future__ import annotations

import json
from typing import Any

from aifactory_train.data.cells import RawRow, RowError, Unused, blank, column_error, kind_of, parse_json, unseen
from aifactory_train.data.questions import asked

#: Columns of a text that has its label beside it, most specific first.
TEXTS = ("text", "prompt", "question", "instruction", "sentence")
LABELS = ("label", "labels")


def beside(row: RawRow, several: bool) -> dict[str, Any] | None:
    """The canonical row of a text with its label in a column of its own; None where there is no such column.

    Raises :class:`RowError`.
    """
    column = next((name for name in (LABELS[::-1] if several else LABELS) if name in row.cells), None)
    text = next((name for name in TEXTS if name in row.cells), None)
    if column is None or text is None:
        return None
    value = row.get(text)
    if not isinstance(value, str):
        raise column_error(text, row.cells)
    return labelled(value, values(row.get(column), column, several), f"'{text}'")


def text_alone(raw: Any, columns: dict[str, str]) -> str:
    """What a head reads of a row whose label nobody knows yet. Raises :class:`RowError`."""
    if not isinstance(raw, dict):
        raise RowError(f"a row is an object of named columns, this is {kind_of(raw)}")
    row = RawRow(raw, columns, Unused())
    name = next((name for name in TEXTS if name in row.cells), None)
    if name is None:
        raise column_error("text", row.cells)
    value = row.cells[name]
    if not isinstance(value, str):
        raise column_error(name, row.cells)
    if name in ("prompt", "question", "instruction"):  # with what belongs to it: context, input, earlier turns
        return labelled("\n\n".join(_said(asked(row, name))), [], f"'{name}'")["text"]
    return labelled(value, [], f"'{name}'")["text"]


def answered(row: RawRow, question: str, answer: str, several: bool) -> dict[str, Any]:
    """The canonical row of a question whose answer is the label, both in columns. Raises :class:`RowError`."""
    found = values(row.get(answer), answer, several)
    return of_turns(row, asked(row, question), found, answer, several)


def of_conversation(row: RawRow, messages: list[dict[str, Any]], several: bool) -> dict[str, Any]:
    """The canonical row of a conversation whose last answer is the label. Raises :class:`RowError`."""
    if messages[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's: a head takes the last answer for the label")
    return of_turns(row, messages[:-1], values(messages[-1]["content"], "messages", several), "messages", several)


def of_turns(row: RawRow, turns: list[dict[str, Any]], labels: list[str], column: str, several: bool) -> dict[str, Any]:
    beside_it = next((name for name in LABELS if not blank(row.cells.get(name))), None)
    if beside_it is not None and values(row.cells[beside_it], beside_it, several) != labels:
        raise RowError(
            f"'{column}' and '{beside_it}' say different labels",
            f"name the one that is meant: data.train.0.columns={{{column}: label}}, or take the other one away",
        )
    if any(m["role"] == "system" for m in turns):
        row.unused.remarks["a system turn is no part of what a head reads"] += 1
    return labelled("\n\n".join(_said(turns)), labels, "the question")


def _said(turns: list[dict[str, Any]]) -> list[str]:
    """What a head reads of turns."""
    return [m["content"] for m in turns if m["role"] != "system" and m["content"].strip()]


def labelled(text: str, labels: list[str], what: str) -> dict[str, Any]:
    """The canonical row. Raises :class:`RowError` for a text that says nothing."""
    if unseen(text):
        raise RowError(f"{what} is empty: there is nothing to classify")
    return {"text": text, "labels": labels}


def values(value: Any, column: str, several: bool) -> list[str]:
    """The labels in a cell, as text, each once. Raises :class:`RowError` for what is none, and where there must be one
    and is not.
    """
    if several and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except json.JSONDecodeError:
            raise RowError(f"'{column}' begins like a list and is not valid JSON") from None
    listed = value if isinstance(value, list) else [] if blank(value) else [value]
    found = list(dict.fromkeys(_one(item, column) for item in listed))
    if several or len(found) == 1:
        return found
    if not found:
        raise RowError(f"'{column}' is empty: the row has no label", "give it one, or leave the row out")
    raise RowError(
        f"'{column}' holds {len(found)} labels", "one label a row, or --set methods.head.kind=multi_label for several"
    )


def _one(value: Any, column: str) -> str:
    """Text, a whole number, true or false as a label."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # pandas writes 1.0 where a column has gaps
        return str(int(value))
    if isinstance(value, float):
        raise RowError(f"'{column}' is {value}: a head tells labels apart, it does not predict numbers")
    raise RowError(f"'{column}' holds {kind_of(value)}, no label", "labels are text, whole numbers, or a list of them")
