"""The lab's scripts as context managers for pytest."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "sinfo", "scontrol")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client"


def missing() -> list[str]:
    """The Slurm programs that are not on PATH."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [p for p in PROGRAMS if shutil.which(p, path=path) is None]


def require() -> None:
    """Skip the test where Slurm is not installed; fail it where the environment says that it must be there."""
    gone = missing()
    if not gone:
        return
    message = f"Slurm is not installed here (no {', '.join(gone)}); {INSTALL}"
    if os.environ.get("AIFACTORY_REQUIRE_SLURM") == "1":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def free_port_block(size: int) -> int:
    """The first of ``size`` neighbouring TCP ports, below the ephemeral range, that nobody listens on now."""
    start = 20000 + os.getpid() * 37 % 9000
    for base in range(start, start + 3000, size + 1):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + size):
                    s = stack.enter_context(socket.socket())
                    s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError("no free block of ports between 20000 and 32000")


def _run(script: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HERE / script), *args], env=env, text=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL
    )


@contextlib.contextmanager
def _booted(script: str, args: list[str], ports: dict[str, str]) -> Iterator[dict[str, str]]:
    # Slurm cannot express blanks in paths and limits the length of socket names: a short directory of our own.
    folder = Path(tempfile.mkdtemp(prefix="aft-slurm-"))
    folder.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    env["PATH"] = f"{env.get('PATH', '')}:/usr/sbin:/sbin"
    env.update(ports)
    try:
        up = _run(script, str(folder), *args, env=env)
        if up.returncode != 0:
            log = "\n".join(p.read_text(errors="replace")[-2000:] for p in sorted(folder.glob("log/*")))
            raise RuntimeError(f"{script} failed ({up.returncode}):\n{up.stdout}{up.stderr}\n{log}")
        env["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        yield env
    finally:
        if (folder / "etc" / "slurm.conf").exists():
            down = _run("lab-down.sh", str(folder), "--purge", env=env)
            if down.returncode != 0:
                print(down.stdout, down.stderr)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def mini_cluster(nodes: int = 2, **variables: str) -> Iterator[dict[str, str]]:
    """A running mini-cluster; yields the environment (with SLURM_CONF) for its clients."""
    base = free_port_block(nodes + 1)
    with _booted("lab-up.sh", [str(nodes)], {"LAB_PORT": str(base), **variables}) as env:
        yield env


@contextlib.contextmanager
def twin(template: Path) -> Iterator[dict[str, str]]:
    """A controller alone, from a slurm.conf template; yields the environment for its clients."""
    with _booted("twin-up.sh", [str(template)], {"TWIN_PORT": str(free_port_block(1))}) as env:
        yield env


@contextlib.contextmanager
def full_cluster() -> Iterator[dict[str, str]]:
    """Four nodes with accounting (root only); yields the environment for its clients."""
    with _booted("full-up.sh", [], {"FULL_PORT": str(free_port_block(16))}) as env:
        yield env
