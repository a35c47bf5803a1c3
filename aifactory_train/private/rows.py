"""Was this text in the training? Salted digests of the rows, so that the question can be answered without keeping the
rows.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError

FILE = "row_digests.txt"


def texts_of(row: Any) -> list[str]:
    """The row as one text and each of its messages (or its text) alone, normalised: NFC, single spaces."""
    if isinstance(row, str):
        return [_normal(row)]
    if not isinstance(row, dict):
        return []
    parts = [str(m.get("content") or "") for m in row.get("messages") or [] if isinstance(m, dict)]
    parts += [str(row[k]) for k in ("text", "prompt", "completion") if isinstance(row.get(k), str)]
    found = [_normal(p) for p in parts if p.strip()]
    return ["\n".join(found), *found] if len(found) > 1 else found


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def digest(salt: bytes, text: str) -> str:
    return hmac.new(salt, text.encode(), hashlib.sha256).hexdigest()[:32]


def write_digests(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Salt and sorted digests, readable by the user alone; returns how many."""
    salt = secrets.token_bytes(16)
    found = sorted({digest(salt, text) for row in rows for text in texts_of(row)})
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(f"HMAC-SHA256-128 {salt.hex()}\n" + "".join(f"{d}\n" for d in found))
    return len(found)


def was_in(path: Path, row: Any) -> bool:
    """Whether the row, or the text, was among the training rows (as a row or as one of its messages)."""
    try:
        head, *digests = path.read_text(encoding="ascii").splitlines()
        salt = bytes.fromhex(head.split()[1])
    except FileNotFoundError:
        raise UserError(
            "this run kept no digests of its rows",
            where=str(path),
            fix="they are kept under privacy.profile sensitive and restricted",
        ) from None
    except (ValueError, IndexError, UnicodeDecodeError):
        raise UserError("the list of digests is damaged", where=str(path)) from None
    wanted = texts_of(row)
    return bool(wanted) and digest(salt, wanted[0]) in set(digests)


def parse_row(text: str) -> Any:
    """A JSON row, or plain text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
