"""``--on NAME``: the same command line, run there by the same program; its output and its exit code are ours."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import EXIT_FAILED, EXIT_REFUSED, RunFailed, UserError
from aifactory_train.core.output import note
from aifactory_train.remote import known
from aifactory_train.remote.connection import PAUSES, Connection, Cut, Refused
from aifactory_train.remote.known import Remote

if TYPE_CHECKING:
    import argparse

#: Stands for the one folder there in words of a command line; the other end puts it in.
THERE = "\0folder"
#: What commands find there unless the user's shell says otherwise: everything stays in the one folder.
DEFAULTS = {"AIFACTORY_CACHE": "{folder}/cache"}


def without_on(argv: list[str]) -> list[str]:
    """The command line as it is run there. What stands behind ``--`` is no option."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            return [*out, word, *words]
        if word == "--on":
            next(words, None)
        elif not word.startswith("--on="):
            out.append(word)
    return out


def call(args: argparse.Namespace, argv: list[str]) -> int:
    """Run a command at the remote ``args.on``; returns its exit code."""
    remote = known.load(args.on)
    connection = Connection(remote)
    words = without_on(argv)
    _refuse_what_stays_there(args, words)
    if args.command in ("launch", "fetch", "env"):
        from aifactory_train.remote import sending

        if args.command == "launch":
            return _launch(connection, args, words)
        words = sending.prepared(connection, args, words)
    return here_as_there(connection, words, live=bool(getattr(args, "follow", False)), env=_secrets(args.command))


def _refuse_what_stays_there(args: argparse.Namespace, words: list[str]) -> None:
    for flag in ("serve", "html", "output", "bundle"):
        if getattr(args, flag, None):
            fix = f"bring it home: aifactory get RUN --on {args.on}" if flag in ("serve", "html") else "leave it out"
            raise UserError("writes or serves at the site, where you would not see it", where=f"--{flag}", fix=fix)


def _secrets(command: str) -> dict[str, str]:
    """A token for the hub goes to the one command that asks the network, in its environment, and is kept nowhere."""
    return {name: os.environ[name] for name in ("HF_TOKEN",) if command == "fetch" and name in os.environ}


def _request(remote: Remote, words: list[str], env: dict[str, str]) -> dict[str, Any]:
    return {
        "argv": words,
        "env": {**env, "COLUMNS": str(_columns())},
        "work": remote.work,
        "defaults": _defaults(remote),
    }


def _defaults(remote: Remote) -> dict[str, str]:
    return {} if remote.work else DEFAULTS  # a site file's work_dir has caches of its own


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((110, 24)).columns


def _show(stream: Any, data: bytes) -> None:
    stream.write(data.decode(errors="replace"))
    stream.flush()


def here_as_there(connection: Connection, words: list[str], *, live: bool, env: dict[str, str]) -> int:
    """Run a command that may be run twice. ``live``: show its output as it comes; else it is shown whole, once."""
    for pause in (*PAUSES, None):
        shown: list[bytes] = []
        try:
            with connection.asking("run", **_request(connection.remote, words, env)) as channel:
                for kind, data in channel.frames():
                    if kind == "x":
                        _show(sys.stdout, b"".join(shown))
                        return int(data)
                    if kind == "e" or live:
                        _show(sys.stderr if kind == "e" else sys.stdout, data)
                    else:
                        shown.append(data)
        except Cut as error:
            if live or pause is None:
                raise RunFailed(error.what, where=error.where, fix="ask again") from None
            time.sleep(pause)
        except Refused as error:
            raise _lacking(connection.remote, error) from None
    return EXIT_FAILED


def _lacking(remote: Remote, error: Refused) -> UserError:
    if error.what == "needs-install":
        return UserError(
            "the program is not installed there", where=remote.name, fix=f"aifactory remote check {remote.name}"
        )
    return error


def _launch(connection: Connection, args: argparse.Namespace, words: list[str]) -> int:
    from aifactory_train.remote import install, sending

    words = sending.prepared(connection, args, words)
    install.install(connection, folder=None, download=False, say=note)
    token = args.token or secrets.token_hex(8)
    if args.token is None:
        words = ["launch", "--token", token, *words[1:]]
    note(f"token {token}: after a cut the same command with --token {token} finds this launch")
    code = once_only(connection, words, token)
    if code == EXIT_REFUSED:
        name = connection.remote.name
        note(f"paths above are {name}'s; commands that it names run from here with --on {name} and your own file")
    return code


def once_only(connection: Connection, words: list[str], token: str) -> int:
    """Run a command that must not be run twice: the other end runs it once for the token, and tells how it goes from
    where we stopped listening."""
    heard = {"o": 0, "e": 0}
    for pause in (*PAUSES, None):
        try:
            request = {**_request(connection.remote, words, {}), "token": token}
            with connection.asking("once", out=heard["o"], err=heard["e"], **request) as channel:
                for kind, data in channel.frames():
                    if kind == "x":
                        return int(data)
                    heard[kind] += len(data)
                    _show(sys.stdout if kind == "o" else sys.stderr, data)
        except Cut as error:
            if pause is None:
                fix = f"the same command with --token {token} finds what was begun"
                raise RunFailed(error.what, where=error.where, fix=fix) from None
            time.sleep(pause)
        except Refused as error:
            raise _lacking(connection.remote, error) from None
        except KeyboardInterrupt:
            note(f"it goes on at {connection.remote.host}; aifactory stop RUN --on {connection.remote.name} ends it")
            return 130
    return EXIT_FAILED


def home_of(name: str) -> Path:
    """Where ``get`` puts a run of this name."""
    return Path("runs") / Path(name).name
