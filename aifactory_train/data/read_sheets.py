"""Tables of office programs: workbooks (.xlsx, .ods), SQLite, and mailboxes (.mbox), a row at a time.

Cells become text as in CSV, dates as ``2026-11-30``, so that the same table is the same rows in whatever it was saved.
Of a workbook with several filled sheets all are read if they have the same columns; of a database its only table, or
the view ``rows``. openpyxl and odfpy come with the extra ``office``.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import email
import email.policy
import io
import mailbox
import sqlite3
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.data.blocks import Block, in_blocks
from aifactory_train.data.documents import Notes, Unusable
from aifactory_train.data.read_csv import EMPTY_COLUMNS, EMPTY_ROWS, check_unnamed, header_of
from aifactory_train.data.read_office import EXTRA, archive, mail_text, refuse
from aifactory_train.private import vault

SUFFIXES = (".xlsx", ".xlsm", ".ods", ".sqlite", ".sqlite3", ".db", ".mbox")
#: How a SQLite file begins (https://www.sqlite.org/fileformat.html).
SQLITE = b"SQLite format 3\0"
ERRORS, BINARY = "cells with an error of the spreadsheet: empty", "cells of binary data: empty"

#: A sheet: its name, and its rows of cells.
Sheet = tuple[str, Iterable[list[Any]]]


def is_sheet(path: Path) -> bool:
    """Whether a file of a folder is one of these; a ``.db`` has to be SQLite's."""
    suffix = vault.plain_name(path).suffix.lower()
    if suffix == ".db":
        try:
            with open(path, "rb") as file:
                return file.read(len(SQLITE)) == SQLITE
        except OSError:
            return False
    return suffix in SUFFIXES


def rows_of(path: Path, kind: str, notes: Notes) -> Iterator[Block]:
    """The rows of a workbook, database or mailbox. Raises :class:`UserError` with sheet and row, table or message for
    what cannot be read."""
    try:
        if kind in (".sqlite", ".sqlite3", ".db"):
            yield from _database(path, notes)
        elif kind == ".mbox":
            yield from in_blocks(_mails(path, notes), f"{path}:mail")
        else:
            with vault.open_source(path) as file:
                raw = file.read()
            archive(raw, path, "OpenDocument" if kind == ".ods" else "Excel").close()
            read: Callable[[bytes, Path, Notes], list[Sheet]] = _opendocument if kind == ".ods" else _excel
            yield from _sheets(read(raw, path, notes), path, notes)
    except Unusable as unusable:
        raise refuse(unusable, path) from None


def _sheets(sheets: list[Sheet], path: Path, notes: Notes) -> Iterator[Block]:
    """The rows of all filled sheets, which have to have the same columns."""
    filled: dict[str, tuple[list[str], list[dict[str, str]], list[int]]] = {}
    for name, cells in sheets:
        found = _table(name, cells, path, notes)
        if found is not None:
            filled[name] = found
    if not filled:
        raise UserError("the workbook holds no rows", where=str(path), fix="the first line names the columns")
    if len({tuple(header) for header, _, _ in filled.values()}) > 1:
        shown = "; ".join(f"'{name}' has {', '.join(header)[:80]}" for name, (header, _, _) in filled.items())
        fix = "save the sheet of the rows as a file of its own"
        raise UserError(f"its sheets have different columns: {shown}; which are the rows?", where=str(path), fix=fix)
    for name, (_, rows, numbers) in filled.items():
        if rows:
            yield Block(f"{path}:{name}", numbers[0], rows=rows, numbers=numbers)


def _table(
    name: str, cells: Iterable[list[Any]], path: Path, notes: Notes
) -> tuple[list[str], list[dict[str, str]], list[int]] | None:
    """Header, rows and their numbers; None for a sheet without a filled cell."""
    header: list[str] = []
    rows: list[dict[str, str]] = []
    numbers: list[int] = []
    empty = 0
    for number, values in enumerate(cells, 1):
        texts, where = [_text(value, notes) for value in values], f"{path}:{name}:{number}"
        if not any(text.strip() for text in texts):
            empty += 1
            continue
        if not header:
            while texts and not texts[-1].strip():
                texts.pop()
            header = header_of(texts, where)
            empty = 0  # lines above the table
            continue
        texts += [""] * (len(header) - len(texts))
        if any(text.strip() for text in texts[len(header) :]):
            fix = "name every column in its first line, and keep notes out of the table"
            raise UserError("a cell beside the named columns", where=where, fix=fix)
        notes.beside.update({EMPTY_ROWS: empty} if empty else {})
        empty = 0  # what follows the last row is no row
        row = dict(zip(header, texts, strict=False))
        if "" in header:
            check_unnamed(header, texts[: len(header)], where)
            del row[""]
        rows.append(row)
        numbers.append(number)
    if not header:
        return None
    notes.beside.update({EMPTY_COLUMNS: header.count("")} if "" in header else {})
    return [column for column in header if column], rows, numbers


