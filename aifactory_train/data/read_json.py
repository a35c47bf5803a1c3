"""JSON and JSON Lines: raw lines are cut into blocks here and parsed where they are tokenised."""

from __future__ import annotations

import codecs
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.unpacking import Growth, counted
from aifactory_train.data import documents
from aifactory_train.data.blocks import BLOCK_BYTES, BLOCK_ROWS, Block
from aifactory_train.data.cells import RowError, blank, parse_json, place_of_fault, to_user_error
from aifactory_train.data.rows import detect_format
from aifactory_train.data.turns import role_of
from aifactory_train.private import vault


def open_plain(path: Path) -> IO[bytes]:
    """For reading; an encrypted file is decrypted in memory."""
    file = vault.open_source(path)
    if vault.plain_name(path).suffix.lower() != ".gz":
        return file
    growth = Growth(path.stat().st_size, path, "if that is right: gunzip it and give the unpacked file")
    return counted(gzip.open(file, "rb"), growth)


def json_lines(path: Path) -> Iterator[Block]:
    with open_plain(path) as file:
        first = 1
        start = file.read(3)
        rest = [] if start == b"\xef\xbb\xbf" else [start]  # a byte-order mark
        while chunk := file.read(BLOCK_BYTES):
            cut = chunk.rfind(b"\n")
            if cut < 0:
                rest.append(chunk)
                continue
            lines = b"".join([*rest, chunk[: cut + 1]])
            rest = [chunk[cut + 1 :]]
            yield Block(str(path), first, lines=lines)
            first += lines.count(b"\n")
        lines = b"".join(rest)
        if lines.strip():
            yield Block(str(path), first, lines=lines)


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
            raise not_utf8(f"{block.file}:{number}", raw, error) from None
        except json.JSONDecodeError as error:
            # Only the last line of a file has no line end.
            torn = i == len(lines) - 1 and (error.pos >= len(error.doc) or error.msg.startswith("Unterminated"))
            fix = (
                "the file was cut off in this line: copy or export it again" if torn else "each line is one JSON object"
            )
            raise UserError(
                f"not valid JSON: {error.msg} (column {error.colno})",
                where=f"{block.file}:{number}",
                fix=UTF16 if b"\0" in raw else fix,
            ) from None
        except RowError as error:
            raise to_user_error(error, f"{block.file}:{number}") from None
        if b"\\u" in raw and _HALF.search(raw):
            _refuse_halves(value, f"{block.file}:{number}")
        yield number, value


#: An escape of half a surrogate pair in JSON, or what looks like one (its backslash may be escaped itself).
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
UTF16 = "it is UTF-16: iconv -f utf-16 -t utf-8 OLD > NEW (without a byte-order mark: -f utf-16le)"


def _refuse_halves(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            "an escape such as \\ud83d stands for half of a character",
            where=where,
            fix="the text was cut inside a character, often an emoji: take the escape out, or write the row again",
        ) from None


def not_utf8(where: str, raw: bytes, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8",
        where=where,
        fix="it is UTF-32: iconv -f utf-32 -t utf-8 OLD > NEW"
        if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))
        else UTF16
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw
        # not latin1: in what Excel writes that would turn the euro sign and quotation marks into control characters
        else "save the file as UTF-8 (in Excel 'CSV UTF-8'; else iconv -f windows-1252 -t utf-8 OLD > NEW)",
    )


def _read_text(path: Path) -> str:
    with open_plain(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        start = raw.rfind(b"\n", 0, error.start) + 1
        inner = UnicodeDecodeError(
            "utf-8", raw[start : error.end], error.start - start, error.end - start, error.reason
        )
        raise not_utf8(f"{path}:{line}", raw[start:], inner) from None


def _rows_inside(value: dict[str, Any], notes: documents.Notes) -> list[Any]:
    """The rows of a JSON file that holds an object: the one list of objects in it, or the object itself where it is a
    row.
    """
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) != 1 or _is_row(value, value[lists[0]][0]):
        return [value]
    for name, item in value.items():
        if name != lists[0] and not blank(item):
            notes.beside[f"'{name[:80]}' beside the rows of a JSON file: not read"] += 1
    return value[lists[0]]


def _is_row(value: dict[str, Any], first: dict[str, Any]) -> bool:
    """``first``: of the objects in the only list of them; the rows of a file may be called ``conversations``."""
    if "messages" in value:
        return True
    try:
        form, _ = detect_format(list(value))
    except RowError:
        return "chosen" in value and "rejected" in value
    if form == "messages":
        return role_of(first) is not None
    return form != "text" or isinstance(value["text"], str)


def json_rows(path: Path, notes: documents.Notes) -> Iterator[Block]:
    text = _read_text(path)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            yield from json_lines(path)  # JSON Lines under another name
            return
        raise UserError(
            f"not valid JSON: {error.msg} (column {error.colno})",
            where=f"{path}:{error.lineno}",
            fix=UTF16 if "\0" in text else "write it again, or one object a line as .jsonl",
        ) from None
    except RowError as error:
        raise to_user_error(error, f"{path}:{place_of_fault(text)}") from None
    if _HALF.search(text.encode("utf-8")):
        _refuse_halves(value, str(path))
    if isinstance(value, dict):
        value = _rows_inside(value, notes)
    if not isinstance(value, list):
        raise UserError(
            "holds neither a list of rows nor an object with one",
            where=f"{path}:1",
            fix='[{"prompt": ..., "completion": ...}, ...]',
        )
    for at in range(0, len(value), BLOCK_ROWS):
        yield Block(f"{path}:row", at + 1, rows=value[at : at + BLOCK_ROWS])
