"""SHA-256 of the files that a record speaks of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aifactory_train.sources.digests import file_digest, sha256_of

__all__ = ["describe", "entries_below", "file_digest", "files_below", "tree_digest"]


def inside(folder: Path, name: Any) -> Path | None:
    """``folder / name`` for a relative path that stays inside the folder; None for anything else (records may be
    forged).
    """
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


def describe(paths: Iterable[Path], root: Path, *, remembered: bool = False) -> list[dict[str, Any]]:
    """``{path (below root), bytes, sha256}`` of each file, in the order of their names.

    ``remembered``: files that are untouched since they were last read are not read again
    (:mod:`aifactory_train.sources.digests`).
    """
    listed = sorted(paths)
    known = sha256_of(listed) if remembered else {p: file_digest(p) for p in listed}
    return [{"path": p.relative_to(root).as_posix(), "bytes": p.stat().st_size, "sha256": known[p]} for p in listed]


def files_below(folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    """All regular files below ``folder`` (links are followed), hidden ones left out."""
    if folder.is_file():
        return [folder]
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts) and keep(p)
    )


def entries_below(folder: Path) -> list[Path]:
    """Whatever lies below ``folder`` and is no folder of its own: files, hidden ones too, links to anything, pipes. No
    link to a folder is followed."""
    return sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def tree_digest(files: list[dict[str, Any]]) -> str:
    """One digest for a set of files: over ``sha256  path`` lines, as ``sha256sum`` would print them."""
    lines = "".join(f"{f['sha256']}  {f['path']}\n" for f in sorted(files, key=lambda f: f["path"]))
    return hashlib.sha256(lines.encode()).hexdigest()
