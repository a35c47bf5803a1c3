"""``aifactory scale``: measure strong and weak scaling at a site, under a hard cap of GPU-hours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aifactory_train.commands.arguments import add_overrides
from aifactory_train.core.errors import UserError

EPILOG = """\
  aifactory scale my.yaml --site lumi-g --nodes 1,2,4,8 --repeats 3 --cap 100             # shows jobs, cap and lines
  aifactory scale my.yaml --site lumi-g --nodes 1,2,4,8 --repeats 3 --cap 100 --submit
  aifactory scale runs/scale-my-lumi-g                                                  # table and plot, afterwards

docs/access.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE|FOLDER", help="what to measure; or the folder of a campaign to read")
    parser.add_argument("--site", metavar="S", help="where to measure")
    parser.add_argument("--site-file", metavar="FILE", type=Path, help="overlay with corrections and your own values")
    parser.add_argument("--account", metavar="A", help="default: your overlay's")
    parser.add_argument("--nodes", metavar="N,N", default="1,2,4", help="numbers of nodes (default 1,2,4)")
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--steps", metavar="N", type=int, default=25, help="steps of a run (default 25)")
    parser.add_argument("--cap", metavar="GPU_H", type=float, help="GPU-hours that all together may take")
    parser.add_argument("--tokens", metavar="N", type=float, help="tokens of an epoch; default: from the prepared data")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="default: runs/scale-RECIPE-SITE")
    add_overrides(parser)
    parser.add_argument("--submit", action="store_true", help="write the campaign and submit its jobs")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.advice.campaign import CAMPAIGN

    folder = Path(args.recipe)
    if (folder / CAMPAIGN).is_file():
        return _read(folder, args.json)
    return _plan(args)


def _plan(args: argparse.Namespace) -> int:
    from aifactory_train import sites
    from aifactory_train.advice import campaign
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.output import note, plain_table, print_json

    for name in ("site", "cap"):
        if getattr(args, name) is None:
            raise UserError("is needed to measure a recipe", where=f"--{name}", fix="aifactory scale --help")
    if not 0 < args.cap < float("inf"):
        raise UserError("must be a positive number", where="--cap")
    if args.repeats < 1 or args.steps <= campaign.WARM_UP:
        what = f"at least one repeat, and more than the {campaign.WARM_UP} steps that are not counted"
        raise UserError(what, where="--repeats" if args.repeats < 1 else "--steps")
    nodes = campaign.node_counts(args.nodes)
    recipe = load_recipe(args.recipe, list(args.overrides))
    system = sites.load(args.site, overlay=args.site_file or None)
    given = tuple(args.overrides)
    jobs = campaign.jobs_of(recipe, system, nodes, args.repeats, args.steps, args.tokens, given)
    most = campaign.check_cap(jobs, args.cap)
    folder = args.folder or Path("runs") / f"scale-{recipe.id.replace('/', '-')}-{system.id}"
    more = ["--site-file", str(args.site_file)] if args.site_file else []
    more += ["--account", args.account] if args.account else []
    lines = campaign.lines_of(jobs, args.recipe, args.site, folder, more)
    if args.submit:
        campaign.write_campaign(folder, recipe.id, system.id, jobs, args.cap, args.steps)
        for job in jobs:
            _launch(job.words(args.recipe, args.site, folder, more), job.name)
    if args.json:
        listed = [
            {"name": j.name, "kinds": j.kinds, "nodes": j.nodes, "gpu_hours_most": j.gpu_hours_most} for j in jobs
        ]
        print_json({"folder": str(folder), "gpu_hours_most": most, "cap": args.cap, "jobs": listed, "lines": lines})
        return 0
    rows = []
    for job in jobs:
        most_here = f"{job.gpu_hours_most:,.1f}"
        rows.append(["+".join(job.kinds), str(job.nodes), str(job.repeats), f"{job.limit_s // 60} min", most_here])
    plain_table(["scaling", "nodes", "runs", "limit each", "GPU-hours at most"], rows)
    print(f"together at most {most:,.1f} GPU-hours of {args.cap:,.1f}")
    if args.submit:
        note(f"submitted; afterwards: aifactory scale {folder}")
    else:
        print("\nto submit: the same with --submit, which runs")
        print("\n".join(f"  {line}" for line in lines))
    return 0


def _launch(words: list[str], name: str) -> None:
    """Submit one job; the campaign ends where one is refused, and says so."""
    from aifactory_train.commands import launch

    parser = argparse.ArgumentParser(prog="aifactory launch", allow_abbrev=False)
    launch.add_arguments(parser)
    try:
        code = launch.run(parser.parse_args(words[1:]))
    except UserError as error:
        raise UserError(
            f"{name} was not submitted, nor what follows it: {error.what}", where=error.where, fix=error.fix
        ) from None
    if code:
        raise UserError(f"{name} was not submitted, nor what follows it (exit code {code})", where="--submit")


def _read(folder: Path, json: bool) -> int:
    """Table and plot of a campaign; ``scaling.json`` and ``scaling.html`` beside it."""
    from aifactory_train.advice import campaign
    from aifactory_train.advice.scaling import page
    from aifactory_train.core.files import write_json
    from aifactory_train.core.output import note, plain_table, print_json

    measured, missing = campaign.collect(folder)
    write_json(folder / campaign.MEASURED, measured)
    (folder / "scaling.html").write_text(page(measured), encoding="utf-8")
    for name in missing:
        note(f"note: {name} has measured nothing yet")
    note(f"written: {folder / campaign.MEASURED}, {folder / 'scaling.html'}")
    answer: dict[str, Any] = {**measured, "missing": missing}
    if json:
        print_json(answer)
        return 0
    rows = []
    for p in measured["points"]:
        counts = [p["kind"], str(p["nodes"]), str(p["gpus"]), str(p["repeats"])]
        rows.append([*counts, f"{p['tokens_per_s']:,.0f}", f"{p['spread']:.1%}", f"{p['efficiency']:.0%}"])
    plain_table(["scaling", "nodes", "GPUs", "runs", "tokens/s", "spread", "efficiency"], rows)
    return 0
