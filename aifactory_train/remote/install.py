"""First contact: a pinned program in one folder, tried there before it counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aifactory_train
from aifactory_train.config.loading import cache_dir
from aifactory_train.core.errors import UserError
from aifactory_train.remote import wheels as parts
from aifactory_train.remote.connection import Connection
from aifactory_train.remote.transfer import Parcel, push

#: Clocks that differ by more are told: codes of a clock and certificates depend on them.
SKEW_S = 30
_PROBE = (
    "import compileall, sys, sysconfig; import aifactory_train, pydantic, yaml, jinja2, rich; "
    "compileall.compile_dir(sysconfig.get_paths()['purelib'], quiet=2); print(aifactory_train.__version__)"
)


def facts_of(connection: Connection) -> dict[str, Any]:
    """What the other end says of itself, with ``skew_s``: seconds that its clock is ahead."""
    before = time.time()
    found = connection.ask("facts")
    found["skew_s"] = round(found["time"] - (before + time.time()) / 2, 1)
    return found


def modules_of(site: str | None) -> list[str]:
    """Modules of the site's profile that a Python may come from."""
    if site is None:
        return []
    from aifactory_train import sites

    system = sites.load(site)
    return [*(system.user.modules or []), *(str(name) for name in getattr(system.software, "modules", None) or [])]


def install(
    connection: Connection, *, folder: Path | None, download: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Make the program there what it is here; returns what the other end says. Nothing is sent that is there.

    Raises UserError where there is no Python >= 3.10, or wheels for it are not here.
    """
    remote = connection.remote
    found = facts_of(connection)
    python = connection.ask("pythons", python=remote.python, modules=modules_of(remote.site))
    if python["found"] is None:
        raise UserError(
            f"there is no Python 3.10 or newer (tried: {', '.join(python['tried'][:20])})",
            where=remote.name,
            fix="--python PATH names one there; else ask the site for a module of Python 3.10 or newer",
        )
    path, version, library = python["found"]
    built = parts.wheels_for(
        (version[0], version[1]), found["machine"], folder=folder, download=download, cache=cache_dir()
    )
    key = parts.key_of(built)
    current = found["installed"] or {}
    if current.get("key") != key:
        say(f"installing aifactory {aifactory_train.__version__} for Python {version[0]}.{version[1]} at {remote.host}")
        names = {name: f"wheels/{name}" for name in built}
        sent = push(connection, [Parcel(names[name], data) for name, data in built.items()])
        connection.ask("install", key=key, python=path, library_path=library, wheels=list(names.values()), probe=_PROBE)
        say(f"{sent / 1e6:.1f} MB went over; everything lies in {found['folder']}")
    return {
        "host": found["host"],
        "folder": found["folder"],
        "machine": found["machine"],
        "python": path,
        "version": aifactory_train.__version__,
        "key": key,
        "skew_s": found["skew_s"],
        "rsync": found["rsync"],
    }
