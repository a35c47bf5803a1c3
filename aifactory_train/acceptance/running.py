"""Runs the checks one after the other, each in its own process group with a time limit. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.acceptance.checks import LIMIT_S, MACHINE, QUICK_LIMIT_S, AcceptanceCheck
from aifactory_train.core import fresh_process
from aifactory_train.core.files import object_or_nothing

#: A check that has less than this left of the whole time is not begun.
LEAST_S = 5.0
#: What a process group is given to go away after SIGKILL; a driver that hangs may keep it for ever.
AFTER_KILL_S = 5.0


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


#: A scheduler that ends the job ends the check that runs, too; its warning before that is of no interest here.
SIGNALS: dict[int, Callable[[int, Any], None]] = {
    signal.SIGTERM: _end,
    signal.SIGUSR1: lambda number, frame: None,
    signal.SIGUSR2: lambda number, frame: None,
}


@dataclass
class Acceptance:
    """How the checks are run. ``out`` keeps the logs; ``site`` is the profile that facts are compared with."""

    out: Path
    quick: bool = False
    site: str | None = None
    limit_s: float | None = None
    say: Callable[[dict[str, Any]], None] = lambda result: None

    def __post_init__(self) -> None:
        self.logs = self.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.machine: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.began = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds left of the whole time."""
        whole = (QUICK_LIMIT_S if self.quick else LIMIT_S) if self.limit_s is None else self.limit_s
        return whole - (time.monotonic() - self.began)

    @property
    def gpus(self) -> int:
        return len(self.machine.get("gpus") or ())

    def run(self, checks: Sequence[AcceptanceCheck]) -> list[dict[str, Any]]:
        """All results, ``{name, status, seconds, figures, why}`` each, in the order of ``checks``. What checks write
        (models, runs) is gone afterwards; their logs stay."""
        self.scratch = Path(tempfile.mkdtemp(prefix="aifactory-accept-"))
        before = {number: signal.signal(number, handler) for number, handler in SIGNALS.items()}
        try:
            found = self.one(MACHINE, judged=False)
            self.machine = found["figures"]
            if found["status"] == "FAIL":
                # torch cannot even be imported, or the driver does not answer: everything below rests on it.
                self.add(found)
            for check in checks:
                self.add(self.one(check))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            shutil.rmtree(self.scratch, ignore_errors=True)
        return self.results

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self.say(result)

    def one(self, check: AcceptanceCheck, *, judged: bool = True) -> dict[str, Any]:
        """One check's result, however it ended."""
        reason = self.why_not(check) if judged else ""
        if reason:
            return {"name": check.name, "status": "SKIP", "seconds": 0.0, "figures": {}, "why": reason}
        own = check.limit(self.quick, bool(self.gpus))
        limit = max(1.0, min(own, self.left_s))
        result, log = self.scratch / f"{check.name}.json", self.logs / f"{check.name}.log"
        settings = self.scratch / f"{check.name}.settings.json"
        settings.write_text(json.dumps(self.settings(check, limit)), encoding="utf-8")
        began = time.monotonic()
        command = [sys.executable, "-m", "aifactory_train.acceptance.child", check.name, str(result), str(settings)]
        with open(log, "wb") as file:
            code = run_group(command, limit, env=self.environment(), stdout=file, stderr=subprocess.STDOUT)
        seconds = round(time.monotonic() - began, 2)
        shutil.rmtree(self.scratch / check.name, ignore_errors=True)
        found = judge(check.name, code, seconds, limit, object_or_nothing(result), log)
        if code is None and limit < own:  # not its own time, but that of the whole: nothing is known against it
            found |= {"status": "SKIP", "why": f"cut by the time of the whole acceptance: {found['why']}"}
        return found

    def why_not(self, check: AcceptanceCheck) -> str:
        """Why a check is not begun; empty where it is."""
        if self.quick and check.quick is None:
            return "left out by --quick"
        if not self.gpus and check.cpu:
            return f"no GPU here: {check.cpu}"
        if 0 < self.gpus < check.gpus:
            return f"{self.gpus} GPU here, this needs {check.gpus}"
        if self.left_s < LEAST_S:
            return "the time of the whole acceptance was used up by the checks before"
        return ""

    def settings(self, check: AcceptanceCheck, limit: float) -> dict[str, Any]:
        return {
            "device": "cuda:0" if self.gpus else "cpu",
            "gpus": self.gpus,
            "quick": self.quick,
            "site": self.site,
            "work": str(self.scratch / check.name),
            "run": check.run,
            "stacks_after_s": max(0.5, 0.9 * limit - 1),
        }

    def environment(self) -> dict[str, str]:
        """Of a launcher's variables nothing, so that a check is one process for itself; a cache of its own."""
        more = {"AIFACTORY_CACHE": str(self.scratch / "cache"), "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
        if self.machine and not self.gpus:
            # The check of the installation says that GPUs are missing; the others show what there is.
            more |= {"AIFACTORY_ALLOW_CPU": "1", "OMP_NUM_THREADS": "1"}  # the models are tiny
        elif self.gpus:
            cores = int((self.machine.get("host") or {}).get("cores_usable") or 1)
            more["OMP_NUM_THREADS"] = str(max(1, cores // self.gpus))
        without = ("AIFACTORY_ATTEMPT", "AIFACTORY_RUN", "AIFACTORY_STOP_AT", "TRITON_INTERPRET", "PALS_", "MPI_LOCAL")
        return fresh_process.environment(*without, **more)


def run_group(command: list[str], limit_s: float, **more: Any) -> int | None:
    """Run a command as the head of a process group of its own; its exit code, or None where it was ended after
    ``limit_s``. Whatever it left running is ended with it.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **more)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=AFTER_KILL_S)


def judge(
    name: str, code: int | None, seconds: float, limit: float, found: dict[str, Any], log: Path
) -> dict[str, Any]:
    """The result of a check from its process's end and the file that it wrote, which may be missing or unfinished."""
    figures, why = found.get("figures") or {}, str(found.get("why") or "")
    if found.get("done"):
        status = str(found.get("status"))
    else:
        status = "FAIL"
        how = f"did not end within {limit:.0f} s" if code is None else ended(code)
        before = f"; before: {why}" if why and found.get("status") == "FAIL" else ""
        last = "" if code is None else last_words(log)
        why = f"{how} (in: {found.get('stage') or 'start'})" + (f": {last}" if last else "") + before
    return {"name": name, "status": status, "seconds": seconds, "figures": figures, "why": why}


def ended(code: int) -> str:
    """The end of a process without a result, in words."""
    if code >= 0:
        return f"the process ended with exit code {code} and no result"
    try:
        text = signal.Signals(-code).name
    except ValueError:
        text = f"signal {-code}"
    if code == -signal.SIGKILL:
        text += " (by the operator, the node's out-of-memory killer or a limit)"
    return f"the process was ended by {text}"


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "\t"))]
    return said[-1][:300] if said else ""
