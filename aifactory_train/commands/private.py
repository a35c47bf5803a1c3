"""``aifactory private``: keys, encryption, permission checks, and the question whether a text was trained on."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    key = actions.add_parser("key", help="make an age identity (keep it) and print its recipient (give it away)")
    key.add_argument("out", type=Path, metavar="FILE")

    encrypt = actions.add_parser("encrypt", help="encrypt data files; the plain ones stay where they are")
    encrypt.add_argument("files", nargs="+", type=Path, metavar="FILE")
    encrypt.add_argument("--to", action="append", required=True, metavar="RECIPIENT", help="age1..., repeatable")
    encrypt.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the encrypted files (default: beside the plain ones)"
    )

    decrypt = actions.add_parser("decrypt", help="decrypt a file, such as an adapter, to a named place")
    decrypt.add_argument("file", type=Path, metavar="FILE")
    decrypt.add_argument("--identity", type=Path, required=True, metavar="FILE")
    decrypt.add_argument("--out", type=Path, required=True, metavar="FILE")

    check = actions.add_parser("check", help="who else can read these paths")
    check.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    check.add_argument("--json", action="store_true", help="one line of JSON")

    asked = actions.add_parser(
        "was-in", help="was this row or text among a run's training rows (read from standard input)"
    )
    asked.add_argument("name", metavar="RUN")
    asked.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    return {"key": _key, "encrypt": _encrypt, "decrypt": _decrypt, "check": _check, "was-in": _was_in}[args.action](
        args
    )


def _key(args: argparse.Namespace) -> int:
    from aifactory_train.private.vault import make_identity

    print(
        f"identity: {args.out} (mode 600; keep it outside the project's folders)\nrecipient: {make_identity(args.out)}"
    )
    return 0


def _encrypt(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import UserError
    from aifactory_train.private.sealed_file import SealedWriter
    from aifactory_train.private.vault import sealed

    for path in args.files:
        if not path.is_file():
            raise UserError("no such file", where=str(path))
        target = sealed(path if args.out is None else args.out / path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with SealedWriter(target, args.to) as out, open(path, "rb") as file:
            while piece := file.read(1 << 20):
                out.write(piece)
        target.chmod(0o600)
        print(target)
    return 0


def _decrypt(args: argparse.Namespace) -> int:
    import os

    from aifactory_train.core.errors import UserError
    from aifactory_train.private.vault import Vault

    content = Vault.from_identity(args.identity).read(args.file)
    try:
        handle = os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError("exists already", where=str(args.out)) from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    print(args.out)
    return 0


def _check(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import print_json
    from aifactory_train.private.permissions import exposures

    found = []
    for path in args.paths:
        if not path.exists():
            raise UserError("no such path", where=str(path))
        found += exposures(path)
    if args.json:
        print_json([{"path": e.path, "who": e.who, "how": e.how, "fix": e.fix} for e in found])
    for exposure in [] if args.json else found:
        print(f"{exposure}\n  fix: {exposure.fix}")
    if not found and not args.json:
        print("nobody but you can read these paths")
    return 1 if found else 0


def _was_in(args: argparse.Namespace) -> int:
    import sys

    from aifactory_train.core.output import print_json
    from aifactory_train.private.rows import FILE, parse_row, was_in
    from aifactory_train.run.folder import open_run

    # From standard input: the text itself must not stand on a command line.
    answer = was_in(open_run(args.name).path / FILE, parse_row(sys.stdin.read().strip()))
    if args.json:
        print_json({"was_in": answer})
    else:
        print(
            "yes: this text was among the training rows" if answer else "no: this text was not among the training rows"
        )
    return 0
