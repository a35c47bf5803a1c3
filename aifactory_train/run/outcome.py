"""What each rank says about itself: a heartbeat while it works, one outcome file when it ends, a flight record if it
hangs.

Launchers hide causes (torchrun turns every failure into 1, srun into 143), so the files decide:
``attempts/NNN/outcome-RANK.json`` and ``attempts/NNN/alive-RANK.json``. Where a node has several ranks, one of them
writes their heartbeats, and how they ended if they ended well, into one file
(:mod:`aifactory_train.run.node_board`). Standard library only.
"""

from __future__ import annotations

import collections
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from aifactory_train.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, UserError
from aifactory_train.core.files import write_json
from aifactory_train.core.output import note
from aifactory_train.private import redact
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.node_board import NodeBoard
from aifactory_train.run.ownership import TakenOver

#: A heartbeat (and rank 0's ``state.json``) is written at most this often once an attempt has gone on for a while;
#: after 1, 2, 4 and 8 seconds at first, so that short runs can be followed.
BEAT_EVERY_S = 10.0
#: From so many ranks on less often, at most so many file operations a rank and minute (a heartbeat is made and
#: renamed): all lie in one folder of a parallel file system.
MANY_RANKS, OPERATIONS_A_MINUTE, BEAT_LATEST_S = 64, 0.5, 60.0
#: Phases in which every rank must make progress within the time-out; others (saving, evaluation) take as long as they
#: take.
WATCHED = ("forward", "reduce", "update")

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
#: Modules whose work is the host's alone: rows, tokens and files. A rank that stays there keeps the others waiting.
HOST_WORK = (
    f"data{os.sep}",
    f"record{os.sep}",
    f"sources{os.sep}",
    f"metrics{os.sep}",
    f"energy{os.sep}",
    f"private{os.sep}",
    f"core{os.sep}",
    f"run{os.sep}",
    f"parallel{os.sep}storage.py",
    f"training{os.sep}metrics_log.py",
    f"training{os.sep}stopping.py",
    f"training{os.sep}ahead.py",
)


