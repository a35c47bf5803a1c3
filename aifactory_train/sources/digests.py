"""SHA-256 of files, each read once: what was found is remembered for as long as the file is untouched."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aifactory_train.config.loading import cache_dir
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import file_digest, put_whole

#: Digests that are remembered; the oldest go first.
KEPT = 5000
#: Files read at the same time: hashing lets other threads run, and one stream does not fill a parallel file system.
STREAMS = 8
#: A file changed this recently could change again within the clock's resolution, unseen: it is not remembered yet.
SETTLED_NS = 2_000_000_000


def sha256_of(paths: Iterable[Path], *, fresh: bool = False) -> dict[Path, str]:
    """SHA-256 of each file.

    A digest is taken from memory where the file's path, size, inode and both times (of content and of inode) are as
    they were: no program can write to a file and leave them all. ``fresh`` reads the files whatever is remembered.
    Raises :class:`UserError`.
    """
    memory = cache_dir() / "digests.json"
    known = {} if fresh else _recall(memory)
    stamps, found = {}, {}
    for path in paths:
        try:
            stamps[path] = _stamp(path)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
        if stamps[path] in known:
            found[path] = known[stamps[path]]
    unknown = [path for path in stamps if path not in found]
    if not unknown:
        return found
    with ThreadPoolExecutor(min(STREAMS, len(unknown))) as pool:
        pending = {path: pool.submit(file_digest, path) for path in unknown}
        for path, future in pending.items():
            try:
                found[path] = future.result()
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not fresh:
        settled = {stamps[path]: found[path] for path in unknown if _settled(path, stamps[path])}
        if settled:
            _remember(memory, settled)
    return found


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"


def _settled(path: Path, stamp: str) -> bool:
    """Whether the file is still what it was before it was read, and has been so for a while."""
    try:
        stat = path.stat()
        return _stamp(path) == stamp and time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
    except OSError:
        return False


def _recall(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # only a memory of digests: without it they are computed again
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, new: dict[str, str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        known = {**_recall(memory), **new}
        put_whole(memory, json.dumps(dict(list(known.items())[-KEPT:])), 0o600)
    except OSError:
        return  # as above