def _text(value: Any, notes: Notes) -> str:
    """A cell as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime):
        midnight = value.time() == datetime.time(0)
        return value.date().isoformat() if midnight else value.isoformat(" ", "seconds")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)


def _excel(raw: bytes, path: Path, notes: Notes) -> list[Sheet]:
    try:
        import openpyxl
    except ImportError:
        raise Unusable("Excel files need the package 'openpyxl'", EXTRA) from None
    import warnings

    def sheets(values: bool) -> list[tuple[str, list[list[Any]]]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions that have nothing to do with the cells
            book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=values)
            kept = notes if values else None
            return [(s.title, [[_excel_cell(c, kept) for c in row] for row in s.iter_rows()]) for s in book.worksheets]

    try:
        found = sheets(True)
        formulas = sheets(False) if _has_formulas(raw) else []
    except Exception as error:  # openpyxl raises KeyError, ValueError, ParseError and more for damaged files
        raise Unusable("no Excel file, or a damaged one", type(error).__name__) from None
    for (name, values), (_, written) in zip(found, formulas, strict=False):
        for number, (cells, texts) in enumerate(zip(values, written, strict=False), 1):
            _check_results(cells, texts, f"{path}:{name}:{number}")
    return list(found)


def _check_results(values: list[Any], written: list[Any], where: str) -> None:
    """Refuse a formula whose result was not stored: programs that write workbooks leave the results to Excel."""
    for value, text in zip(values, written, strict=False):
        if value is None and isinstance(text, str) and text.startswith("="):
            fix = "open it in the spreadsheet program and save it: the results are stored then"
            raise UserError(f"a formula without its result: {text[:40]}", where=where, fix=fix)


def _excel_cell(cell: Any, notes: Notes | None) -> Any:
    if getattr(cell, "data_type", None) == "e":  # #N/A, #REF!
        if notes is not None:
            notes.beside[ERRORS] += 1
        return ""
    return cell.value


def _has_formulas(raw: bytes) -> bool:
    with zipfile.ZipFile(io.BytesIO(raw)) as book:
        names = [name for name in book.namelist() if name.startswith("xl/worksheets/") and name.endswith(".xml")]
        return any(b"<f>" in (text := book.read(name)) or b"<f " in text for name in names)


#: A sheet of OpenDocument repeats its empty cells and rows to the end of the grid.
_REPEATED = 1000


def _opendocument(raw: bytes, path: Path, notes: Notes) -> list[Sheet]:
    try:
        from odf import opendocument, table
    except ImportError:
        raise Unusable("OpenDocument files need the package 'odfpy'", EXTRA) from None
    try:
        document = opendocument.load(io.BytesIO(raw))
        sheets: list[Sheet] = []
        for sheet in document.getElementsByType(table.Table):
            rows: list[list[Any]] = []
            for row in sheet.getElementsByType(table.TableRow):
                cells = [
                    value
                    for cell in row.childNodes
                    if cell.qname[1] in ("table-cell", "covered-table-cell")
                    for value in _odf_cells(cell)
                ]
                times = int(row.getAttribute("numberrowsrepeated") or 1)
                rows += [cells] * (times if any(cells) else min(times, _REPEATED))
            sheets.append((str(sheet.getAttribute("name")), rows))
    except Exception as error:  # odfpy raises whatever a damaged file brings
        raise Unusable("no OpenDocument file, or a damaged one", type(error).__name__) from None
    return sheets


def _odf_cells(cell: Any) -> list[str]:
    """The cell's text, as often as it is repeated; numbers as they are and not as they are shown."""
    from odf import teletype, text

    kind = cell.getAttribute("valuetype")
    if kind in ("float", "currency", "percentage"):
        number = float(cell.getAttribute("value"))
        shown = str(int(number)) if number.is_integer() and abs(number) < 1e15 else str(number)
    elif kind == "date":
        shown = str(cell.getAttribute("datevalue")).replace("T", " ").removesuffix(" 00:00:00")
    elif kind == "boolean":
        shown = str(cell.getAttribute("booleanvalue"))
    else:
        shown = "\n".join(teletype.extractText(p) for p in cell.getElementsByType(text.P))
    times = int(cell.getAttribute("numbercolumnsrepeated") or 1)
    return [shown] * (times if shown else min(times, _REPEATED))


