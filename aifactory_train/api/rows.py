"""Rows that lie in memory, written down: lists, generators, data frames, data sets become JSON Lines with a name that
holds their digest, so that a run can name what it was trained on and repeat it."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note

#: What rows may be: a file or folder, or an iterable of mappings (a list, a generator, a ``datasets.Dataset``), or a
#: pandas data frame.
Rows: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Any"


def as_source(rows: Rows, name: str, folder: Path, where: str) -> str:
    """The path of the rows: as given, or of the JSON Lines that they are written to (``folder/NAME-DIGEST.jsonl``).

    Raises :class:`UserError` that names ``where`` and the row for what is no row, and for no rows at all.
    """
    if isinstance(rows, (str, os.PathLike)):
        return os.fspath(rows)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    digest, count, missing = hashlib.sha256(), 0, 0
    try:
        with open(beside, "x", encoding="utf-8") as file:
            for number, row in enumerate(_mappings(rows, where), 1):
                line, nans = _line(row, f"{where}, row {number}")
                missing += nans
                digest.update(line.encode())
                file.write(line)
                count += 1
        if not count:
            raise UserError("there are no rows", where=where, fix="give at least two; an iterator is used up only once")
        target = folder / f"{name}-{digest.hexdigest()[:12]}.jsonl"
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    note(f"{where}: {count:,} rows, written to {target}")
    if missing:
        note(f"{where}: {missing:,} cells are not a number (NaN), and count as empty")
    return str(target)


def _mappings(rows: Any, where: str) -> Iterator[Mapping[str, Any]]:
    if hasattr(rows, "to_dict") and hasattr(rows, "itertuples"):  # a pandas data frame
        names = [str(column) for column in rows.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"two columns are called '{twice[0]}'", where=where, fix="give each a name of its own")
        for values in rows.itertuples(index=False, name=None):
            yield dict(zip(names, values, strict=True))
        return
    if isinstance(rows, Mapping):
        splits = all(hasattr(value, "features") for value in rows.values()) and rows  # a datasets.DatasetDict
        raise UserError(
            f"a data set of several splits: {', '.join(map(str, rows))}" if splits else "is a mapping, not rows",
            where=where,
            fix=f"name one: {next(iter(rows))!r}" if splits else "a list of mappings, one for each row",
        )
    if not isinstance(rows, Iterable):
        fix = "a path, a list or generator of mappings, a pandas.DataFrame or a datasets.Dataset"
        raise UserError(f"{type(rows).__name__} is not rows", where=where, fix=fix)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            fix = "each row is a mapping of column names to values, e.g. {'prompt': …, 'completion': …}"
            raise UserError(f"is {type(row).__name__}, not a mapping", where=f"{where}, row {number}", fix=fix)
        yield row


def _line(row: Mapping[str, Any], where: str) -> tuple[str, int]:
    """One line of JSON, and how many of its values were NaN."""
    nans = 0

    def plain(value: Any, column: str) -> Any:
        nonlocal nans
        if isinstance(value, Mapping):
            return {str(k): plain(v, f"{column}.{k}") for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v, column) for v in value]
        if value is None or isinstance(value, (str, bool, int)):
            return value
        if type(value).__module__.startswith(("numpy", "pandas")):
            if hasattr(value, "tolist") and bool(getattr(value, "ndim", False)):
                return plain(value.tolist(), column)
            if type(value).__name__ in ("NAType", "NaTType"):
                nans += 1
                return None
            if hasattr(value, "item"):
                return plain(value.item(), column)
        if isinstance(value, float):
            if math.isnan(value):
                nans += 1
                return None
            if math.isinf(value):
                raise UserError("is infinite", where=f"{where}, column '{column}'", fix="a finite number, or nothing")
            return value
        if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
            return value.isoformat()
        fix = "text, numbers, true and false, dates, or lists and mappings of them"
        raise UserError(f"a {type(value).__name__} cannot be kept as a row", where=f"{where}, '{column}'", fix=fix)

    tree = {str(name): plain(value, str(name)) for name, value in row.items()}
    try:
        text = json.dumps(tree, ensure_ascii=False, allow_nan=False) + "\n"
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half a character (a lone surrogate)", where=where, fix="repair the text") from None
    return text, nans
