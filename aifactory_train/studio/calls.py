"""Commands of ``aifactory`` that a page runs in a process of their own, and shows."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError

#: Seconds that a page waits for a command: preparing rows and exporting take minutes.
_PATIENCE_S = 3600
#: Characters of a command's messages that a page shows.
_SHOWN = 20_000


@dataclass(frozen=True)
class Call:
    """A command line; ``words`` begin with the command."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, *words: str, **options: str | bool | Sequence[str] | None) -> Call:
        """``options``: ``None``, False and what is empty are left out, True is an option without a value, a sequence
        one that is repeated. What a person wrote stands behind ``=``, so that it never becomes an option."""
        if bad := [word for word in words if word.startswith("-") or "\0" in word]:
            raise UserError("begins with '-'", where=repr(bad[0]), fix="another name")
        found = list(words)
        for name, value in options.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                found.append(option)
            elif value:
                found += [f"{option}={one}" for one in ([value] if isinstance(value, str) else value)]
        return cls(tuple(found))

    @property
    def shown(self) -> str:
        """What does the same in a terminal."""
        return f"aifactory {shlex.join(self.words)}"


@dataclass(frozen=True)
class Outcome:
    """What became of a call: ``answer`` is the JSON that it printed, ``said`` what it told people."""

    call: Call
    code: int
    answer: Any
    said: str

    @property
    def good(self) -> bool:
        return self.code == 0


def _environment() -> dict[str, str]:
    """The child finds this package wherever it was started, and nothing that lies in the user's folder."""
    here = str(Path(__file__).resolve().parents[2])
    path = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "PYTHONSAFEPATH": "1", "NO_COLOR": "1"}


def _argv(call: Call) -> list[str]:
    return [sys.executable, "-m", "aifactory_train", *call.words]


async def run(call: Call, folder: Path) -> Outcome:
    """Run a command that ends by itself, with ``--json``, in ``folder``."""
    process = await asyncio.create_subprocess_exec(
        *_argv(call),
        "--json",
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, said = await asyncio.wait_for(process.communicate(), _PATIENCE_S)
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    text = said.decode("utf-8", "replace")
    lines = out.decode("utf-8", "replace").splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    return Outcome(call, process.returncode or 0, answer, text[-_SHOWN:])


def start(call: Call, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a command that outlives the studio: a session of its own, no terminal, its output in ``log``."""
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {call.shown}\n".encode())
        file.flush()
        return subprocess.Popen(
            _argv(call),
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def text_of(values: Mapping[str, str], name: str) -> str:
    """A field of a form without spaces around it; empty where it is missing."""
    return values.get(name, "").strip()
