"""How long ranks wait for rank 0 while it works alone: as long as it gets on, and no longer.

Rank 0 tells the others every few seconds that it still works, from a thread of its own. What counts is whether the work
moves: that its main thread, threads that were started for it, or child processes ran since they were last looked at. A
process that was stopped says nothing, and one that hangs in a read that never ends says nothing either.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.core.errors import RunFailed

#: Longest wait between two signs of life.
_EVERY_S = 10.0
_TASKS = Path("/proc/self/task")


class Signs:
    """Whether this process worked since it was last asked. Where Linux does not tell, it always did."""

    def __init__(self) -> None:
        main = str(os.getpid())
        # Threads that were there before keep watch or measure: they run whether or not the work gets on.
        self._others = set(_names(_TASKS)) - {main}
        self._last: Any = None

    def of_work(self) -> bool:
        """Whether anything ran since the last call; true at the first one."""
        if not _TASKS.is_dir():
            return True
        mine = {str(threading.get_native_id())}
        tasks = [_TASKS / name for name in _names(_TASKS) if name not in self._others | mine]
        now = [(task.name, *_ran(task)) for task in tasks], [(child, *_ran(child)) for child in _below(os.getpid())]
        moved, self._last = now != self._last, now
        return moved


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _ran(task: Path) -> tuple[str, ...]:
    """What grows while a thread (or a process) runs: its time on a core, and how often it came and went."""
    found = []
    with contextlib.suppress(OSError):
        found.append(" ".join((task / "stat").read_text(errors="replace").rpartition(")")[2].split()[11:13]))
        found.append((task / "schedstat").read_text())
    with contextlib.suppress(OSError):
        lines = (task / "status").read_text(errors="replace").split("\n")
        found += [line for line in lines if "ctxt_switches" in line]
    return tuple(found)


def _below(pid: int) -> list[Path]:
    """The processes that this one started, and theirs."""
    parents: dict[str, list[str]] = {}
    for name in filter(str.isdecimal, _names(Path("/proc"))):
        with contextlib.suppress(OSError, IndexError):
            stat = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents.setdefault(stat[1], []).append(name)
    found, left = [], [str(pid)]
    while left:
        below = parents.pop(left.pop(), [])
        found += below
        left += below
    return [Path("/proc", name) for name in sorted(found)]


#: The world, the time-out and the group that waits. Made once: a group of thousands of ranks takes seconds to connect.
_made: list[Any] = []


def _group(timeout_s: float) -> Any:
    if not _made or _made[0] is not dist.group.WORLD or _made[1] != timeout_s:
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        _made[:] = [dist.group.WORLD, timeout_s, patient]
    return _made[2]


def forget() -> None:
    """Before the process group is taken down."""
    _made.clear()


@contextlib.contextmanager
def working(timeout_s: float) -> Iterator[Any]:
    """Around what rank 0 does alone, while the others are in :func:`wait`; gives the group that both use."""
    group = _group(timeout_s)
    ended, signs = threading.Event(), Signs()
    trouble: list[BaseException] = []

    def tell() -> None:
        try:
            while not ended.wait(min(_EVERY_S, timeout_s / 5)):
                if signs.of_work():
                    dist.broadcast(torch.zeros(1), src=0, group=group)
        except RuntimeError as error:
            trouble.append(error)

    teller = threading.Thread(target=tell, name="signs of life", daemon=True)
    teller.start()
    try:
        yield group
    finally:
        ended.set()
        teller.join()
    if trouble:
        raise trouble[0]  # a rank that waited is gone
    dist.broadcast(torch.ones(1), src=0, group=group)


def wait(timeout_s: float) -> Any:
    """Wait until rank 0 has done what it does alone; gives the group of :func:`working`. Raises :class:`RunFailed`
    where it gives no sign of work for ``timeout_s``."""
    group = _group(timeout_s)
    done = torch.zeros(1)
    try:
        while not done:
            dist.broadcast(done, src=0, group=group)
    except RuntimeError as error:
        if "imed out" not in str(error):
            raise
        raise RunFailed(
            f"rank 0 froze while the others waited for it: no sign of work for {timeout_s:.0f} s",
            where="rank 0",
            fix="look at its node and file system; parallel.timeout_s says how long is waited",
        ) from None
    return group
