"""The files of a folder of a user's own, and what lies there beside them.

Links are followed inside the folder only. Whoever can write to a shared folder could else put a link there to a file
that the person who trains can read and they cannot, and would find it in the model.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from aifactory_train.core.errors import UserError

LEADS_OUT = "a link that leads out of the folder"
BROKEN = "a link that leads nowhere"
TO_FOLDER = "a link to a folder"
NO_FILE = "neither file nor folder"


@dataclass
class FolderFiles:
    """Files in a stable order, and ``(path, why)`` of what is not read; hidden files and folders are in neither."""

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def walk(root: Path) -> FolderFiles:
    """Everything below ``root``, which may be a link itself: the user named it. Raises :class:`UserError` for a folder
    that cannot be read."""
    found, homes = FolderFiles(), _homes(root)
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
    return FolderFiles(sorted(found.files), sorted(found.left_out))


def _homes(root: Path) -> list[Path]:
    """Where the target of a link may lie: in the folder; for a snapshot in the Hugging Face cache, which holds nothing
    but links, beside it in ``blobs``."""
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


#: Words that name a split of a data set.
_SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
}
#: Words that do so only where they are the whole name of a folder or file: a ``training-camp.csv`` is about something.
_WHOLE = {**_SPLITS, "training": "train", "testing": "test"}
_SUFFIX = re.compile(r"(\.(jsonl|ndjson|json|csv|tsv|parquet|gz|age|aft))+$")
_SHARD = re.compile(r"[-_.]\d+[-_]of[-_]\d+.*$")


def words(name: str) -> list[str]:
    """The words of a name, in small letters."""
    return re.findall(r"[^\W\d_]+", name.lower())


def holds(name: str, wanted: list[str]) -> bool:
    """Whether a path has these words, one after another, whole."""
    there = words(name)
    return bool(wanted) and any(there[i : i + len(wanted)] == wanted for i in range(len(there)))


def kind_of_split(name: str) -> str | None:
    """``train``, ``validation`` or ``test`` for a word that means one of them."""
    return _WHOLE.get(name.lower())


def split_of(path: PurePath, *, table: bool) -> str | None:
    """The split that a file of a data set belongs to by its name, as the hub lays them out:
    ``data/train-00000-of-00002.parquet``, ``train.jsonl``, ``my_rows_dev.csv``, ``test/0.parquet``. ``path`` is
    relative to the folder that was named.

    What counts is a folder with just such a name, or (tables only) the first or the last word of a file's name: the
    rows of a ``training-camp.csv`` and of a ``crash-test-cars.csv`` are rows like others, and so are documents called
    ``test.md``.
    """
    for folder in path.parts[:-1]:
        if (found := _WHOLE.get(folder.lower())) is not None:
            return found
    if not table:
        return None
    there = words(_SHARD.sub("", _SUFFIX.sub("", path.name.lower())))
    if len(there) == 1:
        return _WHOLE.get(there[0])
    return next((_SPLITS[word] for word in [*there[:1], *there[-1:]] if word in _SPLITS), None)
