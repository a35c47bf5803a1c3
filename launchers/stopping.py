"""Asking a run to stop: the stop file that every rank looks at, or the scheduler to cancel its jobs."""

from __future__ import annotations

import getpass
import os
import socket
import time
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import RunFailed
from aifactory_train.launchers import backends
from aifactory_train.launchers.attempts import LIVE
from aifactory_train.launchers.follow import manifest_of, status_of
from aifactory_train.launchers.programs import attempt as book


def ask_to_stop(run: Path, reason: str) -> None:
    """Write ``RUN/stop``: why, when, who, and the attempt that it was asked of. Whole or not at all: a job may take it
    away now.
    """
    asked = book.attempt_numbers(str(run))
    try:
        who = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user that has no name
        who = f"{os.getuid()}@{socket.gethostname()}"
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    beside = run / f".stop.{os.getpid()}.tmp"
    beside.write_text(f"{reason} {when} by {who} of attempt {asked[-1] if asked else 'none yet'}\n")
    os.replace(beside, run / "stop")


def stop(folder: Path, *, cancel: bool, reason: str = "user") -> dict[str, Any]:
    """Ask a run to save and stop (the stop file), or cancel its jobs."""
    manifest = manifest_of(folder)
    before = status_of(folder)
    runs = [folder / f"{i:03d}" for i in range(len(manifest["array"]))] if manifest.get("array") else [folder]
    if before["state"] not in LIVE:
        raise RunFailed(f"the run is {before['state']}: there is nothing to stop", where=str(folder))
    for run in runs:
        ask_to_stop(run, reason)
        if cancel:
            (run / "cancelled").write_text(f"cancelled by its user at {time.strftime('%Y-%m-%dT%H:%M:%S')}\n")
    backend = backends.get(manifest["backend"]) if manifest.get("backend") else None
    live = [j["id"] for j in before["jobs"] if j["state"] in LIVE]
    cancelled = []
    for job in live:
        if backend is None:
            continue
        state = next((j["state"] for j in before["jobs"] if j["id"] == job), None)
        if cancel or state == "pending":
            backend.cancel(job)
            cancelled.append(job)
    return {"run": str(folder), "stop_file": str(runs[0] / "stop"), "cancelled": cancelled, "state": before["state"]}
