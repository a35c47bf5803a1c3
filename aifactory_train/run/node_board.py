"""What the ranks of one node tell each other, so that one of them writes to the run folder for all.

Thousands of ranks that each keep files in one folder of a parallel file system are what its metadata server suffers
from. So every rank leaves its words in memory of its node (``/dev/shm``, else a temporary folder), and one rank
publishes them together: ``attempts/NNN/alive-node-RANK.json`` and ``outcome-node-RANK.json`` hold
``{"ranks": {"0": …}}`` and are named after the rank that published them. Where ranks do not see each other (folders of
their own), each publishes what it sees. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import object_or_nothing, write_json
from aifactory_train.run.ownership import process_lives, process_start

#: Seconds after which a rank that did not say that it watches no longer publishes for the others.
SILENT_S = 30.0
#: Seconds that ranks which ended well wait for the others of their node, so that one file says it.
TOGETHER_S = 3.0


def _places() -> Iterator[Path]:
    """Where a node's ranks may meet: folders of this node alone."""
    if os.environ.get("AIFACTORY_LOCAL"):
        yield Path(os.environ["AIFACTORY_LOCAL"])
    yield Path("/dev/shm")
    yield Path(tempfile.gettempdir())


class NodeBoard:
    """One rank's view of its node's board for one attempt. Nothing here raises; what cannot be kept is not there."""

    def __init__(self, attempt: Path, rank: int):
        self.attempt, self.rank = attempt, rank
        node = os.environ.get("AIFACTORY_NODE") or socket.gethostname()
        name = hashlib.sha256(f"{node} {attempt.resolve()}".encode()).hexdigest()[:16]
        self.folder: Path | None = None
        for place in _places():
            folder = place / f"aifactory-{os.getuid()}-{name}"
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, exist_ok=True)
                facts = folder.lstat()
                if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid():
                    self.folder = folder
                    break
        for kind in ("alive", "outcome", "published"):  # left by a rank of an earlier run in this place
            self._remove(kind)
        self._process = {"pid": os.getpid(), "process_start": process_start(os.getpid())}

    # ---- words

    def put(self, kind: str, value: dict[str, Any]) -> bool:
        """Leave this rank's word of a kind; whether the others can read it."""
        if self.folder is None:
            return False
        try:
            write_json(self.folder / f"{kind}-{self.rank}.json", value, sync=False)
        except UserError:
            return False
        return True

    def all(self, kind: str) -> dict[int, dict[str, Any]]:
        """Everybody's word of a kind by rank."""
        found = {}
        for path in self.folder.glob(f"{kind}-*.json") if self.folder is not None else ():
            value, number = object_or_nothing(path), path.stem.rpartition("-")[2]
            if value and number.isdecimal():
                found[int(number)] = value
        return found

    def _remove(self, kind: str) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / f"{kind}-{self.rank}.json").unlink()

    # ---- heartbeats

    def watch(self, heartbeat: dict[str, Any], every_s: float) -> dict[int, dict[str, Any]] | None:
        """Leave this rank's heartbeat. Returns those of the node if this rank is the one to publish them, else None.

        The lowest rank that still watches, every ``every_s`` seconds, publishes; so the last words of one that is gone
        are published all the same.
        """
        mine = {"heartbeat": heartbeat, "seen": time.time(), "silent_s": max(SILENT_S, 3 * every_s), **self._process}
        if not self.put("alive", mine):
            return {self.rank: heartbeat}
        found = {**self.all("alive"), self.rank: mine}
        first = min(rank for rank, word in found.items() if rank == self.rank or self._watches(word))
        return {r: w["heartbeat"] for r, w in sorted(found.items())} if first == self.rank else None

    @staticmethod
    def _watches(word: dict[str, Any]) -> bool:
        return time.time() - word["seen"] < word["silent_s"] and process_lives(word["pid"], word["process_start"])

    # ---- outcomes

    def end_together(self, outcome: dict[str, Any], count: int) -> bool:
        """Say in one file how the ``count`` ranks of the node ended; whether this rank's outcome is in it.

        The lowest rank waits for the others for :data:`TOGETHER_S`; the others wait a little longer for it, and write a
        file of their own where it does not come.
        """
        if not self.put("outcome", outcome):
            return False
        first, until = min([self.rank, *self.all("alive")]), time.monotonic() + TOGETHER_S
        if first == self.rank:
            while len(self.all("outcome")) < count and time.monotonic() < until:
                time.sleep(0.02)
            ranks = {str(rank): word for rank, word in sorted(self.all("outcome").items())}
            write_json(self.attempt / f"outcome-node-{self.rank}.json", {"ranks": ranks})
            self.put("published", {"ranks": sorted(map(int, ranks))})
            return str(self.rank) in ranks
        while time.monotonic() < until + 1:
            if self.rank in self.all("published").get(first, {}).get("ranks", ()):
                return True
            time.sleep(0.02)
        return False

    def leave(self) -> None:
        """This rank has nothing more to say; the last one takes the board away."""
        for kind in ("alive", "outcome"):
            self._remove(kind)
        if self.folder is not None and not any(self.folder.glob("alive-*")):
            shutil.rmtree(self.folder, ignore_errors=True)
