"""Asking a scheduler's own commands."""

from __future__ import annotations

import subprocess

from aifactory_train.core.errors import RunFailed, UserError

SUBMIT_ELSEWHERE = "submit from a login node of the site; --dry-run prints the script anywhere"


def ask(
    *argv: str, timeout: int = 60, env: dict[str, str] | None = None, fix: str = SUBMIT_ELSEWHERE
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said, whatever its exit code.

    Args:
        argv: the command and its arguments; no shell is involved.
        timeout: seconds until a scheduler that does not answer is given up (:class:`RunFailed`).
        env: its environment; default ours.
        fix: the fix where the command is not on this machine (:class:`UserError`).
    """
    try:
        return subprocess.run(argv, env=env, text=True, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError(f"there is no {argv[0]} on this machine", where="PATH", fix=fix) from None
    except subprocess.TimeoutExpired:
        raise RunFailed(
            f"{argv[0]} did not answer within {timeout} s", fix="try again later: the scheduler is busy"
        ) from None


def succeeded(done: subprocess.CompletedProcess[str], fault: str, where: str | None = None) -> None:
    """Raise :class:`RunFailed` in a command's own words where it failed."""
    if done.returncode != 0:
        raise RunFailed(f"{fault}: {' '.join(done.stderr.split())}", where=where)
