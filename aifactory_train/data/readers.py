"""Files of every accepted kind, read in blocks that a tokenising process can work on by itself.

JSON Lines are handed on as raw bytes cut at line ends (parsing is the worker's job); everything else as lists of rows. No
reader holds more than one block of a file in memory, except for ``.json`` files, which are parsed as a whole.
"""

from __future__ import annotations

import codecs
import collections
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from aifactory_train.core.errors import UserError
from aifactory_train.data import documents, folders
from aifactory_train.data.rows import parse_json
from aifactory_train.private import vault

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 1000
_KINDS = ".jsonl, .parquet, .csv, .txt, .md, .html, .pdf, ..."
TABLE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}


@dataclass
class Block:
    """Some neighbouring rows of one file. Either ``lines`` (raw JSON Lines) or ``rows`` is set; ``first`` is the line (or row
    number) of the first one, from 1; ``numbers`` the lines of ``rows`` where they do not simply follow one another."""

    file: str
    first: int
    lines: bytes | None = None
    rows: list[Any] | None = None
    numbers: list[int] | None = None

    def number(self, i: int) -> int:
        return self.numbers[i] if self.numbers is not None else self.first + i


def blocks(
    path: Path,
    *,
    split: str | None = None,
    hub: bool = False,
    notes: documents.Notes | None = None,
    role: str = "train",
) -> Iterator[Block]:
    """Rows of a file, of the files in a folder, or of a Hugging Face data set folder, in a stable order.

    ``notes`` gathers what became of documents (text, Markdown, HTML, PDF) that could not be read. ``role`` (``train`` or ``eval``)
    decides which split of a folder is read where ``split`` names none.
    """
    notes = notes if notes is not None else documents.Notes()
    if hub or (path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())):
        yield from _hugging_face(path, split)
        return
    if path.is_dir():
        yield from _folder(path, split, notes, role)
        return
    if not path.exists():
        raise UserError("no such file", where=str(path))
    yield from _file(path, notes)


