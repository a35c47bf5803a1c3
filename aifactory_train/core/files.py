"""Files that appear whole: written beside, flushed, renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None


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