class Attempt:
    """One rank's record of one attempt. Use as a context manager and set ``code`` to the exit code.

    What is said while it trains is written by a thread, so that no step waits for a file system. The thread says what
    the training reached, and when: it writes nothing while that stands still.
    """

    def __init__(
        self,
        run: RunFolder,
        rank: int,
        local_rank: int,
        number: int | None,
        *,
        timeout_s: float,
        device: str = "cpu",
        ranks: int = 1,
        local_size: int = 1,
    ):
        """``ranks`` train together, ``local_size`` of them on this node."""
        self.run, self.rank, self.local_rank = run, rank, local_rank
        self.host, self.started = socket.gethostname(), time.time()
        self.code: int | None = None
        self.step, self.phase = 0, "start"
        self.signal: str | None = None
        self.reason: str | None = None  # why it stopped, if it did
        self.stop_request: str | None = None  # what the stop file said, if that was why
        self.folder: Path | None = None
        self.training = False  # this process is the one that trains in the folder: it may change the run's state
        self._beat_at = time.time()
        self._written: tuple[int, str] | None = None
        self._running: tuple[int, dict[str, Any]] | None = None
        self._running_written: int | None = None
        self._local_size = local_size
        self._board: NodeBoard | None = None
        self._published: dict[int, tuple[Any, Any]] = {}
        self._every_s = BEAT_EVERY_S
        if ranks >= MANY_RANKS:
            self._every_s = min(BEAT_LATEST_S, max(BEAT_EVERY_S, 60 * 2 / OPERATIONS_A_MINUTE / local_size))
        self._quiet = threading.Event()
        self._writer: threading.Thread | None = None
        self._recent: collections.deque[tuple[float, int, str]] = collections.deque(maxlen=64)
        self._watchdog = Watchdog(self, timeout_s, device)
        if number is not None:
            self.begin(number)

    def begin(self, number: int) -> None:
        """Attempt ``number`` has a folder from now on."""
        self.folder = self.run.attempt_dir(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._local_size > 1:
            self._board = NodeBoard(self.folder, self.rank)
        self._recent.append((time.time(), self.step, self.phase))
        self._beat(publish=self.local_rank == 0)  # the others may be a moment later
        self._write_meanwhile()

    @property
    def closed_by_launcher(self) -> bool:
        """Whether a launcher keeps the books of this attempt: it closes it, and answers requests to stop."""
        return self.folder is not None and (self.folder / "attempt.json").is_file()

    def beat(self, step: int, phase: str) -> None:
        """Progress: this rank is in ``phase`` of the step after ``step``."""
        self.step, self.phase, self._beat_at = step, phase, time.time()
        self._recent.append((self._beat_at, step, phase))
        self._watchdog.seen()

    def running(self, step: int, **more: Any) -> None:
        """The run's state is "running" after ``step`` (rank 0)."""
        self._running = step, more
        self._write_meanwhile()

    def set_state(self, state: str, **more: Any) -> None:
        """How the run stands at the end of this attempt: written now, and nothing is written in the background any
        more.
        """
        self._stop_writing()
        self.run.set_state(state, **more)

    def _write_meanwhile(self) -> None:
        if self._writer is None and not self._quiet.is_set():
            self._writer = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)
            self._writer.start()

    def _keep_writing(self) -> None:
        wait, reported = 1.0, False
        while not self._quiet.wait(min(wait, self._every_s)):
            wait = min(2 * wait, self._every_s)
            try:
                self._write_down()
                reported = False
            except UserError as trouble:  # a full disk: the training goes on, and this is tried again
                if not reported:
                    note(f"rank {self.rank}: {trouble}")
                reported = True

    def _write_down(self) -> None:
        """Heartbeat and state, where there is something new to say."""
        if self._board is not None or (self.step, self.phase) != self._written:
            self._beat()
        running = self._running
        if running is not None and running[0] != self._running_written:
            self.run.set_state("running", step=running[0], **running[1])
            self._running_written = running[0]

    def _stop_writing(self) -> None:
        self._quiet.set()
        if self._writer is not None:
            self._writer.join()

    def _beat(self, publish: bool = True) -> None:
        if self.folder is None:
            return
        step, phase, when = self.step, self.phase, self._beat_at
        heartbeat = {
            "rank": self.rank,
            "host": self.host,
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "time": when,
        }
        # Whoever reads it takes a torn file for one that is missing: it need not reach the disk at once.
        if self._board is None:
            write_json(self.folder / f"alive-{self.rank}.json", heartbeat, sync=False)
            self._written = step, phase
            return
        found = self._board.watch(heartbeat, self._every_s)
        reached = {rank: (beat.get("step"), beat.get("phase")) for rank, beat in (found or {}).items()}
        if found and publish and reached != self._published:
            ranks = {str(rank): beat for rank, beat in found.items()}
            write_json(self.folder / f"alive-node-{self.rank}.json", {"ranks": ranks}, sync=False)
            self._published = reached

    def finish(
        self,
        status: str,
        code: int,
        exception: str | None = None,
        message: str | None = None,
        cause_rank: int | None = None,
    ) -> None:
        """Write the outcome; the first one stays (a watchdog may have spoken already). ``cause_rank``: whose error it
        is, where every rank raises it.
        """
        if self.folder is None:
            return
        path = self.folder / f"outcome-{self.rank}.json"
        if path.exists():
            return
        outcome = {
            "rank": self.rank,
            "local_rank": self.local_rank,
            "host": self.host,
            "status": status,
            "exit_code": code,
            "step": self.step,
            "exception": exception,
            "message": message,
            "cause_rank": cause_rank,
            "signal": self.signal,
            "stop_request": self.stop_request,
            "started": self.started,
            "ended": time.time(),
        }
        # One that failed speaks for itself, at once.
        together = self._board is not None and status in ("done", "stopped")
        if not (together and self._board.end_together(outcome, self._local_size)):  # type: ignore[union-attr]
            write_json(path, outcome)

    def _refused(self, error: BaseException) -> bool:
        """Whether a request to go on was refused before anything was done: what the run had reached stays true."""
        untouched = self.run.state()["state"] in ("finished", "stopped")
        return untouched and isinstance(error, UserError) and error.exit_code == EXIT_REFUSED

    def _say_failed(self, error: BaseException) -> None:
        if not isinstance(error, TakenOver) and not self._refused(error):
            self.run.set_state("failed", step=self.step, message=_short(error))

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._watchdog.stop()
        self._stop_writing()
        if self.folder is None:
            return
        try:
            if error is not None and self.training and self.rank == 0:
                self._say_failed(error)
        except UserError as trouble:  # a full disk must not hide what happened
            note(f"rank {self.rank}: the run's state could not be written: {trouble}")
        try:
            if error is None:
                code = EXIT_DONE if self.code is None else self.code
                status = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}.get(code, "failed")
                self.finish(status, code, message=self.reason)
            elif isinstance(error, UserError):
                self.finish("failed", error.exit_code, type(error).__name__, redact.message(error), error.rank)
            elif isinstance(error, SystemExit):
                code = error.code if isinstance(error.code, int) else EXIT_FAILED
                self.finish("failed", code, "SystemExit", f"the process asked to end with {error.code!r}")
            else:
                where = _innermost(tb)
                self.finish("failed", EXIT_FAILED, type(error).__name__, f"{_short(error)} ({where})")
        except UserError as trouble:
            note(f"rank {self.rank}: the outcome could not be written: {trouble}")
        finally:
            if self._board is not None:
                self._board.leave()


