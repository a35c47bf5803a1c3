"""Questions to the machine that we are on, asked through its own commands."""

from __future__ import annotations

import os
import subprocess


def missing_modules(command: str, folders: list[str], modules: list[str]) -> list[str]:
    """Modules of the list that the module command does not know (Lmod's or Environment Modules' own executable)."""
    env = dict(os.environ)
    if folders:
        env["MODULEPATH"] = ":".join([*folders, env.get("MODULEPATH", "")])
    gone = []
    for name in modules:
        try:
            done = subprocess.run(
                [command, "bash", "is-avail", name], env=env, capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        if done.returncode != 0 or "false" in done.stdout:
            gone.append(name)
    return gone
