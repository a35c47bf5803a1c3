"""``aifactory verify RUN``: is the record whole and unedited, and are the files still those it speaks of."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", help="name below runs/, or path of a run folder")
    parser.add_argument("--key", type=Path, metavar="PUBLIC.pub", help="public key that must have signed the manifest")
    parser.add_argument("--inputs", action="store_true", help="also read the base model's files and the data again")
    parser.add_argument("--json", action="store_true", help="print {ok, faults[]} as one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import EXIT_DONE, EXIT_FAILED
    from aifactory_train.core.output import print_json, table
    from aifactory_train.record.check import verify
    from aifactory_train.run.folder import open_run

    found = verify(open_run(args.name).path, key=args.key, inputs=args.inputs)
    if args.json:
        print_json(found)
        return EXIT_DONE if found["ok"] else EXIT_FAILED
    for note in found["notes"]:
        print(f"note: {note}")
    if found["ok"]:
        print(f"ok: {found['checked']['events']} events, {found['checked']['files']} files and the manifest's hold")
        return EXIT_DONE
    table(
        f"{len(found['faults'])} faults",
        ["kind", "where", "what"],
        [[f["kind"], f["where"], f["what"]] for f in found["faults"]],
    )
    return EXIT_FAILED
