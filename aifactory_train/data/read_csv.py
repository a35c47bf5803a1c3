"""CSV and TSV, row by row, with the line that each row begins in."""

from __future__ import annotations

import codecs
import collections
import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.data import documents
from aifactory_train.data.blocks import BLOCK_ROWS, Block
from aifactory_train.data.read_json import UTF16, not_utf8, open_plain
from aifactory_train.private import vault


def separator(header: str) -> str:
    """What separates the columns that the first line of a CSV file names: the comma, or in its place the semicolon that
    spreadsheets write where a comma divides decimals, a tab or a bar. Quoted names do not count."""
    plain = re.sub(r'"[^"]*"?', "", header)
    return max(",;\t|", key=plain.count)  # the comma where none is there


def _text_lines(path: Path) -> Iterator[str]:
    with open_plain(path) as file:
        for number, raw in enumerate(file, 1):
            if b"\0" in raw and not raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError("a NUL byte: binary data, not text", where=f"{path}:{number}", fix=f"perhaps {UTF16}")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}:{number}", raw, error) from None


#: What spreadsheets write of the cells around a table; counted.
EMPTY_ROWS, EMPTY_COLUMNS = "empty rows of a table: left out", "empty columns without a name: left out"


def header_of(cells: list[str] | None, where: str) -> list[str]:
    """The names of the columns, each given once; a column without a name, as spreadsheets write them beside a table,
    has to be empty."""
    header = [name.strip() for name in cells or []]
    if not any(header):
        raise UserError(
            "the first line must name every column",
            where=where,
            fix="name them there; take out empty lines before it and a line 'sep=;'",
        )
    twice = next((name for name, n in collections.Counter(filter(None, header)).items() if n > 1), None)
    if twice is not None:
        raise UserError(
            f"the column name '{twice}' is given twice", where=where, fix="give each column a name of its own"
        )
    return header


def _of_width(cells: list[str], columns: int, where: str) -> list[str]:
    """A row that goes on behind the last column in empty cells, without them. Raises :class:`UserError` for others."""
    if len(cells) < columns or any(map(str.strip, cells[columns:])):
        raise UserError(
            f"{len(cells)} cells, but the header names {columns} columns",
            where=where,
            fix="quote cells that hold the separator",
        )
    return cells[:columns]


def check_unnamed(header: list[str], cells: list[str], where: str) -> None:
    for number, (name, cell) in enumerate(zip(header, cells, strict=True), 1):
        if not name and cell.strip():
            raise UserError(
                f"column {number} has no name in the first line, and holds '{cell.strip()[:40]}'",
                where=where,
                fix="name it there, or empty it; take out a line 'sep=;'",
            )


def csv_rows(path: Path, notes: documents.Notes) -> Iterator[Block]:
    """The rows of a CSV or TSV file."""
    csv.field_size_limit(1 << 30)
    lines = _text_lines(path)
    first = next(lines, "")
    tabs = ".tsv" in [s.lower() for s in vault.plain_name(path).suffixes]
    reader = csv.reader(itertools.chain([first], lines), delimiter="\t" if tabs else separator(first), strict=True)
    rows: list[Any] = []
    numbers: list[int] = []
    try:
        header = header_of(next(reader, None), f"{path}:1")
        unnamed = header.count("")
        notes.beside.update({EMPTY_COLUMNS: unnamed} if unnamed else {})
        before = reader.line_num
        for cells in reader:
            number, before = before + 1, reader.line_num
            if not cells:
                continue
            cells[0] = cells[0].removeprefix("\ufeff")  # the file was joined from several
            if [cell.strip() for cell in cells] == header:
                notes.repeated_headers += 1
                continue
            if not any(cells) or not any(map(str.strip, cells)):
                notes.beside[EMPTY_ROWS] += 1
                continue
            if len(cells) != len(header):
                cells = _of_width(cells, len(header), f"{path}:{number}")
            row = dict(zip(header, cells, strict=True))
            if unnamed:
                check_unnamed(header, cells, f"{path}:{number}")
                del row[""]
            rows.append(row)
            numbers.append(number)
            if len(rows) == BLOCK_ROWS:
                yield Block(str(path), numbers[0], rows=rows, numbers=numbers)
                rows, numbers = [], []
    except csv.Error as error:
        old = "new-line character" in str(error)  # CR alone, as in files of old Macintoshes
        raise UserError(
            "lines end with CR alone" if old else f"not valid CSV: {error}",
            where=f"{path}:{reader.line_num}",
            fix="tr '\\r' '\\n' < OLD > NEW"
            if old
            else "close every quotation mark; one inside a cell is written twice",
        ) from None
    if rows:
        yield Block(str(path), numbers[0], rows=rows, numbers=numbers)
