"""The schedulers that a job can go to: one class and module each (:class:`Backend`), registered under its name.

Another one is a module here, its name in ``BUILTIN``, a template where none of those fits, and a row in
``sites/schedulers.py``.
"""

from __future__ import annotations

import importlib

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.launchers.backends.base import REGISTERED, Backend, Job, register

__all__ = ["BUILTIN", "Backend", "Job", "find", "get", "known", "of_scheduler", "register"]

#: Modules of this package that register a backend of their own name.
BUILTIN = ("local", "mpi", "slurm", "pbspro", "torque", "kubernetes")


def known() -> dict[str, Backend]:
    """All backends by name: those of this package in their order, then others that were registered."""
    for name in BUILTIN:
        _load(name)
    return {name: REGISTERED[name] for name in dict.fromkeys((*BUILTIN, *REGISTERED))}


def find(name: str) -> Backend | None:
    """The backend of a name or alias."""
    if name in BUILTIN:
        _load(name)
    if name in REGISTERED:
        return REGISTERED[name]
    return next((backend for backend in known().values() if name in backend.aliases), None)


def get(name: str) -> Backend:
    """The backend of a name or alias; raises UserError for another word."""
    found = find(name)
    if found is None:
        names = list(known())
        raise UserError(f"no backend '{name}'{did_you_mean(name, names)}", fix=f"one of {', '.join(names)}")
    return found


def of_scheduler(kind: str) -> Backend:
    """The backend that serves a profile's ``scheduler.kind``."""
    for backend in known().values():
        if kind in backend.schedulers:
            return backend
    raise UserError(f"no backend serves the scheduler '{kind}'", where="scheduler.kind")


def _load(name: str) -> None:
    if name not in REGISTERED:
        importlib.import_module(f"aifactory_train.launchers.backends.{name}")