def _file(path: Path, notes: documents.Notes) -> Iterator[Block]:
    suffixes = [s.lower() for s in vault.plain_name(path).suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes[-1] if suffixes else "")
    if path.stat().st_size == 0:
        raise UserError("the file is empty", where=str(path), fix="give a file that holds rows, or take it away")
    if documents.kind_of(path) is not None:
        yield from from_converter(documents.rows_of_file(path, notes), f"{path}:part")
        return
    readers: dict[str, Callable[[Path], Iterator[Block]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    if kind not in readers and kind not in (".csv", ".tsv"):
        raise UserError(
            f"files of kind '{kind or 'no suffix'}' are not read",
            where=str(path),
            fix="use .jsonl, .json, .csv, .tsv, .parquet, .txt, .md, .html or .pdf (also .gz), or a converter",
        )
    try:
        yield from _csv(path, notes) if kind in (".csv", ".tsv") else readers[kind](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"not a complete gzip file: {error}", where=str(path), fix="copy it again, or give the unpacked file"
        ) from None
    except PermissionError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix=f"chmod u+r {path.name}") from None


def _open(path: Path) -> IO[bytes]:
    """For reading; an encrypted file is decrypted in memory."""
    file = vault.open_source(path)
    return gzip.open(file, "rb") if vault.plain_name(path).suffix.lower() == ".gz" else file  # type: ignore[return-value]


def _folder(path: Path, split: str | None, notes: documents.Notes, role: str) -> Iterator[Block]:
    found = folders.walk(path)
    files = found.files
    for link, why in found.left_out:
        if notes.policy == "refuse":
            raise UserError(why, where=str(link), fix="take it away, or leave such things out: data.unreadable=skip")
        notes.left_out.append((link.relative_to(path).as_posix(), why))
    files = _of_split(path, files, split, notes, role)
    texts = [p for p in files if documents.kind_of(p) is not None]
    tables = [p for p in files if p not in texts and _is_table(p)]
    for p in files:
        if p not in texts and p not in tables:
            notes.not_read[p.suffix.lower() or "(none)"] += 1
    rows = [p for p in tables if not documents.is_about(p)]
    if rows or any(not documents.is_about(p) for p in texts):
        notes.about += [p.relative_to(path).as_posix() for p in [*tables, *texts] if documents.is_about(p)]
        tables = rows
    if not tables and not texts:
        what = f"no data file with '{split}' in its name" if split else f"no data file ({_KINDS})"
        there = ", ".join(f"{n} x {kind.rpartition(': ')[2]}" for kind, n in notes.counts().items())
        raise UserError(
            f"the folder holds {what}" + (f"; {there}" if there else ""),
            where=str(path),
            fix="name the folder that a link leads to, or copy the files into this one"
            if notes.left_out
            else "put files of these kinds into it, or name another folder",
        )
    if not tables:
        for file, row in documents.rows_of_folder(path, texts, notes):
            yield Block(str(file), 1, rows=[row])
        return
    beside = [p for p in texts if not documents.is_about(p)]
    if beside:
        raise UserError(
            f"the folder holds tables ({len(tables)}, the first one is {tables[0].name}) and documents ({len(beside)}, the first "
            f"one is {beside[0].name}); which of them are the rows?",
            where=str(path),
            fix="give each kind a folder of its own",
        )
    for file in tables:
        yield from _file(file, notes)


def _of_split(root: Path, files: list[Path], split: str | None, notes: documents.Notes, role: str) -> list[Path]:
    """The files that are read: those whose names hold the words of ``split``, or letters of it where none does; ``all``: every file.
    Where no split is named and the folder has several, as data sets of the hub have: the training split for training, for evaluation
    the validation split or else the test split."""
    known = {p: folders.split_of(p.relative_to(root), table=documents.kind_of(p) is None) for p in files}
    if split is not None:
        names = {p: p.relative_to(root).as_posix() for p in files}
        wanted = folders.words(split)
        kept = [
            p
            for p in files
            if folders.holds(names[p], wanted) or (known[p] is not None and known[p] == folders.kind_of_split(split))
        ]
        kept = kept or [p for p in files if split in names[p]]
        if not kept and split == "all":
            return files
        notes.split = split
    else:
        there = set(known.values()) - {None}
        if "train" not in there or len(there) < 2:
            return files
        chosen = "train" if role == "train" else ("validation" if "validation" in there else "test")
        kept = [p for p in files if known[p] == chosen]
        notes.split, notes.split_guessed = chosen, True
    for p in files:
        if p not in kept and not documents.is_about(p) and (_is_table(p) or documents.kind_of(p) is not None):
            notes.other_splits.setdefault(known[p] or "(no split)", []).append(p.relative_to(root).as_posix())
    if split is None:
        kept = [p for p in files if p in set(kept) or documents.is_about(p)]
    return kept


def _is_table(path: Path) -> bool:
    plain = vault.plain_name(path).suffix.lower()
    return plain in TABLE_SUFFIXES or (plain == ".gz" and len(path.suffixes) > 1)


def _json_lines(path: Path) -> Iterator[Block]:
    with _open(path) as file:
        first, rest = 1, b""
        start = file.read(3)
        rest = b"" if start == b"\xef\xbb\xbf" else start  # a byte-order mark
        while chunk := file.read(BLOCK_BYTES):
            cut = chunk.rfind(b"\n")
            if cut < 0:
                rest += chunk
                continue
            lines = rest + chunk[: cut + 1]
            rest = chunk[cut + 1 :]
            yield Block(str(path), first, lines=lines)
            first += lines.count(b"\n")
        if rest.strip():
            yield Block(str(path), first, lines=rest)


def parse_lines(block: Block) -> Iterator[tuple[int, Any]]:
    """``(line number, value)`` of a block of raw JSON Lines; blank lines are skipped. Raises :class:`UserError`."""
    assert block.lines is not None
    lines = block.lines.split(b"\n")
    for i, raw in enumerate(lines):
        if not raw or raw.isspace():
            continue
        number = block.first + i
        if raw.startswith(codecs.BOM_UTF8):  # files that were joined keep the mark that each of them began with
            raw = raw[3:]
            if not raw.strip():
                continue
        try:
            value = parse_json(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{block.file}:{number}", raw, error) from None
        except json.JSONDecodeError as error:
            # Only the last line of a file has no line end.
            torn = i == len(lines) - 1 and (error.pos >= len(error.doc) or error.msg.startswith("Unterminated"))
            fix = (
                "the file was cut off in this line: copy or export it again" if torn else "each line is one JSON object"
            )
            raise UserError(
                f"not valid JSON: {error.msg} (column {error.colno})",
                where=f"{block.file}:{number}",
                fix=_UTF16 if b"\0" in raw else fix,
            ) from None
        except RecursionError:
            raise _too_deep(f"{block.file}:{number}") from None
        if b"\\u" in raw and _HALF.search(raw):
            _refuse_halves(value, f"{block.file}:{number}")
        yield number, value


#: An escape of half a surrogate pair in JSON, or what looks like one (its backslash may be escaped itself).
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_UTF16 = "it is UTF-16: iconv -f utf-16 -t utf-8 OLD > NEW (without a byte-order mark: -f utf-16le)"


def _refuse_halves(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            "an escape such as \\ud83d stands for half of a character",
            where=where,
            fix="the text was cut inside a character, often an emoji: take the escape out, or write the row again",
        ) from None


def _too_deep(where: str) -> UserError:
    return UserError("JSON nested too deeply", where=where, fix="rows are objects with named columns")


def _not_utf8(where: str, raw: bytes, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8",
        where=where,
        fix="it is UTF-32: iconv -f utf-32 -t utf-8 OLD > NEW"
        if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))
        else _UTF16
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw
        # not latin1: in what Excel writes that would turn the euro sign and quotation marks into control characters
        else "save the file as UTF-8 (in Excel 'CSV UTF-8'; else iconv -f windows-1252 -t utf-8 OLD > NEW)",
    )