# ---- SQLite


def _database(path: Path, notes: Notes) -> Iterator[Block]:
    if vault.is_encrypted(path):
        fix = "export the table as CSV, and encrypt that"
        raise UserError("an encrypted database is not read", where=str(path), fix=fix)
    with open(path, "rb") as file:
        head = file.read(100)
    if not head.startswith(SQLITE) or len(head) < 100:
        raise UserError("no SQLite database", where=str(path), fix="use .csv or .jsonl for rows of other programs")
    page = int.from_bytes(head[16:18], "big")
    if head[24:28] == head[92:96] and path.stat().st_size < (page if page != 1 else 65536) * int.from_bytes(
        head[28:32], "big"
    ):  # the number of pages stands in the header; without the last ones SQLite reads what is there
        raise UserError("the database is cut off", where=str(path), fix="copy it again, whole")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            name = _table_name(base, path)
            quoted = '"' + name.replace('"', '""') + '"'
            cursor = base.execute(f"SELECT * FROM {quoted}")
            columns = header_of([str(c[0]) for c in cursor.description], f"{path}:{name}")
            yield from in_blocks(_records(cursor, columns, notes), f"{path}:{name}")
    except sqlite3.Error as error:
        fix = "sqlite3 FILE 'PRAGMA integrity_check' tells more; text has to be UTF-8"
        raise UserError(f"the database cannot be read: {error}", where=str(path), fix=fix) from None


def _table_name(base: sqlite3.Connection, path: Path) -> str:
    listed = base.execute(
        "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'"
    )
    kinds = {str(name): str(kind) for name, kind in listed}
    if "rows" in kinds:
        return "rows"
    tables = [name for name, kind in kinds.items() if kind == "table"] or list(kinds)
    if len(tables) == 1:
        return tables[0]
    if not tables:
        raise UserError("the database holds no table", where=str(path), fix="give one that does")
    shown = ", ".join(tables[:8]) + (f" and {len(tables) - 8} more" if len(tables) > 8 else "")
    fix = f"say it by a view: sqlite3 {path.name} 'CREATE VIEW rows AS SELECT … FROM {tables[0]}'"
    raise UserError(f"the database holds several tables: {shown}; which are the rows?", where=str(path), fix=fix)


def _records(cursor: sqlite3.Cursor, columns: list[str], notes: Notes) -> Iterator[dict[str, Any]]:
    for values in cursor:
        if any(isinstance(value, bytes) for value in values):
            notes.beside[BINARY] += sum(isinstance(value, bytes) for value in values)
            values = tuple(None if isinstance(value, bytes) else value for value in values)
        yield dict(zip(columns, values, strict=True))


# ---- mailboxes


def _mails(path: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    """A row a mail, ``{"text", "group"}``; the group is its thread, which is never divided. Mails that cannot be read
    are left out, named and counted, or refused (``data.unreadable``)."""
    if vault.is_encrypted(path):
        fix = "save the mails as .eml, and encrypt those"
        raise UserError("an encrypted mailbox is not read", where=str(path), fix=fix)
    with open(path, "rb") as file:
        if not file.read(64).lstrip().startswith(b"From "):
            raise UserError(
                "no mailbox", where=str(path), fix="an .mbox file begins with 'From '; a single mail is .eml"
            )
    box = mailbox.mbox(path, factory=None, create=False)
    read = 0
    reasons: collections.Counter[str] = collections.Counter()
    try:
        for number, key in enumerate(box.iterkeys(), 1):
            message = email.message_from_bytes(box.get_bytes(key), policy=email.policy.default)
            try:
                text = mail_text(message, path, notes)
                if not text.strip():
                    raise Unusable("empty")
            except Unusable as unusable:
                if notes.policy == "refuse":
                    raise UserError(str(unusable), where=f"{path}:mail {number}", fix="data.unreadable=skip") from None
                reasons[unusable.why] += 1
                notes.left_out.append((f"{path.name}:mail {number}", str(unusable)))
                continue
            read += 1
            first = str(message.get("references") or message.get("in-reply-to") or message.get("message-id") or number)
            yield {"text": text, "group": first.split()[0]}
    finally:
        box.close()
    if not read:
        told = ", ".join(f"{count} x {why}" for why, count in reasons.items()) or "it holds none"
        raise UserError(f"none of its mails can be used: {told}", where=str(path), fix="give another file")
    notes.read["e-mails"] += read
