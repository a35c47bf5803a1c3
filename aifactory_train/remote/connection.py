"""One authenticated connection by OpenSSH, shared by many commands; requests travel over it as JSON.

The command that the shell there is given is a constant: what users name is in the request, on standard input.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.remote import faults
from aifactory_train.remote.known import HOST, Remote

#: How long the connection stays open after the last command.
PERSIST = "8h"
#: Pauses in seconds before a request is asked again after a cut.
PAUSES = (0.2, 0.5, 1, 2, 4, 8)
AGENT = Path(__file__).with_name("agent.py")
#: Any Python 3 there runs the agent, which comes first on standard input.
PROGRAM = (
    "exec sh -c 'for p in python3 /usr/bin/python3 /usr/libexec/platform-python python3.13 python3.12 python3.11 "
    "python3.10 python3.9 python3.8 python3.6; do command -v $p >/dev/null 2>&1 && exec $p -c "
    '"import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"; done; '
    "echo aifactory: no python3 >&2; exit 127'"
)
T = TypeVar("T")


class Cut(RunFailed):
    """The connection ended before the answer: the same may be asked again."""


class Refused(UserError):
    """The other end says no, in its own words."""


def _socket_folder() -> Path:
    """A folder of this user alone, with a short path: names of sockets are limited to 104 bytes."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    path = base / f"aifactory-ssh-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if path.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError("is not a folder of yours alone", where=str(path), fix="remove it, or set XDG_RUNTIME_DIR")
    return path


class Connection:
    """Commands at one remote over one connection, which is opened where none is there."""

    def __init__(self, remote: Remote):
        if shutil.which("ssh") is None:
            raise UserError("there is no ssh on this machine", where="PATH", fix="install OpenSSH's client")
        self.remote = remote
        identity = json.dumps([remote.host, remote.jump, remote.ssh_config])
        self.control = _socket_folder() / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def words(self, *options: str) -> list[str]:
        """``ssh`` with its options; user, host and port were checked against a small alphabet."""
        found = HOST.fullmatch(self.remote.host)
        assert found is not None
        words = ["ssh", "-T", "-o", f"ControlPath={self.control}", "-o", "LogLevel=ERROR"]
        if not (sys.stdin.isatty() or os.environ.get("SSH_ASKPASS")):
            words += ["-o", "BatchMode=yes"]  # nobody can answer
        if self.remote.ssh_config:
            words += ["-F", self.remote.ssh_config]
        if self.remote.jump:
            words += ["-J", self.remote.jump]
        if found[3]:
            words += ["-p", found[3][1:]]
        return [*words, *options, "--", f"{found[1] or ''}{found[2].strip('[]')}"]

    def alive(self) -> bool:
        if not self.control.exists():
            return False
        done = subprocess.run(self.words("-O", "check"), capture_output=True, stdin=subprocess.DEVNULL)
        return done.returncode == 0

    def open(self) -> None:
        """Authenticate where no connection is there. The user answers ssh's own questions at the terminal."""
        if self.alive():
            return
        with open(self.control.with_suffix(".lock"), "w") as lock, tempfile.TemporaryFile("w+") as said:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several commands one asks for the second factor
            if self.alive():
                return
            self.control.unlink(missing_ok=True)
            if warning := faults.expiring(self.remote):
                print(f"warning: {warning}", file=sys.stderr)
            options = ["ControlMaster=yes", f"ControlPersist={PERSIST}", "ServerAliveInterval=15", "ConnectTimeout=30"]
            words = self.words(*(word for option in options for word in ("-o", option)))
            # The connection stays behind and keeps standard error: a pipe would never end.
            done = subprocess.run([*words, "exit 0"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
            said.seek(0)
            text = said.read()
            if done.returncode != 0:
                raise faults.explained(text, self.remote) or Cut(f"{self.remote.host}: {faults.last(text)}")

    def close(self) -> None:
        if self.control.exists():
            subprocess.run(self.words("-O", "exit"), capture_output=True, stdin=subprocess.DEVNULL)

    @contextlib.contextmanager
    def asking(self, op: str, **request: Any) -> Iterator[Channel]:
        """One request; inside the block its answer is read. Raises Cut where the connection ends before."""
        self.open()
        with tempfile.TemporaryFile("w+b") as said:
            words = [*self.words("-o", "ControlMaster=no"), PROGRAM]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
            try:
                yield Channel(process, said, self.remote, {"op": op, "folder": self.remote.folder, **request})
            except BrokenPipeError:
                raise Cut(f"{self.remote.host}: the connection was cut") from None
            finally:
                for stream in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):
                        stream.close()  # type: ignore[union-attr]
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The one answer to a request that changes nothing when it is asked twice; asked again after a cut."""

        def once() -> dict[str, Any]:
            with self.asking(op, **request) as channel:
                return channel.answer()

        return again(once)


def again(work: Callable[[], T]) -> T:
    """Do what may be done twice, again after each cut, some times."""
    for pause in PAUSES:
        try:
            return work()
        except Cut:
            time.sleep(pause)
    return work()


class Channel:
    """Both directions of one request."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes], remote: Remote, request: dict[str, Any]):
        assert process.stdin is not None and process.stdout is not None
        self.process, self.said, self.remote = process, said, remote
        self.into, self.out = process.stdin, process.stdout
        program, marker = AGENT.read_bytes(), secrets.token_hex(8)
        request = {**request, "marker": marker}
        self.into.write(b"%d\n" % len(program) + program + json.dumps(request).encode() + b"\n")
        self.into.flush()
        while (line := self.out.readline()) != marker.encode() + b"\n":  # a login shell may print things of its own
            if not line:
                raise self._ended()

    def _ended(self) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.said.seek(0)
        text = self.said.read().decode(errors="replace")
        if "aifactory: no python3" in text:
            return UserError(
                "there is no Python 3 there", where=self.remote.host, fix="the site must offer Python 3.6 or newer"
            )
        return Cut(f"{self.remote.host}: {faults.last(text)}")

    def _exactly(self, size: int) -> bytes:
        data = self.out.read(size)
        if len(data) < size:
            raise self._ended()
        return data

    def _line(self) -> bytes:
        line = self.out.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        if line.startswith(b"r "):
            raise Refused(self._exactly(int(line[2:])).decode(), where=self.remote.name)
        return line

    def answer(self) -> dict[str, Any]:
        """A JSON object."""
        try:
            value: dict[str, Any] = json.loads(self._line())
        except ValueError:
            raise RunFailed("the answer is not what it should be", where=self.remote.host) from None
        return value

    def frames(self) -> Iterator[tuple[str, bytes]]:
        """(kind, bytes) until the frame ``x``, which is the last."""
        while True:
            kind, _, size = self._line().decode().partition(" ")
            data = self._exactly(int(size))
            yield kind, data
            if kind == "x":
                return
