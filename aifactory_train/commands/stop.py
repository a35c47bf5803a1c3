"""``aifactory stop``: ask a run to save and stop, or cancel it."""

from __future__ import annotations

import argparse
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, or its name below runs/")
    parser.add_argument("--cancel", action="store_true", help="end the job now, without a last save")
    parser.add_argument("--wait", type=float, default=0, metavar="S", help="wait so long for the run to end")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import RunFailed
    from aifactory_train.core.output import note, print_json
    from aifactory_train.launchers.attempts import LIVE
    from aifactory_train.launchers.follow import open_folder, status_of
    from aifactory_train.launchers.stopping import stop

    folder = open_folder(args.folder)
    reported = stop(folder, cancel=args.cancel)
    end = time.time() + args.wait
    state = reported["state"]
    while args.wait and state in LIVE and time.time() < end:
        time.sleep(1)
        state = status_of(folder)["state"]
    reported["state"] = state
    if args.json:
        print_json(reported)
    else:
        note(
            "cancelled"
            if args.cancel
            else "asked to save and stop at the next step" + (f"; the run is {state}" if args.wait else "")
        )
    if args.wait and state in LIVE:
        raise RunFailed(
            f"the run is still {state} after {args.wait:g} s",
            where=str(folder),
            fix="--cancel ends it without a last save",
        )
    return 0
