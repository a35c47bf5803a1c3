"""``aifactory logs``: show or follow the logs of a run."""

from __future__ import annotations

import argparse
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, or its name below runs/")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as the log grows, until the run ends")
    parser.add_argument("--attempt", type=int, metavar="N", help="an earlier attempt")
    parser.add_argument("--rank", type=int, action="append", metavar="R", help="rank, repeatable (default: the lowest)")
    parser.add_argument("--batch", action="store_true", help="the log of the batch shell instead")
    parser.add_argument("-n", "--lines", type=int, default=None, metavar="N", help="only the last N lines")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.output import note
    from aifactory_train.launchers.attempts import LIVE
    from aifactory_train.launchers.follow import open_folder, status_of
    from aifactory_train.launchers.logs import log_files

    folder = open_folder(args.folder)

    def files():
        if args.batch:
            return sorted((folder / "logs").glob("*.out"), key=lambda p: p.stat().st_mtime)[-1:]
        return log_files(folder, args.attempt, args.rank)

    shown: dict = {}
    last_state = 0.0
    while True:
        current = files()
        for path in current:
            if path not in shown:
                if len(current) > 1 or shown:
                    print(f"==> {path} <==", flush=True)
                text = path.read_bytes()
                shown[path] = len(text)
                lines = text.decode(errors="replace").splitlines(keepends=True)
                sys.stdout.write("".join(lines[-args.lines :] if args.lines else lines))
                continue
            with open(path, "rb") as file:
                file.seek(shown[path])
                data = file.read()
            shown[path] += len(data)
            sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()
        if not args.follow:
            if not shown:
                note(
                    "no log: a run that a launcher started writes one when it begins, 'aifactory train' writes to its "
                    "terminal"
                )
            return 0
        if time.time() - last_state > 10:
            last_state = time.time()
            if status_of(folder)["state"] not in LIVE:
                if getattr(args, "_ended", False):
                    return 0
                args._ended = True  # one more round for what was written last
                last_state = 0.0
        time.sleep(0.5)
