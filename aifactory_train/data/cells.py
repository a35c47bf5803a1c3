"""One raw row: its cells under the names that they have in this program, and which of them nobody read."""

from __future__ import annotations

import collections
import contextlib
import json
import json.scanner
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean

#: Columns, and keys of a turn, whose text is wrong without what they hold.
MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
#: Columns that every form reads.
_COMMON = frozenset({"id", "group", "language", "label"})
#: How a nested column, a number or a null is repaired.
FLAT = "write what is meant as text into a column of its own, or leave the row out"


class RowError(ValueError):
    """What is wrong with a row; the caller adds the file and the line."""

    def __init__(self, what: str, fix: str | None = None):
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass
class Unused:
    """What rows held and training does not use: columns and keys of turns by name, and remarks, each with the number of
    rows (turns). Nulls and empty values are not counted."""

    columns: collections.Counter = field(default_factory=collections.Counter)
    turn_keys: collections.Counter = field(default_factory=collections.Counter)
    remarks: collections.Counter = field(default_factory=collections.Counter)
    renamed: set[str] = field(default_factory=set)  # columns that the recipe names and a row has

    def update(self, other: Unused) -> None:
        """Add the counts of other rows."""
        self.columns.update(other.columns)
        self.turn_keys.update(other.turn_keys)
        self.remarks.update(other.remarks)
        self.renamed |= other.renamed

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For the report: the most frequent names first."""
        return {"columns": _most(self.columns), "turn_keys": _most(self.turn_keys)}


#: Names of columns and keys in a report; where rows are keyed by their content there would be as many as rows.
_MOST_NAMES = 100


def _most(counts: collections.Counter) -> dict[str, int]:
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(n for _, n in listed[_MOST_NAMES:])
    return {**dict(listed[:_MOST_NAMES]), **({f"({len(listed) - _MOST_NAMES} more names)": rest} if rest else {})}


def blank(value: Any) -> bool:
    """Whether a cell holds nothing: null, not a number (a gap of pandas), empty text, list or object, or an object of
    nulls.
    """
    if value is None or value == "" or value == [] or value == {}:
        return True
    if isinstance(value, float):
        return value != value
    if isinstance(value, str):
        return value.isspace() or value in ("[]", "{}", "null")
    if isinstance(value, dict):
        return all(blank(v) for v in value.values())
    return isinstance(value, list) and all(blank(v) for v in value)


#: What nobody sees: blanks, control characters, marks of width zero, letters without ink.
_UNSEEN = "".join(
    chr(c)
    for a, b in (
        *(
            (0, 32),
            (0x7F, 0xA0),
            (0xAD, 0xAD),
            (0x34F, 0x34F),
            (0x61C, 0x61C),
            (0x115F, 0x1160),
            (0x1680, 0x1680),
            (0x17B4, 0x17B5),
        ),
        *((0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800), (0x3000, 0x3000)),
        *((0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF9, 0xFFFB)),
    )
    for c in range(a, b + 1)
)


def unseen(text: str) -> bool:
    """Whether a text says nothing: it is empty, or none of its characters can be seen."""
    return not ("!" <= text[:1] <= "~" or text.strip(_UNSEEN))


def parse_json(text: str) -> Any:
    """``json.loads``, but an integer of more digits than Python converts (4,300) stays text, and NaN, with which pandas
    fills gaps, is null. Raises :class:`json.JSONDecodeError`, and :class:`RowError` for an object that says two things
    under one key, and for nesting without end."""
    try:
        try:
            return _quick.decode(text)
        except (json.JSONDecodeError, RowError):
            raise
        except ValueError:
            return _patient.decode(text)
    except RecursionError:
        raise RowError("JSON nested too deeply", "rows are objects with named columns") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. JSON takes the last of several values in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise RowError(
                    f"the key '{key[:80]}' stands more than once in one object, with different values",
                    "keep the value that is meant",
                )
    return found


def _integer(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


_quick = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_each_key_once)
_patient = json.JSONDecoder(parse_int=_integer, parse_constant=_constant, object_pairs_hook=_each_key_once)


def place_of_fault(text: str) -> int:
    """The line of the object that :func:`parse_json` refused; slow."""
    # its Python parts have no types
    patient: Any = json.JSONDecoder(parse_int=_integer, parse_constant=_constant, object_pairs_hook=_each_key_once)
    plain, begins = patient.parse_object, []

    def parse_object(begin: tuple[str, int], *how: Any) -> Any:
        begins.append(begin[1])
        found = plain(begin, *how)
        begins.pop()
        return found

    patient.parse_object = parse_object
    patient.scan_once = json.scanner.py_make_scanner(patient)  # type: ignore[attr-defined]
    with contextlib.suppress(RowError, RecursionError):
        patient.decode(text)
    return text.count("\n", 0, begins[-1]) + 1 if begins else 1


class RawRow:
    """One raw row under the names that its columns have in this program, and which of them were read."""

    def __init__(self, raw: dict[str, Any], columns: dict[str, str], unused: Unused):
        self.cells, self.unused = raw, unused
        self.names: dict[str, str] = {}  # under which name a renamed column stands in the file
        self.used: set[str] = set(_COMMON)
        self.lost: list[str] = []
        if columns:
            self._rename(raw, columns)

    def _rename(self, raw: dict[str, Any], columns: dict[str, str]) -> None:
        """A column that the recipe names wins over one that bears the name already, and the first of two that the
        recipe names.
        """
        self.cells = {}
        for column, name in columns.items():
            if column not in raw:
                continue
            self.unused.renamed.add(column)
            value = raw[column]
            if name in self.cells and (blank(value) or not blank(self.cells[name])):
                self.lost += [] if blank(value) else [column]
                continue
            self.cells[name], self.names[name] = value, column
        for column, value in raw.items():
            if column in columns:
                continue
            if column not in self.cells or (self.cells[column] is None and value is not None):
                self.cells[column] = value
                self.names.pop(column, None)
            elif not blank(value):
                self.lost.append(column)
        self.cells = {name: self.cells[name] for name in _in_order(raw, columns, self.cells)}
        answer = self.cells.get("completion")
        if "completion" in self.names and isinstance(answer, (int, float)) and not blank(answer):
            # The recipe says that this column is the answer: labels are often numbers.
            self.cells["completion"] = _number_as_text(answer)

    def get(self, name: str) -> Any:
        """The cell, which counts as read."""
        self.used.add(name)
        return self.cells.get(name)

    def count(self, fmt: str, ruled: Collection[str]) -> None:
        """Count what was not read, or refuse it. ``ruled``: columns (names in the file) that the split reads."""
        if self.lost:
            self.unused.columns.update(name[:80] for name in self.lost if name not in ruled)
        for name, value in self.cells.items():
            if name in self.used or blank(value):
                continue
            column = str(self.names.get(name, name))
            if name in MEDIA and fmt != "text" and not isinstance(value, (bool, int, float)):
                raise RowError(
                    f"the column '{column}' holds {kind_of(value)}: only text can be trained on",
                    "leave the row out; where its text is right without it, name the column otherwise: "
                    f"data.train.0.columns={{{column}: unused_{column}}}",
                )
            if column not in ruled:
                self.unused.columns[column[:80]] += 1


def _in_order(raw: dict[str, Any], columns: dict[str, str], cells: dict[str, Any]) -> list[str]:
    """Names in the order of the file."""
    return list(dict.fromkeys(name for c in raw if (name := columns.get(c, c)) in cells))


def _number_as_text(value: int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def yes_or_no(value: Any) -> bool | None:
    """True, false, 1, 0, 1.0, 0.0 or one of them as text; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
            value.strip().lower()
        )
    return None


def column_error(name: str, row: dict[str, Any]) -> RowError:
    if name in row:
        return RowError(
            f"'{name}' is {kind_of(row[name])}, not text", FLAT if isinstance(row[name], (dict, list)) else None
        )
    return RowError(
        f"the column '{name}' is missing{did_you_mean(name, map(str, row))} (found: "
        f"{', '.join(map(str, list(row)[:12]))})"
    )


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "empty (null)" if value is None else names.get(type(value), type(value).__name__)


def to_user_error(error: RowError, where: str) -> UserError:
    fix = error.fix or "write the row otherwise (docs/data.md shows every form that is read), or leave it out"
    return UserError(error.what, where=where, fix=fix)
