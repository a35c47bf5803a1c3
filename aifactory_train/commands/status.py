"""``aifactory status``: state, attempts and cause of a run."""

from __future__ import annotations

import argparse
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, or its name below runs/")
    parser.add_argument("--offline", action="store_true", help="look at the files only, do not ask the scheduler")
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON: state, attempts[], cause{rank,node,kind,message}"
    )


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.output import print_json, table
    from aifactory_train.launchers.follow import open_folder, status_of

    found = status_of(open_folder(args.folder), ask=not args.offline)
    if args.json:
        print_json(found)
        return 0
    print(f"{found['run']}: {found['state']}")
    if found.get("pending_reason"):
        print(f"waits: {found['pending_reason']}")
    cause = found["cause"]
    if cause:
        where = ("" if cause["rank"] is None else f" rank {cause['rank']}") + (
            f" on {cause['node']}" if cause["node"] else ""
        )
        print(f"cause: {cause['kind']}{where}: {cause['message']}")
    rows = []
    for a in found["attempts"]:
        steps = "" if a["step_from"] is None else f"{a['step_from']} → {'' if a['step_to'] is None else a['step_to']}"
        began = time.strftime("%m-%d %H:%M:%S", time.localtime(a["started"])) if a["started"] else ""
        rows.append(
            [
                f"{a['task']}/{a['number']}" if "task" in a else a["number"],
                a["state"],
                a["job"],
                " ".join(a["nodes"][:4]) + (" …" if len(a["nodes"]) > 4 else ""),
                began,
                steps,
                a["why"] or (a["cause"] or {}).get("message", ""),
            ]
        )
    if rows:
        table(None, ["attempt", "state", "job", "nodes", "began", "checkpoints", "then"], rows)
    if found["gpu_hours"]:
        energy = f", {found['energy_kwh']} kWh" if found.get("energy_kwh") else ""
        print(f"GPU-hours: {found['gpu_hours']:.3f}{energy}")
    return 0
