"""One run folder, one run: of several processes that want to train in a folder at the same time exactly one does.

Every start that trains leaves ``RUN/starts/NUMBER.json``; the highest number owns the folder. A start becomes number
n+1 by making that file, which one process alone can do, after it has seen that n does not train any more. Nothing is
ever taken away from under an owner: whoever judged too early finds n+1 there. File locks are not used, because cluster
file systems often switch them off.

Whether n still trains is decided by the first of these that knows:

* it said that it ended;
* it is a process of this machine: the process is there, and is the same one (process numbers are used again);
* the launcher knows: it closed that attempt after its processes were gone, or the scheduler queued the same job again;
* its heartbeat: no clock is compared, the file is watched for :data:`WATCH_S` and either changes or does not.

An owner whose place was taken all the same (its node had been out of reach) sees the higher number and ends: see
:meth:`Owner.check`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.output import note

#: An owner renews its file this often.
BEAT_S = 10.0
#: A file of another machine that did not change for so long has no owner any more. Several beats: a busy file system
#: may miss some.
WATCH_S = 45.0
#: Whether the folder has another owner is asked of the file system at most this often, where an old answer will do.
LOOK_S = 1.0
#: Where a file system has no hard links. Elsewhere a file appears with its content.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


def process_start(pid: int) -> str | None:
    """What tells a process from a later one of the same number: its start in clock ticks since boot (None where /proc
    has no answer).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if len(fields) > 19 else None


def process_age(pid: int) -> float | None:
    """Seconds since a process of this machine was started, or None where /proc has no answer."""
    started = process_start(pid)
    try:
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return None if started is None else max(0.0, uptime - int(started) / os.sysconf("SC_CLK_TCK"))


def process_lives(pid: int, started: str | None = None) -> bool:
    """Whether process ``pid`` of this machine exists, runs, and (where ``started`` is known) is the one that was
    meant.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()
    except OSError:
        return True
    # A zombie still answers the signal; it does not train any more.
    return stat[0] != "Z" and (started is None or stat[19] == started)


def this_machine() -> str:
    """What two processes have in common if each can look at the other: the boot of the machine and the process numbers'
    name space.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class RunIsLive(UserError):
    """Another process trains in the run folder. The launcher's books know it by this name: the attempt did nothing."""


class TakenOver(RunFailed):
    """Another start owns the run folder by now: this one changes nothing in it any more."""


