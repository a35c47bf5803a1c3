"""What a check writes down while it runs in its own process, so that the parent knows it however the process ends."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What a result is judged from, beside the process's exit code.
STATUSES = ("PASS", "FAIL", "SKIP")


class NotHere(Exception):
    """This check, or this part of one, cannot be made here; the text says why."""


@dataclass
class Report:
    """One check's findings.

    device: ``cpu`` or ``cuda:0``; work: a folder of its own for what it writes; problems: why it fails, one sentence
    each; said: what a reader should know of a check that passes. ``file`` gets all of it after every stage.
    """

    name: str
    device: str
    work: Path
    quick: bool = False
    gpus: int = 0
    site: str | None = None
    file: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    skipped: str = ""
    stage: str = "start"
    done: bool = False

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def status(self) -> str:
        return "FAIL" if self.problems else "SKIP" if self.skipped else "PASS"

    @property
    def why(self) -> str:
        return "; ".join(self.problems or ([self.skipped] if self.skipped else self.said))

    def expect(self, true: Any, problem: str) -> bool:
        """Note ``problem`` unless ``true``; whether it was."""
        if not true:
            self.problems.append(problem)
        return bool(true)

    def begin(self, stage: str) -> None:
        """From here on a crash or a hang is one of ``stage``."""
        self.stage = stage
        self.keep()

    @contextlib.contextmanager
    def part(self, stage: str) -> Iterator[None]:
        """A part of the check: what it raises is a problem, and the next part is tried; :class:`NotHere` leaves it out
        with its reason, in the figures."""
        self.begin(stage)
        began = time.monotonic()
        try:
            yield
        except NotHere as reason:
            self.figures.setdefault("left_out", {})[stage] = str(reason)
        except Exception as error:
            self.problems.append(f"{stage}: {in_words(error)}")
        self.figures.setdefault("seconds_of", {})[stage] = round(time.monotonic() - began, 2)
        self.keep()

    def keep(self) -> None:
        """Write what is known so far."""
        if self.file is None:
            return
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(self.as_dict(), allow_nan=False, default=str), encoding="utf-8")
        beside.replace(self.file)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "done": self.done,
            "status": self.status,
            "stage": self.stage,
            "figures": plain(self.figures),
            "why": self.why,
        }


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def plain(value: Any) -> Any:
    """``value`` as JSON takes it: numbers that are none become text, long ones four digits."""
    if isinstance(value, dict):
        return {str(key): plain(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(below) for below in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return str(value)
