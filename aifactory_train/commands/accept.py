"""``aifactory accept``: whether this machine trains as it should, check by check, in less than ten minutes."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import EXIT_DONE, RunFailed, UserError, did_you_mean

OUT = "acceptance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the checks of most value, in less than three minutes")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument(
        "--out", type=Path, default=Path(OUT), metavar="DIR", help=f"acceptance.json, page and logs (default: {OUT}/)"
    )
    parser.add_argument(
        "--site", metavar="S", help="the profile whose facts are compared (default: the known system that this is)"
    )
    parser.add_argument(
        "--check", action="append", default=[], metavar="NAME", help="only this check (may be repeated)"
    )
    parser.add_argument("--list", action="store_true", help="the checks, what each shows and its time limit")
    # What the batch script adds for every program of a rank.
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attempt", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", type=float, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from aifactory_train.acceptance.checks import BY_NAME, CHECKS

    for name in args.check:
        if name not in BY_NAME:
            raise UserError(
                f"no check '{name}'{did_you_mean(name, BY_NAME)}", where="--check", fix=f"one of {', '.join(BY_NAME)}"
            )
    checks = [check for check in CHECKS if not args.check or check.name in args.check]
    if args.list:
        return _list(checks, args)
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "torch is not installed here, and an acceptance is about nothing else",
            fix="run it in the environment that trains (aifactory env), or as a job: launch --accept --site S",
        )
    if args.run_dir is not None and args.attempt is not None:
        return _as_attempt(args, checks)
    return _accept(args, checks)


def _list(checks: list[Any], args: argparse.Namespace) -> int:
    from aifactory_train.core import output

    if args.json:
        output.print_json([{"name": c.name, "shows": c.shows, "limit_s": c.limit(args.quick)} for c in checks])
        return EXIT_DONE
    rows = [[c.name, c.shows, f"{c.limit(args.quick)} s"] for c in checks if c.quick or not args.quick]
    output.table(None, ["check", "shows", "at most"], rows, right=(2,))
    return EXIT_DONE


def _as_attempt(args: argparse.Namespace, checks: list[Any]) -> int:
    """In a job: an attempt of a run folder like any other, so that ``status`` and ``logs`` tell about it."""
    from aifactory_train.run.folder import RunFolder
    from aifactory_train.run.outcome import Attempt

    folder = RunFolder(args.run_dir)
    with Attempt(folder, 0, 0, args.attempt, timeout_s=3600, device="alone") as record:
        record.training = True
        record.running(0)
        record.beat(0, "accept")
        code = _accept(args, checks, record)
        record.set_state("finished", step=0)
        record.code = code
    return code


def _accept(args: argparse.Namespace, checks: list[Any], record: Any = None) -> int:
    from aifactory_train.acceptance import page
    from aifactory_train.acceptance.running import Acceptance
    from aifactory_train.core import output
    from aifactory_train.core.files import write_json

    system = _site(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", where=f"--out {args.out}") from None
    number = 0

    def say(result: dict[str, Any]) -> None:
        nonlocal number
        number += 1
        if record is not None:
            record.beat(number, result["name"])
        text = f" {result['why']}" if result["why"] else ""
        output.note(f"{result['status']}  {result['name']:<18} {result['seconds']:6.1f} s {text}")

    acceptance = Acceptance(args.out.resolve(), args.quick, system.id if system else None, say=say)
    acceptance.run(checks)
    found = page.summary(acceptance, system)
    write_json(args.out / "acceptance.json", found)
    page.write(args.out / "acceptance.html", found)
    if args.json:
        output.print_json(found)
    else:
        _tell(found, args.out)
    failed = [result["name"] for result in found["checks"] if result["status"] == "FAIL"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(found['checks'])} checks failed: {', '.join(failed)}",
            where=str(args.out),
            fix="docs/acceptance.md says what each means; the logs are beside the page",
        )
    return EXIT_DONE


def _site(args: argparse.Namespace) -> Any:
    """The profile to compare with: the one asked for, the job's, or the known system that we are on; None: unknown."""
    from aifactory_train import sites
    from aifactory_train.core.output import note

    if args.site:
        return sites.load(args.site) if args.site != "local" else None
    try:
        name = os.environ.get("AIFACTORY_SITE") or sites.identify()
        return sites.load(name) if name and name != "local" else None
    except UserError as error:
        note(f"no profile is compared: {error.what}")
        return None


def _tell(found: dict[str, Any], out: Path) -> None:
    from aifactory_train.core import output

    totals = found["totals"]
    for row in found["facts"]:
        if row["verdict"] == "contradicted":
            output.note(f"{found['site']}: {row['fact']} is {row['observed']} here ({row['by']}), the profile says "
                        f"{row['profile']}")  # fmt: skip
    print(
        f"{totals['PASS']} passed, {totals['FAIL']} failed, {totals['SKIP']} left out in {totals['seconds']:.0f} s: "
        f"{out / 'acceptance.html'}"
    )