def _short(error: BaseException) -> str:
    text = redact.message(error).strip()
    return text if len(text) <= 2000 else text[:2000] + " …"


def in_one_line(error: BaseException, *, type_only: bool) -> str:
    """An exception for the record, without secrets; ``type_only`` without its message."""
    name = type(error).__name__
    return name if type_only else f"{name}: {redact.message(error)}".splitlines()[0][:500]


def _innermost(tb: TracebackType | None) -> str:
    frames = traceback.extract_tb(tb)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"


def waits_for_others(stack: traceback.StackSummary, device: str) -> bool:
    """Whether a rank whose main thread stands at ``stack`` (innermost frame last) waits for other ranks.

    On the CPU a collective shows as a frame of torch.distributed. On a GPU the host runs ahead and stands wherever the
    device is asked for a result or its queue is full, because a collective queued earlier does not end: every rank
    waits there, unless it is in our own work on the host (data and files). A copy to the device is no such work. A rank
    that is "alone" waits for nobody.
    """
    if device == "alone":
        return False
    if any("torch/distributed" in frame.filename for frame in stack):
        return True
    if device == "cpu":
        # DDP and FSDP reduce inside the backward pass: the wait for the others is native code below this frame.
        return any(frame.filename.endswith("torch/autograd/graph.py") for frame in stack)
    mine = [frame for frame in stack if frame.filename.startswith(_PACKAGE)]
    if not mine or mine[-1].name in ("to", "move"):
        return True
    return not mine[-1].filename[len(_PACKAGE) :].startswith(HOST_WORK)


class Watchdog:
    """Ends a rank that makes no progress: writes ``flight-RANK.txt`` (all stacks, the last phases) and the outcome.

    A rank that waits for others is told apart from the one they wait for: it says so, and it waits a little longer, so
    that the true cause is written first.
    """

    def __init__(self, attempt: Attempt, timeout_s: float, device: str = "cpu"):
        self.attempt, self.timeout_s, self.device = attempt, timeout_s, device
        self._seen = time.monotonic()
        self._stop = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def seen(self) -> None:
        self._seen = time.monotonic()

    def stop(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self.timeout_s / 10)):
            idle = time.monotonic() - self._seen
            if self.attempt.phase not in WATCHED or idle < 0.9 * self.timeout_s:
                continue
            stack = traceback.extract_stack(sys._current_frames()[self._main])  # type: ignore[index]
            waits = waits_for_others(stack, self.device)
            if waits and idle < 1.5 * self.timeout_s:
                continue  # the collective's own time-out speaks before this
            self._end(idle, stack, waits)

    def _end(self, idle: float, stack: traceback.StackSummary, waits: bool) -> None:
        attempt = self.attempt
        place = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}"
        what = f"no progress for {idle:.0f} s in phase '{attempt.phase}' after step {attempt.step}, at {place}"
        if attempt.folder is not None:
            lines = [f"rank {attempt.rank} on {attempt.host}: {what}", "", "last phases (seconds ago, step, phase):"]
            now = time.time()
            lines += [f"  {now - when:8.1f}  {step}  {phase}" for when, step, phase in attempt._recent]
            for ident, frame in sys._current_frames().items():
                name = next((t.name for t in threading.enumerate() if t.ident == ident), str(ident))
                lines += ["", f"thread {name}:", *(line.rstrip() for line in traceback.format_stack(frame))]
            (attempt.folder / f"flight-{attempt.rank}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            kind = "TimeoutError" if waits else "Hang"
            text = f"timed out waiting for other ranks: {what}" if waits else what
            attempt.finish("failed", EXIT_FAILED, kind, text)
        note(f"rank {attempt.rank} on {attempt.host}: {what}")
        os._exit(EXIT_FAILED)  # the main thread is stuck: nothing it holds can be released in order


def new_attempt(run: RunFolder) -> int:
    """The next free number, claimed by making its folder (rank 0, where no launcher gave one)."""
    number = max(run.attempts(), default=0) + 1
    while True:
        try:
            run.attempt_dir(number).mkdir(parents=True)
            return number
        except FileExistsError:
            number += 1
