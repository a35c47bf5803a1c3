"""``aifactory remote``: sites that this machine reaches by OpenSSH, for ``--on NAME`` of the other commands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="name a login node and install the program there", allow_abbrev=False)
    add.add_argument("name", metavar="NAME")
    add.add_argument("host", metavar="USER@HOST", help="also an alias of ~/.ssh/config; a port behind a colon")
    add.add_argument("--jump", metavar="USER@HOST", help="ssh's ProxyJump")
    add.add_argument("--site", metavar="SYSTEM", help="the system of 'aifactory sites' that it is a login of")
    add.add_argument("--folder", metavar="DIR", help="the one folder there (default: ~/aifactory-remote)")
    add.add_argument("--python", metavar="PATH", help="a Python 3.10 or newer there (default: it is looked for)")
    add.add_argument("--ssh-config", metavar="FILE", help="instead of ~/.ssh/config")
    check = actions.add_parser("check", help="connect, and bring the program there up to date", allow_abbrev=False)
    check.add_argument("name", metavar="NAME")
    for sub in (add, check):
        sub.add_argument("--wheels", type=Path, metavar="DIR", help="take wheels from this folder")
        sub.add_argument("--download", action="store_true", help="ask the package index for wheels that are not here")
    close = actions.add_parser("close", help="end the open connection", allow_abbrev=False)
    close.add_argument("name", metavar="NAME")
    remove = actions.add_parser("remove", help="delete the folder there, and the name here", allow_abbrev=False)
    remove.add_argument("name", metavar="NAME")
    remove.add_argument("--runs", action="store_true", help="with the runs that lie in it")
    remove.add_argument("--only-here", action="store_true", help="forget the name; delete nothing there")
    listed = actions.add_parser("list", help="the names", allow_abbrev=False)
    for sub in (add, check, close, remove, listed):
        sub.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    found = {"add": _add, "check": _check, "close": _close, "remove": _remove, "list": _list}[args.action](args)
    if args.json:
        from aifactory_train.core.output import print_json

        print_json(found)
    return 0


def _add(args: argparse.Namespace) -> dict[str, Any]:
    from aifactory_train.remote import known

    known.check_name(args.name)
    work = None
    if args.site is not None:
        from aifactory_train import sites

        work = sites.load(args.site).user.work_dir
    config = args.ssh_config and os.path.abspath(os.path.expanduser(args.ssh_config))
    if config and not Path(config).is_file():
        raise UserError("no such file", where=f"--ssh-config {args.ssh_config}")
    folder = args.folder or (f"{work.rstrip('/')}/aifactory-remote" if work else known.FOLDER)
    remote = known.Remote(args.name, args.host, args.jump, args.site, folder, work, args.python, config)
    before = known.load(args.name) if args.name in known.names() else None
    if before is not None and (before.host, before.folder) != (remote.host, remote.folder):
        fix = f"aifactory remote remove {args.name}, or another name"
        raise UserError(f"'{args.name}' is {before.host} with {before.folder}", where="NAME", fix=fix)
    found = _installed(remote.checked(), args)
    known.save(remote)
    return found


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from aifactory_train.remote import known

    return _installed(known.load(args.name), args)


def _installed(remote: Any, args: argparse.Namespace) -> dict[str, Any]:
    from aifactory_train.core.output import note
    from aifactory_train.remote.connection import Connection
    from aifactory_train.remote.install import SKEW_S, install

    if args.wheels is not None and not args.wheels.is_dir():
        raise UserError("no such folder", where=f"--wheels {args.wheels}")
    found = install(Connection(remote), folder=args.wheels, download=args.download, say=note)
    if abs(found["skew_s"]) > SKEW_S:
        ahead = "ahead of" if found["skew_s"] > 0 else "behind"
        note(
            f"warning: the clock there is {abs(found['skew_s']):.0f} s {ahead} this machine's: codes of a clock and "
            "certificates may be refused, and times of a run are the site's"
        )
    note(f"{remote.name}: {found['host']}, Python {found['python']}, aifactory {found['version']}, {found['folder']}")
    return {"name": remote.name, "address": remote.host, "site": remote.site, **found}


def _close(args: argparse.Namespace) -> dict[str, Any]:
    from aifactory_train.remote import known
    from aifactory_train.remote.connection import Connection

    Connection(known.load(args.name)).close()
    return {"name": args.name}


def _remove(args: argparse.Namespace) -> dict[str, Any]:
    from aifactory_train.core.output import note
    from aifactory_train.remote import known
    from aifactory_train.remote.connection import Connection

    remote = known.load(args.name)
    removed = False
    if not args.only_here:
        connection = Connection(remote)
        removed = bool(connection.ask("remove", runs=args.runs)["removed"])
        connection.close()
    known.forget(args.name)
    note(f"{args.name}: {'deleted there and ' if removed else ''}forgotten here")
    return {"name": args.name, "removed": removed}


def _list(args: argparse.Namespace) -> list[dict[str, Any]]:
    import dataclasses

    from aifactory_train.core.output import plain_table
    from aifactory_train.remote import known

    found = [dataclasses.asdict(known.load(name)) for name in known.names()]
    if not args.json and found:
        columns = ["name", "host", "site", "folder"]
        plain_table(columns, [[str(row[column] or "-") for column in columns] for row in found])
    return found
