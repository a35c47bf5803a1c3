"""One module a scheduler, all with the same functions::

    PROGRAMS                 commands that must be on PATH to submit
    submit(run_dir) -> str   job id; raises RunFailed with the scheduler's own words
    query(job) -> Job | None what the scheduler knows about it now; None where it knows nothing any more
    cancel(job) -> None
    directives(sub)          the lines that a scheduler reads (Kubernetes: ``manifest``)

and, where a scheduler can, of its own instead of those below: ``accounting``, ``failed_nodes``, ``warn``.

``local`` and ``mpi`` run in the foreground of the launching process instead (``run(run_dir)``).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Job:
    """A job as its scheduler sees it. ``state``: pending | running | done | failed | cancelled | timeout | node-fail | out-of-memory | preempted."""

    id: str
    state: str
    reason: str | None = None
    nodes: str | None = None
    started: str | None = None
    ended: str | None = None
    exit_code: str | None = None
    raw: str = ""
    accounting: dict[str, Any] = field(default_factory=dict)


def accounting(job: str) -> dict[str, str] | None:
    """What the scheduler's accounting says of a job; None where there is none."""
    return None


def failed_nodes(nodes: str | None) -> list[str]:
    """Nodes of a list that the scheduler sees as down; none where it cannot be asked."""
    return []


def warn(job: str, signal: str) -> bool:
    """Send a signal to the batch shell; False where the scheduler cannot (the stop file decides in any case)."""
    return False


def get(backend: str) -> ModuleType:
    """The module of a backend (``local`` also carries out ``mpi``)."""
    name = {"mpi": "local"}.get(backend, backend)
    return importlib.import_module(f"aifactory_train.launchers.backends.{name}")
