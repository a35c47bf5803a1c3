"""One meter per node: the first rank of each node starts it, a thread reads the counters every few seconds and keeps
the sums in a small file of the attempt. Ranks never send each other anything for this, and a node that is killed leaves
its last figures.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aifactory_train.energy.readers import Reader, Unavailable

#: Often enough that RAPL cannot wrap twice unseen (a 262 kJ counter at 1 kW wraps after four minutes).
INTERVAL_S = 10.0


class Sum:
    """Joules of one reader since the start, from cumulative counters that may wrap or start again."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.joules: dict[str, float] = {}
        self.covered_s = 0.0  # mean over the counters that should be there
        self.notes: list[str] = []
        self._last: dict[str, tuple[float, float]] = {}  # counter -> (joules, time)

    def sample(self, now: float) -> None:
        try:
            values = self.reader.read()
        except Unavailable as error:
            self._note(f"not readable at times: {error}")
            return
        for name, value in values.items():
            if name in self._last:
                before, at = self._last[name]
                self.joules[name] = self.joules.get(name, 0.0) + self._difference(name, before, value)
                self.covered_s += (now - at) / self.reader.expected
            else:
                self.joules.setdefault(name, 0.0)
            self._last[name] = (value, now)

    def _difference(self, name: str, before: float, value: float) -> float:
        if value >= before:
            return value - before
        wrap = self.reader.wrap(name)
        if wrap is not None and before <= wrap:
            return value + wrap - before
        # The counter started again (driver reload): what it shows now is the least that was used.
        self._note(f"{name} started again from 0; the joules before that are lost")
        return value

    def _note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < 20:
            self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        return {
            "boundary": self.reader.boundary,
            "joules": {k: round(v, 3) for k, v in self.joules.items()},
            "counters_expected": self.reader.expected,
            "covered_s": round(self.covered_s, 3),
            "notes": self.notes,
        }


class NodeMeter:
    """Reads all counters of this node until :meth:`stop`; the file is written after each round, or every
    ``write_every_s`` seconds and at the end, where thousands of nodes write into one folder."""

    def __init__(
        self,
        path: Path,
        readers: Sequence[Reader],
        unavailable: dict[str, str],
        *,
        devices: int,
        interval_s: float = INTERVAL_S,
        write_every_s: float = 0.0,
        clock: Any = time.monotonic,
    ):
        self.path, self.devices = path, devices
        self._sums = [Sum(reader) for reader in readers]
        self._unavailable = unavailable
        self._interval, self._clock, self._write_every_s = interval_s, clock, write_every_s
        self._written: float | None = None
        self._started = clock()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: str | None = None

    def start(self) -> None:
        self.sample()
        self._thread = threading.Thread(target=self._run, name="energy-meter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._halt.wait(self._interval):
            self.sample()

    def sample(self, final: bool = False) -> None:
        """One round over the counters. An error is kept for the file and for the record, never raised."""
        try:
            now = self._clock()
            for one in self._sums:
                one.sample(now)
        except Exception as error:  # a driver may answer in ways nobody foresaw; measuring must not end a training
            self._failed = f"{type(error).__name__}: {error}"
        if final or self._written is None or self._clock() - self._written >= self._write_every_s:
            self._write(final)

    def _write(self, final: bool) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            if self._written is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._written = self._clock()
            beside.write_text(json.dumps(self.as_dict(final)), encoding="utf-8")
            os.replace(beside, self.path)
        except OSError as error:
            self._failed = f"the file cannot be written: {error.strerror}"

    def as_dict(self, final: bool = False) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "devices": self.devices,
            "wall_s": round(self._clock() - self._started, 3),
            "interval_s": self._interval,
            "final": final,
            "error": self._failed,
            "readers": {one.reader.name: one.as_dict() for one in self._sums},
            "unavailable": self._unavailable,
        }

    def stop(self) -> None:
        """Last reading; the file is marked as final."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join(timeout=self._interval)
        self.sample(final=True)
