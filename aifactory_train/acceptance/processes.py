"""Programs of this package as processes of their own.

On a machine without a GPU they are forked from a check that has imported everything, which saves most of their time.
A process that has asked a GPU anything must not be forked: there each is a Python of its own, as under a launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

#: The command line, and one of several ranks.
PROGRAM, RANK = "aifactory_train.cli", "aifactory_train.acceptance.ranks"


class Forked:
    """A process forked from this one that runs ``MODULE.main(argv)``; as much of ``subprocess.Popen`` as is used."""

    def __init__(self, module: str, argv: list[str], log: Path, out: Path | None, env: dict[str, str]):
        import aifactory_train.parallel.fsdp
        import aifactory_train.training.start  # noqa: F401 - before, so that no child imports it

        run = importlib.import_module(module).main
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(run, argv, log, out, env)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _become(run: Any, argv: list[str], log: Path, out: Path | None, env: dict[str, str]) -> NoReturn:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 2)
        os.dup2(handle if out is None else os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        os.environ.update(env)
        code = int(run(argv) or 0)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start(module: str, argv: list[Any], log: Path, *, out: Path | None = None, fork: bool, **env: str) -> Any:
    """``python -m MODULE ARGV``: standard error, and what is printed where ``out`` names no file, goes to ``log``."""
    words = [str(word) for word in argv]
    if fork:
        return Forked(module, words, log, out, env)
    with open(log, "ab") as file, open(out or os.devnull, "wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=printed if out else file,
            stderr=file,
            env={**os.environ, **env},
        )


def call(*argv: Any, log: Path, fork: bool, timeout: float = 300) -> tuple[int, str]:
    """``aifactory ARGV`` to its end: exit code, and what it printed on standard output."""
    out = log.with_suffix(".out")
    process = start(PROGRAM, list(argv), log, out=out, fork=fork)
    try:
        code = process.wait(timeout=timeout)
    finally:
        process.kill()
    return code, out.read_text(encoding="utf-8", errors="replace")


def end_of(log: Path) -> str:
    """What a process said last."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " ".join(lines[-3:])[-500:]


@contextlib.contextmanager
def port() -> Iterator[str]:
    """A free port of this host that nobody else is given meanwhile; torch's store may listen at it."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield str(kept.getsockname()[1])


class Started:
    """``size`` ranks of a program, as a launcher starts them; their logs are ``rank-N.log`` in ``work``."""

    def __init__(self, module: str, argv: list[Any], size: int, work: Path, number: str, *, fork: bool, **env: str):
        work.mkdir(parents=True, exist_ok=True)
        self.logs = [work / f"rank-{rank}.log" for rank in range(size)]
        self.began = time.monotonic()
        self.processes = []
        for rank, log in enumerate(self.logs):
            mine: dict[str, Any] = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": number,
                **env,
            }
            self.processes.append(start(module, argv, log, fork=fork, **mine))

    def wait(self, seconds: float, *, first_failure_ends: float | None = None) -> list[int | None]:
        """Exit codes; None of a rank that still runs after ``seconds``, or ``first_failure_ends`` seconds after the
        first one failed (as a launcher ends the others). Those are killed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            codes = [process.poll() for process in self.processes]
            if None not in codes:
                break
            if first_failure_ends is not None and any(codes):
                end, first_failure_ends = min(end, time.monotonic() + first_failure_ends), None
            time.sleep(0.02)
        codes = [process.poll() for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
