"""Files over the connection, each whole, with its digest, going on where a cut ended it. Nothing is sent twice."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import file_digest
from aifactory_train.remote.connection import Connection, again

_PIECE = 1 << 20


@dataclass(frozen=True)
class Parcel:
    """A file for the other end: ``path`` below the one folder there, and where its bytes are."""

    path: str
    source: Path | bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb")

    def digest(self) -> str:
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else file_digest(self.source)

    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def push(connection: Connection, parcels: list[Parcel]) -> int:
    """Send what is not there; returns the bytes that went over. Raises RunFailed where a file changed meanwhile."""
    listed = [{"path": p.path, "sha256": p.digest(), "size": p.size()} for p in parcels]

    def once() -> int:
        sent = 0
        with connection.asking("put", files=listed) as channel:
            offsets = channel.answer()["offsets"]
            for parcel, offset in zip(parcels, offsets, strict=True):
                if offset is None:
                    continue
                with parcel.open() as file:
                    file.seek(offset)
                    left = parcel.size() - offset
                    while left > 0 and (piece := file.read(min(left, _PIECE))):
                        channel.into.write(piece)
                        left -= len(piece)
                        sent += len(piece)
                channel.into.flush()
            bad = channel.answer()["bad"]
        if bad:
            raise RunFailed(f"arrived damaged, or changed while it was sent: {', '.join(bad)}", fix="send it again")
        return sent

    return again(once) if parcels else 0


def _safe(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def pull(
    connection: Connection, run: str, target: Path, *, checkpoints: bool, say: Callable[[str], None]
) -> tuple[str, list[str], int]:
    """Bring the files of a run into ``target``: (folder there, names that are new or changed, bytes that came).

    A file appears whole, in the place of the older one. What changes while it is read is asked for again.
    """
    work = connection.remote.work
    came, changed = 0, list[str]()
    for _ in range(3):
        listed = connection.ask("listing", run=run, work=work, checkpoints=checkpoints)
        files = listed["files"]
        if not all(_safe(item["path"]) for item in files):
            raise UserError("a file there has a name that leads out of the run", where=run)
        wanted = [item for item in files if not _same(target / item["path"], item)]
        if not wanted:
            return listed["run"], changed, came
        say(f"{len(wanted)} file(s), {sum(item['size'] for item in wanted) / 1e6:,.1f} MB")
        came += again(lambda wanted=wanted: _fetch(connection, run, target, wanted))  # type: ignore[misc]
        changed += [item["path"] for item in wanted if _same(target / item["path"], item)]
    still = [item["path"] for item in wanted if not _same(target / item["path"], item)]
    if still:
        say(f"changes while it is read, left as it was: {', '.join(still[:5])}")
    return listed["run"], changed, came


def _same(path: Path, item: dict[str, object]) -> bool:
    return path.is_file() and path.stat().st_size == item["size"] and file_digest(path) == item["sha256"]


def _fetch(connection: Connection, run: str, target: Path, wanted: list[dict[str, object]]) -> int:
    came, asked = 0, []
    for item in wanted:
        part = _part(target, item)
        asked.append({**item, "offset": part.stat().st_size if part.is_file() else 0})
    left = [(item, _part(target, item)) for item in wanted if not _same(target / str(item["path"]), item)]
    asked = [one for one in asked if any(one["path"] == item["path"] for item, _ in left)]
    with connection.asking("send", run=run, work=connection.remote.work, files=asked) as channel:
        frames = channel.frames()
        for item, part in left:
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as file:
                for kind, data in frames:
                    if kind != "d":
                        break
                    file.write(data)
                    file.flush()
                    came += len(data)
                os.fsync(file.fileno())
            if part.stat().st_size == item["size"] and file_digest(part) == item["sha256"]:
                os.replace(part, target / str(item["path"]))
            else:
                part.unlink()  # it changed over there
    return came


def _part(target: Path, item: dict[str, object]) -> Path:
    path = target / str(item["path"])
    return path.with_name(f".{path.name}.{str(item['sha256'])[:16]}.part")
