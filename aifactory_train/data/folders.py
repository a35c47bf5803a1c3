"""The files of a folder of a user's own, and what lies there beside them.

Links are followed inside the folder only. Whoever can write to a shared folder could else put a link there to a file that the person
who trains can read and they cannot, and would find it in the model.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from aifactory_train.errors import UserError

LEADS_OUT = "a link that leads out of the folder"
BROKEN = "a link that leads nowhere"
TO_FOLDER = "a link to a folder"
NO_FILE = "neither file nor folder"


@dataclass
class Found:
    """Files in a stable order, and ``(path, why)`` of what is not read; hidden files and folders are in neither."""

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def walk(root: Path) -> Found:
    """Everything below ``root``, which may be a link itself: the user named it. Raises :class:`UserError` for a folder that
    cannot be read."""
    found, homes = Found(), _homes(root)
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except PermissionError as error:
            raise UserError(
                f"the folder cannot be read: {error.strerror}", where=str(folder), fix="ask its owner, or take it away"
            ) from None
        for entry in inside:
            path = folder / entry.name
            if entry.is_symlink():
                why = _why_not(path, homes)
                if why is None:
                    found.files.append(path)
                else:
                    found.left_out.append((path, why))
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_file(follow_symlinks=False):
                found.files.append(path)
            else:
                found.left_out.append((path, NO_FILE))
    return Found(sorted(found.files), sorted(found.left_out))


def _homes(root: Path) -> list[Path]:
    """Where the target of a link may lie: in the folder; for a snapshot in the Hugging Face cache, which holds nothing but links,
    beside it in ``blobs``."""
    real = Path(os.path.realpath(root))
    return [real, *([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])]


def _why_not(link: Path, homes: list[Path]) -> str | None:
    """Why a link is not followed; None where it leads to a file inside."""
    target = Path(os.path.realpath(link))
    if not any(target.is_relative_to(home) for home in homes):
        return LEADS_OUT
    try:
        mode = os.stat(link).st_mode
    except OSError:  # its target is gone, or it leads to itself
        return BROKEN
    if stat.S_ISDIR(mode):
        return TO_FOLDER  # what is in it is read where it lies
    return None if stat.S_ISREG(mode) else NO_FILE
