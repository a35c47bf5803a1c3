"""``aifactory usage``: what a project used, against its award; from ``sacct``, or from run records without one."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError

EPILOG = """\
  aifactory usage --project project_465000000 --site lumi-g --award 5000 --end 2027-03-31
  aifactory usage --records --folder runs                      # from the run folders, without Slurm
  aifactory usage --project P --report final.md --html usage.html --anonymous figures.json

docs/usage.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--project", metavar="P", help="Slurm account, all its users; default: your overlay's, else you"
    )
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, default=Path("runs"), help="where runs lie (default: runs)"
    )
    parser.add_argument("--site", metavar="S", help="whose rates bill the hours; default: this machine, if it is known")
    parser.add_argument("--site-file", metavar="FILE", type=Path, help="overlay with corrections and your own values")
    parser.add_argument("--from", dest="since", metavar="DATE", help="first day (default: a year ago)")
    parser.add_argument("--to", dest="until", metavar="DATE", help="last day (default: today)")
    parser.add_argument("--award", metavar="N", type=float, help="what was granted; default: your overlay's budget")
    parser.add_argument("--unit", metavar="U", help="its unit (default: the site's, else GPU-hours)")
    parser.add_argument("--end", metavar="DATE", help="the day on which the award ends")
    parser.add_argument("--records", action="store_true", help="count the run folders, also where there is a sacct")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page")
    parser.add_argument("--report", metavar="FILE", type=Path, help="also draft a final report (Markdown)")
    parser.add_argument(
        "--anonymous", metavar="FILE", type=Path, help="also write the figures that name nobody (.json or .html)"
    )


def run(args: argparse.Namespace) -> int:
    from aifactory_train.advice import usage_report
    from aifactory_train.core.output import note, print_json

    answer, runs = build(args)
    for path, text in (
        (args.html, lambda: usage_report.page(answer)),
        (args.report, lambda: usage_report.final_report(answer, runs)),
        (args.anonymous, lambda: usage_report.anonymous(answer, args.anonymous)),
    ):
        if path:
            usage_report.write(path, text())
            note(f"written: {path}")
    if args.json:
        print_json(answer)
    else:
        usage_report.show(answer)
    return 0


def build(args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """``(the answer as plain values, the runs of the folder)``."""
    import getpass

    from aifactory_train.advice import sacct
    from aifactory_train.advice.usage import from_records, runs_below, summarise_use

    today = datetime.date.today()
    until = _day(args.until, "--to") if args.until else None
    since = _day(args.since, "--from") if args.since else today - datetime.timedelta(days=365)
    if until is not None and until < since:
        raise UserError(f"{until} is before {since}", where="--to")
    system = _system(args)
    award = _award(args, system)
    runs = runs_below(args.folder)
    project = args.project or (system.user.account if system else None)
    uses = None if args.records else sacct.ask(since, until, project, None if project else getpass.getuser())
    source = "sacct"
    if uses is None:
        if args.project:
            fix = "run it on a login node; --records without --project counts the run folders"
            raise UserError("without sacct nobody can tell the hours of a project", where="--project", fix=fix)
        if not runs:
            fix = "run it on a login node, or name the folder of your runs with --folder"
            raise UserError("there is no sacct here, and no run", where=str(args.folder), fix=fix)
        uses, source = from_records(runs, since, until), "records"
    return summarise_use(uses, runs, source, since, until or today, system, award), runs


def _system(args: argparse.Namespace) -> Any:
    from aifactory_train import sites

    name = args.site or sites.identify()
    return sites.load(name, overlay=args.site_file or None) if name else None


def _award(args: argparse.Namespace, system: Any) -> Any:
    """The award of the command line, else the budget of the overlay."""
    from aifactory_train.advice.usage import GrantedHours

    end = _day(args.end, "--end") if args.end else None
    site_unit = system.accounting.unit if system else None
    units = list(dict.fromkeys(u for u in ("GPU-hours", "node-hours", site_unit) if u))
    if args.unit is not None and args.unit not in units:
        raise UserError(f"hours cannot be counted in '{args.unit}'", where="--unit", fix=f"one of {', '.join(units)}")
    if args.award is not None:
        if not 0 < args.award < float("inf"):
            raise UserError("must be a positive number", where="--award")
        return GrantedHours(args.award, args.unit or site_unit or "GPU-hours", end)
    if system is not None and system.user.site_budget and site_unit:
        return GrantedHours(system.user.site_budget, site_unit, end)
    if system is not None and system.user.budget_gpu_hours:
        return GrantedHours(system.user.budget_gpu_hours, "GPU-hours", end)
    if args.unit or end:
        raise UserError("there is no award", where="--unit" if args.unit else "--end", fix="--award N")
    return None


def _day(text: str, option: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"'{text}' is no day", where=option, fix="a date such as 2027-03-31") from None