class Owner:
    """This process's place in ``RUN/starts``. A context manager: leaving it gives up what :meth:`claim` took.

    ``attempt`` is the launcher's number of this attempt, if a launcher keeps the books.
    """

    def __init__(self, run: Path, attempt: int | None = None):
        self.run, self.attempt = run, attempt
        self.folder = run / "starts"
        self.number = 0  # none
        self._token = os.urandom(8).hex()
        self._beats = 0
        self._lost, self._looked = False, 0.0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- files
    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def _newest(self) -> int:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return 0
        return max((int(n[:-5]) for n in names if re.fullmatch(r"\d{5,}\.json", n)), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        """A start's file, or None where it cannot be read now: it may just be replaced."""
        try:
            value = json.loads(self._path(number).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _content(self, **more: Any) -> str:
        mine = {
            "host": socket.gethostname(),
            "machine": this_machine(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "attempt": self.attempt,
            "token": self._token,
            "beat": self._beats,
            "time": time.time(),
            **more,
        }
        return json.dumps(mine, indent=1) + "\n"

    def _beside(self) -> Path:
        return self.folder / f".{self._token}.tmp"

    def _make(self, number: int) -> bool:
        """Make the file of ``number`` with this process's name in it; False where another one has made it."""
        beside, path = self._beside(), self._path(number)
        beside.write_text(self._content(), encoding="utf-8")
        try:
            os.link(beside, path)
        except FileExistsError:
            # A file server may answer a repeated request after the first one worked.
            return (self._read(number) or {}).get("token") == self._token
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(self._content())
            except FileExistsError:
                return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def _renew(self, **more: Any) -> None:
        beside = self._beside()
        beside.write_text(self._content(**more), encoding="utf-8")
        os.replace(beside, self._path(self.number))

    # ---- taking and giving up
    def claim(self) -> None:
        """Own the folder, or raise :class:`UserError` where somebody else trains in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._newest()
            while True:
                if before and (other := living(self.run, before, self.attempt)):
                    raise RunIsLive(
                        f"a run is live here (process {other.get('pid')} on {other.get('host')})",
                        where=str(self.run),
                        fix="follow it with 'aifactory status', end it with 'aifactory stop', or choose another "
                        "--run-dir",
                    )
                number = before + 1
                if self._make(number):
                    if self._newest() == number:
                        break
                    self._path(number).unlink(missing_ok=True)  # the folder was read too early: others are further
                before = max(self._newest(), number)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(self.folder)) from None
        self.number = number
        self._thread = threading.Thread(target=self._keep, name="owner", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Give up a claim under which nothing was done: no trace of it is left."""
        self._leave(lambda: self._path(self.number).unlink(missing_ok=True))

    def release(self) -> None:
        """Give up the folder: the next start need not find out whether this process lives."""
        self._leave(lambda: self._renew(ended=time.time()))

    def _leave(self, how: Any) -> None:
        if not self.number:
            return
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._newest() == self.number:
                how()
        except OSError as error:  # the next start will find out that this process is gone
            note(f"{self._path(self.number)}: {error.strerror}")
        self.number = 0

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    # ---- while it is owned
    def _keep(self) -> None:
        reported = False
        while not self._end.wait(BEAT_S):
            try:
                if self._newest() > self.number:
                    self._lost = True
                    return
                self._beats += 1
                self._renew()
                reported = False
            except OSError as error:
                if not reported:
                    note(f"{self._path(self.number)} could not be renewed: {error.strerror}; trying again")
                reported = True

    def lost(self, *, look: bool = False) -> bool:
        """Whether another start owns the folder by now. The file system was asked within :data:`LOOK_S`; ``look`` asks
        it now.

        By the wall clock: a process that was stopped for a while asks before it does anything else.
        """
        due = look or abs(time.time() - self._looked) >= LOOK_S
        if due and self.number and not self._lost:
            self._looked = time.time()
            try:
                self._lost = self._newest() > self.number
            except OSError as error:
                note(f"{self.folder}: {error.strerror}")  # the heartbeat goes on asking
        return self._lost

    def check(self, *, look: bool = False) -> None:
        """Raise :class:`TakenOver` where the folder is :meth:`lost`."""
        if self.lost(look=look):
            other = self._read(self._newest()) or {}
            raise TakenOver(
                f"another start took this run over (process {other.get('pid')} on {other.get('host')}): this machine "
                f"gave no sign of "
                f"life for {WATCH_S:.0f} s",
                where=str(self.run),
                fix="nothing is lost: the other one goes on from the last complete checkpoint",
            )


def current(run: Path) -> int:
    """Number of the newest start in a run folder; 0 where there is none (also: a folder of before there were any)."""
    return Owner(run)._newest()


def living(run: Path, number: int, attempt: int | None = None) -> dict[str, Any] | None:
    """The content of start ``number`` if its process still trains in the folder. May watch its heartbeat for
    :data:`WATCH_S`.

    ``attempt`` is the launcher's number of the attempt that asks.
    """
    reader = Owner(run)
    first = reader._read(number)
    if first is not None:
        if first.get("ended") is not None:
            return None
        pid = first.get("pid")
        if first.get("machine") == this_machine() and isinstance(pid, int):
            return first if pid != os.getpid() and process_lives(pid, first.get("process_start")) else None
        if attempt is not None and launcher_ended(run, first.get("attempt"), attempt):
            return None
    if not reader._path(number).exists():
        return None  # it was withdrawn
    who = f"process {first.get('pid')} on {first.get('host')}" if first else f"the owner of {reader._path(number)}"
    note(f"{run}: {who} did not say that it ended; watching its heartbeat for up to {WATCH_S:.0f} s")
    seen = first
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 20))
        found = reader._read(number)
        if found is None:
            if not reader._path(number).exists():
                return None
            continue
        if found.get("ended") is not None:
            return None
        if seen is not None and (found.get("token"), found.get("beat")) != (seen.get("token"), seen.get("beat")):
            return found
        seen = found
    return None


def launcher_ended(run: Path, theirs: Any, ours: int) -> bool:
    """Whether the launcher's books say that attempt ``theirs`` was over before attempt ``ours`` began."""

    def book(number: int) -> dict[str, Any]:
        try:
            value = json.loads((run / "attempts" / f"{number:03d}" / "attempt.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    if not isinstance(theirs, int) or theirs >= ours:
        return False
    before, now = book(theirs), book(ours)
    # Its own job waited for its processes and then judged it; or it is the same job, which has no other processes any
    # more.
    closed = before.get("state") is not None and before.get("rc") is not None
    same_job = bool(before.get("job")) and before.get("job") == now.get("job")
    return closed or same_job
