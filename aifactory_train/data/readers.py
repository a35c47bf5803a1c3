"""Files of every accepted kind, read in blocks that a tokenising process can work on by itself.

JSON Lines are handed on as raw bytes cut at line ends (parsing is the worker's job); everything else as lists of rows.
No reader holds more than one block of a file in memory, except for ``.json`` files, which are parsed as a whole.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular
from aifactory_train.data import documents, folders, read_sheets
from aifactory_train.data.blocks import Block, in_blocks
from aifactory_train.data.read_arrow import arrow_rows, hugging_face_rows, parquet_rows
from aifactory_train.data.read_csv import csv_rows
from aifactory_train.data.read_json import json_lines, json_rows
from aifactory_train.private import vault

_KINDS = ".jsonl, .parquet, .csv, .xlsx, .txt, .md, .html, .pdf, .docx, ..."
#: What files of old formats are saved as.
_OLD = {
    kind: f"open it in its program and save it as {new}"
    for kind, new in {".xls": ".xlsx", ".doc": ".docx", ".ppt": ".pptx", ".odt": ".docx", ".odp": ".pptx"}.items()
} | {".msg": "save the mail as .eml"}
TABLE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}


def blocks(
    path: Path,
    *,
    split: str | None = None,
    hub: bool = False,
    notes: documents.Notes | None = None,
    role: str = "train",
) -> Iterator[Block]:
    """Rows of a file, of the files in a folder, or of a Hugging Face data set folder, in a stable order.

    ``notes`` gathers what became of documents (text, Markdown, HTML, PDF) that could not be read. ``role`` (``train``
    or ``eval``) decides which split of a folder is read where ``split`` names none.
    """
    notes = notes if notes is not None else documents.Notes()
    if hub or (path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())):
        yield from hugging_face_rows(path, split)
        return
    if path.is_dir():
        yield from _folder(path, split, notes, role)
        return
    if not path.exists():
        raise UserError("no such file", where=str(path))
    check_regular(path)
    yield from _file(path, notes)


def _file(path: Path, notes: documents.Notes) -> Iterator[Block]:
    suffixes = [s.lower() for s in vault.plain_name(path).suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes[-1] if suffixes else "")
    if path.stat().st_size == 0:
        raise UserError("the file is empty", where=str(path), fix="give a file that holds rows, or take it away")
    if documents.kind_of(path) is not None:
        yield from in_blocks(documents.rows_of_file(path, notes), f"{path}:part")
        return
    readers: dict[str, Callable[[Path], Iterator[Block]]] = {
        ".jsonl": json_lines,
        ".ndjson": json_lines,
        ".parquet": parquet_rows,
        ".arrow": arrow_rows,
    }
    if kind in read_sheets.SUFFIXES:
        yield from read_sheets.rows_of(path, kind, notes)
        return
    noting = {".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows}
    if kind not in readers and kind not in noting:
        raise UserError(
            f"files of kind '{kind or 'no suffix'}' are not read",
            where=str(path),
            fix=_OLD.get(
                kind,
                "use .jsonl, .json, .csv, .tsv, .parquet, .txt, .md, .html or .pdf (also .gz), .xlsx, .ods, .sqlite, "
                ".docx, .pptx, .epub, .eml or .mbox, or a converter",
            ),
        )
    try:
        yield from noting[kind](path, notes) if kind in noting else readers[kind](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"not a complete gzip file: {error}", where=str(path), fix="copy it again, or give the unpacked file"
        ) from None
    except PermissionError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix=f"chmod u+r {path.name}") from None


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
    if any(not documents.is_about(p) for p in tables):
        # Tables are the rows: what office programs wrote beside them is counted, as any other file.
        texts = [p for p in texts if documents.kind_of(p) not in documents.OF_OFFICE]
    elif not any(not documents.is_about(p) for p in texts):
        tables += [p for p in files if p not in texts and read_sheets.is_sheet(p)]
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
            f"the folder holds tables ({len(tables)}, the first one is {tables[0].name}) and documents "
            f"({len(beside)}, the first "
            f"one is {beside[0].name}); which of them are the rows?",
            where=str(path),
            fix="give each kind a folder of its own",
        )
    for file in tables:
        yield from _file(file, notes)


def _of_split(root: Path, files: list[Path], split: str | None, notes: documents.Notes, role: str) -> list[Path]:
    """The files that are read: those whose names hold the words of ``split``, or letters of it where none does;
    ``all``: every file. Where no split is named and the folder has several, as data sets of the hub have: the training
    split for training, for evaluation the validation split or else the test split."""
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