def _read_text(path: Path) -> str:
    with _open(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        start = raw.rfind(b"\n", 0, error.start) + 1
        inner = UnicodeDecodeError(
            "utf-8", raw[start : error.end], error.start - start, error.end - start, error.reason
        )
        raise _not_utf8(f"{path}:{line}", raw[start:], inner) from None


def _json(path: Path) -> Iterator[Block]:
    text = _read_text(path)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            yield from _json_lines(path)  # JSON Lines under another name
            return
        raise UserError(
            f"not valid JSON: {error.msg} (column {error.colno})",
            where=f"{path}:{error.lineno}",
            fix=_UTF16 if "\0" in text else "write it again, or one object a line as .jsonl",
        ) from None
    except RecursionError:
        raise _too_deep(str(path)) from None
    if _HALF.search(text.encode("utf-8")):
        _refuse_halves(value, str(path))
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) == 1 and "messages" not in value:
            value = value[lists[0]]
        else:
            value = [value]
    if not isinstance(value, list):
        raise UserError(
            "holds neither a list of rows nor an object with one",
            where=f"{path}:1",
            fix='[{"prompt": ..., "completion": ...}, ...]',
        )
    for at in range(0, len(value), BLOCK_ROWS):
        yield Block(f"{path}:row", at + 1, rows=value[at : at + BLOCK_ROWS])


def separator(header: str) -> str:
    """What separates the columns that the first line of a CSV file names: the comma, or in its place the semicolon that
    spreadsheets write where a comma divides decimals, a tab or a bar. Quoted names do not count."""
    plain = re.sub(r'"[^"]*"?', "", header)
    return max(",;\t|", key=plain.count)  # the comma where none is there


def _csv(path: Path, notes: documents.Notes) -> Iterator[Block]:
    csv.field_size_limit(1 << 30)

    def text_lines() -> Iterator[str]:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                if b"\0" in raw and not raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(
                        "a NUL byte: binary data, not text", where=f"{path}:{number}", fix=f"perhaps {_UTF16}"
                    )
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(f"{path}:{number}", raw, error) from None

    lines = text_lines()
    first = next(lines, "")
    tabs = ".tsv" in [s.lower() for s in vault.plain_name(path).suffixes]
    reader = csv.reader(itertools.chain([first], lines), delimiter="\t" if tabs else separator(first), strict=True)
    rows: list[Any] = []
    numbers: list[int] = []
    try:
        header = next(reader, None)
        header = [name.strip() for name in header or []]
        if not all(header) or not header:
            raise UserError(
                "the first line must name every column",
                where=f"{path}:1",
                fix="name them there; take out empty columns at the end, empty lines before it and a line 'sep=;'",
            )
        twice = next((name for name, n in collections.Counter(header).items() if n > 1), None)
        if twice is not None:
            raise UserError(
                f"the column name '{twice}' is given twice", where=f"{path}:1", fix="give each column a name of its own"
            )
        before = reader.line_num
        for cells in reader:
            number, before = before + 1, reader.line_num
            if not cells:
                continue
            if cells[0].startswith("\ufeff"):
                cells[0] = cells[0][1:]  # the file was joined from several
            if [cell.strip() for cell in cells] == header:
                notes.repeated_headers += 1
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{len(cells)} cells, but the header names {len(header)} columns",
                    where=f"{path}:{number}",
                    fix="quote cells that hold the separator",
                )
            rows.append(dict(zip(header, cells, strict=True)))
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


