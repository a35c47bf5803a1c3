"""When to stop: a deadline, a stop file, or a signal (:class:`StopChannels`), or because held-out rows get no better
(:class:`Best`).

The channels are looked at in every micro-batch, agreed by all ranks, and acted on at the step boundary: save, then end
with the exit code "stopped, resumable".

Signal handlers only set a flag; saving inside a handler would corrupt what the handler interrupted.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note
from aifactory_train.metrics import higher_is_better
from aifactory_train.run.outcome import MANY_RANKS

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: SIGINT is for people at a keyboard: the second one interrupts at once.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_REASONS = ["", "deadline", "stop file", *(s.name for s in SIGNALS)]
#: The stop file is looked at by rank 0, at most this often, and more seldom where many ranks load the file system.
LOOK_EVERY_S, LOOK_EVERY_S_OF_MANY = 0.5, 2.0
#: Kept free before a deadline for what no estimate covers: closing collectives, outcome files and the end of the
#: processes (on two busy cores 1.4 s were not enough).
RESERVE_S = 5.0


@dataclass
class Agreed:
    """What all ranks know after a step boundary."""

    reason: str  # "" or why to stop
    save_failed: bool  # a background save failed on some rank


def deadline_from(stop_at: float | None) -> float | None:
    """Seconds since the epoch at which the allocation ends: the flag, AIFACTORY_STOP_AT, or Slurm's
    SLURM_JOB_END_TIME.
    """
    if stop_at is not None:
        return stop_at
    for name in ("AIFACTORY_STOP_AT", "SLURM_JOB_END_TIME"):
        text = os.environ.get(name)
        if text:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UserError(f"'{text}' is not a time in seconds since the epoch", where=name)
            return value
    return None


class StopChannels:
    """The three channels of one rank. Construct early: until then a signal ends the process."""

    def __init__(self, stop_at: float | None = None):
        self.deadline = deadline_from(stop_at)
        self.reason = ""  # of this rank; once set it stays
        self.signal: str | None = None
        self.stop_file: Path | None = None
        self.request: str | None = None  # what the stop file said when it was seen, on the rank that watches it
        self._look_every_s, self._looked = LOOK_EVERY_S, 0.0
        self._steps: list[float] = []
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.isatty(2):  # a step or an evaluation may take long: say that it was heard
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once, without one\n")
        self.signal = signal.Signals(number).name

    def watch_file(self, path: Path, since: float | None = None, ranks: int = 1) -> None:
        """Rank 0 of ``ranks`` watches ``path``. A request that was made before ``since`` (seconds since the epoch)
        asked an earlier attempt: whoever started this one knew of it. It is removed. Without ``since`` every request
        counts, also one made while things are loaded.
        """
        self.stop_file = path
        self._look_every_s = LOOK_EVERY_S if ranks < MANY_RANKS else LOOK_EVERY_S_OF_MANY
        if since is None or not path.exists():
            return
        # The file server's clock wrote the time of the request; it may differ from this machine's.
        probe = path.with_name(f".clock.{os.getpid()}")
        try:
            probe.touch()
            offset = probe.stat().st_mtime - time.time()
            stale = path.stat().st_mtime - offset < since
        except FileNotFoundError:
            return  # taken back
        finally:
            probe.unlink(missing_ok=True)
        if stale:
            note(f"removing {path}: it asked an earlier attempt to stop")
            path.unlink(missing_ok=True)

    def step_took(self, seconds: float) -> None:
        """Feed the running estimate of a step."""
        self._steps = [*self._steps[-4:], seconds]

    def look(self, save_seconds: float) -> str:
        """Look at the channels; returns the reason, or an empty string. Cheap: call it in every micro-batch.

        The deadline counts as reached when another step (1.5 times the longest of the last five) and two saves (1.2
        times the estimate each) and ``RESERVE_S`` would no longer fit.
        """
        if self.reason:
            return self.reason
        now = time.time()
        # Two saves: one may be in the background when the time comes, and is finished before the last one begins.
        needed = 1.5 * max(self._steps, default=0.0) + 2.4 * save_seconds + RESERVE_S
        if self.signal is not None:
            self.reason = self.signal
        elif self.deadline is not None and now + needed >= self.deadline:
            self.reason = "deadline"
        elif self.stop_file is not None and time.monotonic() - self._looked >= self._look_every_s:
            self._looked = time.monotonic()
            try:
                if self.stop_file.exists() and not self.stop_file.is_file():
                    raise OSError("no file")  # a pipe would be waited for without end
                self.request = self.stop_file.read_text(encoding="utf-8", errors="replace").strip()
                self.reason = "stop file"
            except FileNotFoundError:
                pass  # nobody asks
            except OSError:  # there, but not readable: asked all the same
                self.request = ""
                self.reason = "stop file"
        return self.reason

    def agree(self, save_failed: bool) -> Agreed:
        """One small all-reduce on the host: if any rank has a reason, all stop at this boundary."""
        mine = torch.tensor([_REASONS.index(self.reason), int(save_failed)], dtype=torch.int32)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        code, failed = mine.tolist()
        return Agreed(_REASONS[code], bool(failed))


class Best:
    """The best held-out evaluation so far by one figure (``eval.best_by``), and how many evaluations followed without a
    better one.

    ``auto`` is the held-out loss; under a preference method the held-out preference loss, because the likelihood of
    chosen answers may fall while they are preferred more and more.
    """

    def __init__(self, recipe: Recipe):
        wanted = recipe.eval.best_by
        automatic = "loss" if recipe.methods.preference is None else "preference_loss"
        self.by = automatic if wanted == "auto" else wanted
        self.patience = recipe.eval.early_stopping
        self.value: float | None = None
        self.step: int | None = None
        self.since = 0

    def improves(self, figures: dict[str, Any], step: int) -> bool:
        """Take note of an evaluation; whether it is the best one yet. A figure that could not be computed is never the
        best.
        """
        value = figures.get(self.by)
        sign = -1.0 if higher_is_better(self.by) else 1.0
        if value is not None and (self.value is None or sign * value < sign * self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience (``eval.early_stopping``) has run out."""
        return self.patience is not None and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"by": self.by, "value": self.value, "step": self.step, "since": self.since}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; one that followed another figure says nothing about this one and is forgotten."""
        if state.get("by") == self.by:
            self.value, self.step, self.since = state["value"], state["step"], state["since"]
