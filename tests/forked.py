"""Ranks of the real command line, forked from one process that has imported everything: a start costs a second, not
twenty.

Each rank is a process of its own that runs ``aifactory ARGS`` and can be killed like any other. Through a pipe it tells
what it does: ``{"rank", "step", "phase"}`` at every heartbeat, ``{"rank", "save": "begin"|"write"|"end"}`` around
saves.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers


def preload(*, deepspeed: bool = False) -> None:
    """Import what the ranks need (no threads, no process group: forking stays safe)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    transformers.logging.disable_progress_bar()
    import aifactory_train.parallel.fsdp
    import aifactory_train.training.start  # noqa: F401

    if deepspeed:
        from aifactory_train.parallel.deepspeed import import_deepspeed

        import_deepspeed()


class Ranks:
    """``size`` ranks of ``aifactory ARGS``, running from construction. Always use as a context manager."""

    def __init__(
        self,
        size: int,
        argv: list[str],
        log: Path,
        *,
        in_child: Callable[[int, Callable[[dict], None]], None] | None = None,
        env: dict[str, str] | None = None,
    ):
        self.size, self.events = size, []
        self.codes: dict[int, int] = {}  # negative: the signal
        self.pids: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._rest: dict[int, bytes] = {}
        log.mkdir(parents=True, exist_ok=True)
        self._port = helpers.reserved_port()
        port = self._port.getsockname()[1]
        for rank in range(size):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _child(rank, size, port, argv, log / f"rank-{rank}.log", writer, in_child, env or {})
            os.close(writer)
            os.set_blocking(reader, False)
            self._selector.register(reader, selectors.EVENT_READ)
            self._rest[reader] = b""
            self.pids.append(pid)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.kill(signal.SIGKILL)
        self.wait(10)
        for reader in list(self._rest):
            with contextlib.suppress(KeyError):
                self._selector.unregister(reader)
            os.close(reader)
        self._selector.close()
        self._port.close()

    def poll(self, timeout: float = 0.05) -> list[dict[str, Any]]:
        """New events, waiting at most ``timeout`` seconds for one."""
        new: list[dict[str, Any]] = []
        for key, _ in self._selector.select(timeout):
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fd)
                continue
            *lines, self._rest[key.fd] = (self._rest[key.fd] + data).split(b"\n")
            new += [json.loads(line) for line in lines]
        self.events += new
        self._reap()
        return new

    def _reap(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)

    @property
    def running(self) -> list[int]:
        self._reap()
        return [rank for rank in range(self.size) if rank not in self.codes]

    def kill(self, number: int, ranks: list[int] | None = None) -> None:
        for rank in self.running if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def wait(self, timeout: float) -> dict[int, int]:
        """Exit codes by rank; ranks that still run after ``timeout`` seconds are left out."""
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            if not self.poll(0.05):
                time.sleep(0.01)
        return self.codes

    def until(self, wanted: Callable[[dict[str, Any]], bool], timeout: float) -> dict[str, Any] | None:
        """The first event that fits; None when the ranks end or time is up before it."""
        end = time.monotonic() + timeout
        for event in self.events:
            if wanted(event):
                return event
        while time.monotonic() < end:
            for event in self.poll():
                if wanted(event):
                    return event
            if not self.running:
                return None
        return None


def _child(rank, size, port, argv, log, writer, in_child, env) -> None:
    """Never returns."""
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the life of the process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **env,
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def tell(event: dict[str, Any]) -> None:
            with contextlib.suppress(BrokenPipeError):
                os.write(writer, (json.dumps({"rank": rank, **event}) + "\n").encode())

        _tell_progress(tell)
        if in_child is not None:
            in_child(rank, tell)
        from aifactory_train.cli import main

        code = main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _tell_progress(tell: Callable[[dict], None]) -> None:
    """In a child: report heartbeats and saves."""
    from aifactory_train.run.outcome import Attempt
    from aifactory_train.training.checkpoint import Checkpointer

    beat, write = Attempt.beat, Checkpointer._write

    def telling_beat(self, step, phase):
        beat(self, step, phase)
        tell({"step": step, "phase": phase})

    def telling_write(self, step, *rest):
        tell({"save": "begin", "step": step})
        write(self, step, *rest)
        tell({"save": "end", "step": step})

    Attempt.beat, Checkpointer._write = telling_beat, telling_write


def slow_saves(seconds: float, tell: Callable[[dict], None] | None = None) -> None:
    """In a child: every save takes about ``seconds`` longer: a nap in the middle of the first and the tenth piece of
    bytes of each file (rank 0 writes five files)."""
    from aifactory_train.parallel import storage

    put, written = storage.put, {}

    def slow_put(file, chunk):
        number = written[file.name] = written.get(file.name, 0) + 1
        half = len(chunk) // 2
        put(file, chunk[:half])
        if number in (1, 10):
            if tell is not None:
                tell({"save": "write", "file": Path(file.name).name})
            file.flush()
            time.sleep(seconds / 6)
        put(file, chunk[half:])

    storage.put = slow_put


@contextlib.contextmanager
def ranks(size: int, argv: list[str], log: Path, **more: Any) -> Iterator[Ranks]:
    with Ranks(size, argv, log, **more) as running:
        yield running
