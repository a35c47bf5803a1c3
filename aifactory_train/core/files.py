"""Files that appear whole: written beside, flushed, renamed. And the digest of a file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError


def put_whole(path: Path, text: str, mode: int | None = None) -> None:
    """Write a small file so that readers see the old or the new content, never a part. Raises OSError; nothing is left beside."""
    beside = path.with_name(
        f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    )  # other nodes have this process id too
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, mode)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """:func:`put_whole`, refused by name where the disk does not take it."""
    try:
        put_whole(path, text)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file as hex, read in pieces of 8 MiB. Raises OSError."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            found.update(piece)
    return found.hexdigest()


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file that this program wrote; a fault in it is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (ValueError, OSError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from None
