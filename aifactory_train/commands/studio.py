"""``aifactory studio``: a local page from rows to a trained model, which shows the command for all that it does."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path("."), metavar="DIR", help="the folder to work in (default: this one)"
    )
    parser.add_argument("--port", type=int, default=8766, metavar="N", help="port on 127.0.0.1 (0: any free one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import note

    if not args.folder.is_dir():
        raise UserError("no such folder", where=f"--folder {args.folder}")
    try:
        from aifactory_train.studio import server
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn", "h11", "anyio"):
            raise
        fix = "pip install 'aifactory-train[studio]'"
        raise UserError(f"the studio needs the package '{package}'", where="studio", fix=fix) from None
    studio = server.StudioServer(args.folder, args.port)
    print(studio.address, flush=True)
    note(f"works in {args.folder.resolve()}; who has this address can use it as you; Ctrl-C ends it, and no training")
    tidy = None if args.no_browser else server.open_browser(studio.address)
    try:
        studio.serve()
    except KeyboardInterrupt:
        note("stopped")
    finally:
        if tidy is not None:
            tidy()
    return 0
