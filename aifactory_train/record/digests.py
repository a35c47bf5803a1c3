"""SHA-256 of the files that a record speaks of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces of 8 MiB."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            found.update(piece)
    return found.hexdigest()


def inside(folder: Path, name: Any) -> Path | None:
    """``folder / name`` for a relative path that stays inside the folder; None for anything else (records may be forged)."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = Path(name)
    return None if path.is_absolute() or ".." in path.parts else folder / path


def is_regular(path: Path) -> bool:
    """Whether a regular file lies there (a pipe would be waited for without end); a name that no file can have: no."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def describe(paths: Iterable[Path], root: Path) -> list[dict[str, Any]]:
    """``{path (below root), bytes, sha256}`` of each file, in the order of their names."""
    return [
        {"path": p.relative_to(root).as_posix(), "bytes": p.stat().st_size, "sha256": file_digest(p)}
        for p in sorted(paths)
    ]


def files_below(folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    """All regular files below ``folder`` (links are followed), hidden ones left out."""
    if folder.is_file():
        return [folder]
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts) and keep(p)
    )


def tree_digest(files: list[dict[str, Any]]) -> str:
    """One digest for a set of files: over ``sha256  path`` lines, as ``sha256sum`` would print them."""
    lines = "".join(f"{f['sha256']}  {f['path']}\n" for f in sorted(files, key=lambda f: f["path"]))
    return hashlib.sha256(lines.encode()).hexdigest()
