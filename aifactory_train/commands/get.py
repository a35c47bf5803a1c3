"""``aifactory get RUN --on NAME``: bring a run home: record, report, logs, export; checkpoints on request."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="name of the run there, or its folder")
    parser.add_argument("--on", required=True, metavar="NAME", help="the remote: aifactory remote list")
    parser.add_argument("--to", type=Path, metavar="DIR", help="the folder here (default: runs/RUN)")
    parser.add_argument("--checkpoints", action="store_true", help="its checkpoints too")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.files import read_json, write_json
    from aifactory_train.core.output import note, print_json
    from aifactory_train.remote import known
    from aifactory_train.remote.calling import home_of
    from aifactory_train.remote.connection import Connection
    from aifactory_train.remote.transfer import pull

    target = args.to or home_of(args.folder)
    origin = target / ".remote.json"
    if target.exists() and any(target.iterdir()):
        mine = read_json(origin, {"remote": str, "run": str}) if origin.is_file() else {}
        if mine.get("remote") != args.on or Path(mine.get("run", "")).name != Path(args.folder).name:
            raise UserError("holds something else", where=str(target), fix="name a new folder: --to DIR")
    target.mkdir(parents=True, exist_ok=True)
    write_json(origin, {"remote": args.on, "run": args.folder})
    connection = Connection(known.load(args.on))
    place, changed, came = pull(connection, args.folder, target, checkpoints=args.checkpoints, say=note)
    if args.json:
        print_json({"run": place, "folder": str(target), "files": changed, "bytes": came})
    else:
        note(f"{target}: {len(changed)} file(s) new or changed, {came / 1e6:,.1f} MB came over")
    return 0
