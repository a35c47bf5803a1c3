"""Curves of a run that trains now: ``metrics.jsonl`` is read on from where it was left, and thinned as it comes, so
that an update costs the same after a hundred thousand steps as after ten."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from aifactory_train.report.svg import BUCKETS, Bucket, Curve, chart

#: Bytes that are read at once: a browser sees the first charts of a long run while the rest is read.
_AT_ONCE = 4 << 20

#: name, title, unit, key, zero is shown
_CHARTS = (
    ("loss", "Loss", "nats per supervised token", "loss", False),
    ("preference", "Preference loss", "a pair or answer", "preference_loss", False),
    ("rate", "Learning rate", "", "learning_rate", True),
    ("norm", "Gradient norm", "L2, before clipping", "grad_norm", True),
    ("speed", "Throughput", "tokens/s", "tokens_per_s", True),
    ("memory", "Memory", "GiB at most so far", "memory_bytes", True),
)
_SCALE = {"memory_bytes": 1 / 2**30}


@dataclass
class Thinned:
    """A curve of any length as at most :data:`BUCKETS` buckets: mean, least and largest of each, so that a spike is
    never averaged away. Neighbours are joined when there are too many, and each then stands for twice as many steps.

    ``_parts``: ``[last x, sum, count, least, largest]``.
    """

    per_bucket: int = 1
    _parts: list[list[float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """The next point; ``x`` ascends."""
        if self._parts and self._parts[-1][2] < self.per_bucket:
            last = self._parts[-1]
            last[0], last[1], last[2] = x, last[1] + y, last[2] + 1
            last[3], last[4] = min(last[3], y), max(last[4], y)
            return
        self._parts.append([x, y, 1, y, y])
        if len(self._parts) > BUCKETS:
            self.per_bucket *= 2
            pairs = [self._parts[i : i + 2] for i in range(0, len(self._parts), 2)]
            self._parts = [_joined(pair) for pair in pairs]

    def buckets(self) -> list[Bucket]:
        """``(x, mean, least, largest)``, ascending."""
        return [(x, total / count, least, most) for x, total, count, least, most in self._parts]


def _joined(parts: list[list[float]]) -> list[float]:
    xs, sums, counts, leasts, mosts = zip(*parts, strict=True)
    return [xs[-1], sum(sums), sum(counts), min(leasts), max(mosts)]


class Follower:
    """What ``metrics.jsonl`` of a run says so far. Several pages may ask at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self.step, self.rows = 0, 0
        self.last: dict[str, Any] = {}
        self.train: dict[str, Thinned] = {}
        self.held: dict[str, Thinned] = {}
        self._offset, self._tail, self._inode = 0, b"", 0

    def read(self) -> bool:
        """Read what was written since; True if there is more to read at once. A file that was begun anew, as a resumed
        run does, is read from its beginning."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    inode = os.fstat(file.fileno()).st_ino
                    if inode != self._inode or not self._goes_on(file):
                        self._begin()
                        self._inode = inode
                    file.seek(self._offset)
                    raw = file.read(_AT_ONCE)
            except OSError:
                return False  # not written yet
            whole = raw.rfind(b"\n") + 1  # the last line may be half written
            for line in raw[:whole].split(b"\n"):
                self._take(line)
            if whole:
                self._offset += whole
                self._tail = raw[max(0, whole - 64) : whole]
            return whole > 0 and len(raw) == _AT_ONCE

    def _goes_on(self, file: BinaryIO) -> bool:
        """What was read last still stands where it stood."""
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _take(self, line: bytes) -> None:
        if not line:
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        kind = row.get("kind", "train")
        if kind not in ("train", "eval"):
            return
        self.rows += 1
        curves = self.train if kind == "train" else self.held
        if kind == "train":
            self.step, self.last = row["step"], row
        for _, _, _, key, _ in _CHARTS:
            value = row.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault(key, Thinned()).add(row["step"], value * _SCALE.get(key, 1))

    def charts(self) -> dict[str, str]:
        """Figures (HTML) by name, of what is there."""
        with self._lock:
            found = {}
            for name, title, unit, key, zero in _CHARTS:
                if key not in self.train:
                    continue
                curves = [_curve("training", self.train[key])]
                if key in self.held:
                    curves.append(_curve("held-out", self.held[key], dots=True))
                found[name] = chart(name, title, unit, curves, zero=zero)
            return {name: html for name, html in found.items() if html}


def _curve(label: str, thinned: Thinned, dots: bool = False) -> Curve:
    return Curve(label, (), (), dots=dots, buckets=thinned.buckets())
