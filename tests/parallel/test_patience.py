"""Ranks wait for rank 0 while it works alone, however long, and no longer than the time-out where it freezes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.parallel import world

TIMEOUT_S = 3.0


def _spin() -> None:
    until = time.monotonic() + 2.5 * TIMEOUT_S
    while time.monotonic() < until:
        time.sleep(0.2)


def _child() -> None:
    code = f"import time\nuntil = time.time() + {2.5 * TIMEOUT_S}\nwhile time.time() < until: time.sleep(0.2)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _thread() -> None:
    thread = threading.Thread(target=_spin)
    thread.start()
    thread.join()


def _refuse() -> None:
    raise UserError("no")


def two_ranks(function: Callable[[], None], folder: Path) -> tuple[str, float]:
    """What rank 1 heard of it, and how long it waited; rank 0 is ended behind it."""
    port = helpers.reserved_port()
    pids = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            _rank(rank, port.getsockname()[1], function, folder)
        pids.append(pid)
    os.waitpid(pids[1], 0)
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    port.close()
    heard, _, seconds = (folder / "heard").read_text().rpartition("|")
    return heard, float(seconds)


def _rank(rank: int, port: int, function: Callable[[], None], folder: Path) -> None:
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        here = world.join_world(int(TIMEOUT_S), 1)
        watch = threading.Thread(target=lambda: [time.sleep(0.1) for _ in range(600)], daemon=True)
        watch.start()  # a thread that was there before is no sign of work
        began = time.monotonic()
        try:
            heard = str(world.from_main(here, lambda: function() or "done"))
        except (UserError, RunFailed) as error:
            heard = f"{type(error).__name__}: {error}"
        if rank == 1:
            (folder / "heard").write_text(f"{heard}|{time.monotonic() - began}")
        time.sleep(1 if rank == 0 else 0)
    finally:
        os._exit(0)


@pytest.mark.parametrize("work", [_spin, _child, _thread], ids=["main thread", "child", "thread"])
def test_a_rank_0_that_works_is_waited_for(tmp_path, work) -> None:
    heard, seconds = two_ranks(work, tmp_path)
    assert heard == "done" and seconds > 2 * TIMEOUT_S


@pytest.mark.parametrize(
    "freeze",
    [lambda: os.kill(os.getpid(), signal.SIGSTOP), lambda: time.sleep(60), lambda: os.read(os.pipe()[0], 1)],
    ids=["stopped", "asleep", "a read without end"],
)
def test_a_rank_0_that_freezes_is_named(tmp_path, freeze) -> None:
    heard, seconds = two_ranks(freeze, tmp_path)
    assert "RunFailed" in heard and "rank 0" in heard and "froze" in heard
    assert seconds < 3 * TIMEOUT_S


def test_what_rank_0_refuses_is_refused_everywhere(tmp_path) -> None:
    assert two_ranks(_refuse, tmp_path)[0] == "UserError: no"
