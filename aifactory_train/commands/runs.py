"""``aifactory runs``: the runs of a folder, side by side, as a table or a page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="RUN", help="runs to compare (default: all below the folder)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), metavar="DIR", help="where runs lie (default: runs)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curves laid over each other")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.output import note, print_json, table
    from aifactory_train.report.compare import COLUMNS, compare_page, find_runs, row, short_base

    runs = find_runs(args.folder, args.names)
    rows = [row(r) for r in runs]
    if args.html:
        args.html.write_text(compare_page(runs, rows), encoding="utf-8")
        note(f"comparison: {args.html}")
    if args.json:
        print_json(rows)
        return 0
    shown = [[_text(short_base(r[key]) if key == "base" else r[key]) for key, _, _ in COLUMNS] for r in rows]
    right = tuple(i for i, (_, _, number) in enumerate(COLUMNS) if number)
    table("one run" if len(rows) == 1 else f"{len(rows)} runs", [label for _, label, _ in COLUMNS], shown, right=right)
    return 0


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