def _parquet(path: Path) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(vault.open_source(path))
        for batch in file.iter_batches(batch_size=BLOCK_ROWS):
            rows = [_without_nulls(row) for row in batch.to_pylist()]
            yield Block(f"{path}:row", first, rows=rows)
            first += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"not a readable Parquet file: {str(error).splitlines()[0][:200]}",
            where=str(path),
            fix="write or copy it again",
        ) from None
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, moments that Python has no date for
        raise UserError(
            f"a value of rows {first} to {first + BLOCK_ROWS - 1} cannot be read ({type(error).__name__})",
            where=str(path),
            fix="write text as UTF-8, and moments in microseconds",
        ) from None


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow writes where an object inside a column lacks a key that another row has: it knows no other
    way to leave a key out. Columns that are null stay."""
    return {name: _pruned(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _pruned(v) if isinstance(v, (dict, list)) else v for k, v in value.items() if v is not None}
    return [_pruned(v) if isinstance(v, (dict, list)) else v for v in value]


def _arrow(path: Path) -> Iterator[Block]:
    import pyarrow

    try:
        encrypted = vault.is_encrypted(path)
        with pyarrow.BufferReader(vault.active().read(path)) if encrypted else pyarrow.memory_map(str(path)) as source:
            try:
                reader: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                reader = (opened.get_batch(i) for i in range(opened.num_record_batches))
            first = 1
            for batch in reader:
                for at in range(0, batch.num_rows, BLOCK_ROWS):
                    rows = [_without_nulls(row) for row in batch.slice(at, BLOCK_ROWS).to_pylist()]
                    yield Block(f"{path}:row", first, rows=rows)
                    first += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"not a readable Arrow file: {str(error).splitlines()[0][:200]}", where=str(path)) from None


def _hugging_face(path: Path, split: str | None) -> Iterator[Block]:
    """A data set folder of ``datasets`` (saved to disk, or a snapshot of the hub), read without the network."""
    import datasets

    subset, _, name = (split or "").rpartition("/")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path), name=subset or None, streaming=True)
    except Exception as error:  # datasets raises many kinds; all mean that this folder cannot be read as asked
        raise UserError(
            f"cannot be read as a data set: {str(error).splitlines()[0][:300]}",
            where=str(path),
            fix="name subset and split as data.train.0.split=SUBSET/SPLIT",
        ) from None
    if isinstance(loaded, dict):
        wanted = name or ("train" if "train" in loaded else "")
        if wanted not in loaded:
            raise UserError(
                f"the data set has no split '{wanted or name}'",
                where=str(path),
                fix=f"splits are: {', '.join(map(str, loaded))}; choose one with data.train.0.split=...",
            )
        loaded = loaded[wanted]
        label = f"{path.name}[{wanted}]:row"
    else:
        label = f"{path.name}:row"
    rows: list[Any] = []
    first = 1
    for row in loaded:
        rows.append(_without_nulls(dict(row)))
        if len(rows) == BLOCK_ROWS:
            yield Block(label, first, rows=rows)
            first += len(rows)
            rows = []
    if rows:
        yield Block(label, first, rows=rows)


def from_converter(rows: Iterator[dict[str, Any]], label: str) -> Iterator[Block]:
    """Rows of a converter, numbered from 1."""
    held: list[Any] = []
    first = 1
    for row in rows:
        held.append(row)
        if len(held) == BLOCK_ROWS:
            yield Block(label, first, rows=held)
            first += len(held)
            held = []
    if held:
        yield Block(label, first, rows=held)


def limit(source: Iterator[Block], most: int | None) -> Iterator[Block]:
    """The first ``most`` rows."""
    if most is None:
        yield from source
        return
    left = most
    for block in source:
        if block.lines is not None:
            kept = io.BytesIO()
            for raw in block.lines.splitlines(keepends=True):
                if left <= 0:
                    break
                kept.write(raw)
                left -= 0 if raw.isspace() else 1
            yield Block(block.file, block.first, lines=kept.getvalue())
        else:
            assert block.rows is not None
            yield Block(block.file, block.first, rows=block.rows[:left], numbers=block.numbers)
            left -= min(left, len(block.rows))
        if left <= 0:
            return
