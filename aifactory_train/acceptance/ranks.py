"""Several ranks on this machine, started as a launcher starts them: ``python -m aifactory_train.acceptance.ranks
MODULE:FUNCTION SETTINGS.json`` is one of them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULE = "aifactory_train.acceptance.ranks"


@contextlib.contextmanager
def port() -> Iterator[str]:
    """A free port of this host that nobody else is given meanwhile; torch's store may listen at it."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield str(kept.getsockname()[1])


class Started:
    """``size`` ranks that run; their logs are ``rank-N.log`` in ``work``."""

    def __init__(self, command: list[str], size: int, work: Path, number: str, **env: str):
        work.mkdir(parents=True, exist_ok=True)
        self.logs = [work / f"rank-{rank}.log" for rank in range(size)]
        self.began = time.monotonic()
        self.processes = []
        for rank, log in enumerate(self.logs):
            mine = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": number,
            }
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **mine, **env},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

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
            time.sleep(0.05)
        codes = [process.poll() for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)

    def said(self, rank: int) -> str:
        """The end of a rank's log."""
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")[-600:].strip()


def run(where: str, size: int, work: Path, seconds: float, settings: dict[str, Any]) -> list[Any]:
    """What ``where`` (``module:function`` of ``(world, settings)``) returned on each rank. Raises RuntimeError where
    one failed or did not end."""
    work.mkdir(parents=True, exist_ok=True)
    given = work / "settings.json"
    given.write_text(json.dumps({**settings, "out": str(work)}), encoding="utf-8")
    with port() as number:
        started = Started([sys.executable, "-W", "ignore", "-m", MODULE, where, str(given)], size, work, number)
        codes = started.wait(seconds, first_failure_ends=5)
    for rank, code in enumerate(codes):
        if code != 0:
            what = "did not end" if code is None else f"ended with {code}"
            raise RuntimeError(f"rank {rank} {what}: {started.said(rank)}")
    return [json.loads((work / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def main(argv: list[str]) -> int:
    """One rank."""
    from aifactory_train.parallel.world import join_world, leave_alone, leave_world, leaves_alone

    where, given = argv
    settings = json.loads(Path(given).read_text(encoding="utf-8"))
    module, _, function = where.partition(":")
    world = join_world(int(settings.get("timeout_s", 60)), threads=1)
    try:
        found = getattr(importlib.import_module(f"aifactory_train.acceptance.{module}"), function)(world, settings)
        (Path(settings["out"]) / f"found-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    except BaseException as error:
        if leaves_alone(world):
            sys.excepthook(type(error), error, error.__traceback__)
            leave_alone(1)
        raise
    finally:
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
