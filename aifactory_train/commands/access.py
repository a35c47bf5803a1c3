"""``aifactory access``: the technical part of an application, drafted from the plan. Needs no GPU, torch, network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aifactory_train.commands.arguments import add_overrides, add_size
from aifactory_train.core.errors import UserError, did_you_mean

EPILOG = """\
  aifactory access health/phenotype-terms --route playground                    # to standard output, at the first site
  aifactory access my.yaml --route regular --site lumi-g --nodes 4 --runs 10 --out annex.docx --out annex.md

Each field says 'from the plan', 'measured' or 'MISSING (who)'; nothing is invented. docs/access.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="id such as health/phenotype-terms, or a YAML file")
    parser.add_argument("--route", metavar="R", required=True, help="playground, fast-lane, large-scale, regular, …")
    parser.add_argument("--site", metavar="S", help="default: the first that 'aifactory where' gives for the route")
    parser.add_argument("--site-file", metavar="FILE", type=Path, help="overlay with corrections and your own values")
    parser.add_argument("--nodes", metavar="N", default="auto", help="nodes of a job, or 'auto' (default)")
    parser.add_argument("--gpus-per-node", metavar="N", type=int, help="default: all of a node")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="how often the job is to be run (default 1)")
    add_size(parser)
    parser.add_argument("--scaling", metavar="FILE", type=Path, help="scaling.json of a measured 'aifactory scale'")
    parser.add_argument("--form", metavar="FILE", type=Path, help="the questions of a call's own form, as YAML")
    add_overrides(parser)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, action="append", default=[], help=".md, .docx or .json; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="the draft as one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.advice.documents import counted, markdown, write
    from aifactory_train.core.output import note, print_json

    annex = build(args)
    for path in args.out:
        write(annex, path)
        note(f"written: {path}")
    if args.json:
        print_json(annex)
    elif not args.out:
        print(markdown(annex))
    if annex["note"]:
        note(annex["note"])
    note(f"{counted(annex)} for {annex['route']} at {annex['site']}")
    return 0


def build(args: argparse.Namespace) -> dict[str, Any]:
    """The annex as plain values (:func:`aifactory_train.advice.annex.draft`)."""
    from aifactory_train import sites
    from aifactory_train.advice.annex import draft, form_for
    from aifactory_train.advice.said import Case
    from aifactory_train.advice.scaling import read_measured
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.planning import keys_set, plan_for
    from aifactory_train.planning.size import newest_report
    from aifactory_train.sites.access import access_file

    routes = access_file().routes
    if args.route not in routes:
        raise UserError(
            f"no route '{args.route}'{did_you_mean(args.route, routes)}",
            where="--route",
            fix=f"one of {', '.join(routes)}",
        )
    if args.runs < 1:
        raise UserError("at least one run", where=f"--runs {args.runs}")
    if args.tokens is not None and not 0 < args.tokens < float("inf"):
        raise UserError("must be a positive number", where="--tokens")
    chosen = form_for(args.route, args.form)
    recipe = load_recipe(args.recipe, list(args.overrides))
    scaling = read_measured(args.scaling) if args.scaling else None
    name = args.site or _first_site(args, recipe)
    system = sites.load(name, overlay=args.site_file or None)
    _refuse_other_sites(args.route, system)
    given = keys_set(args.overrides)
    plan, job = plan_for(
        recipe,
        system,
        _nodes(args.nodes),
        gpus_per_node=args.gpus_per_node,
        partition=system.user.partition,
        tokens=args.tokens,
        model_config=args.model_config,
        given=given,
    )
    kept = newest_report(recipe)
    report = (kept[0], kept[1]) if kept else None
    return draft(Case(recipe, system, args.route, plan, job, args.runs, report, scaling), chosen)


def _first_site(args: argparse.Namespace, recipe: Any) -> str:
    """The best site of the ranking to which the route leads."""
    from aifactory_train.advice.routes import Applicant
    from aifactory_train.advice.sizing import Demand
    from aifactory_train.advice.where import Wishes, rank
    from aifactory_train.planning import keys_set

    demand = Demand.of(recipe, args.tokens, args.model_config, keys_set(args.overrides))
    wishes = Wishes(Applicant(), sensitive=recipe.privacy.profile != "open")
    for row in rank(demand, wishes):
        if row["fits"] and any(route["id"] == args.route for route in row["access"]):
            return str(row["id"])
    raise UserError(
        f"the route '{args.route}' leads to no site that this job fits",
        where="--route",
        fix="'aifactory where RECIPE' tells why; --site S drafts for a site all the same",
    )


def _refuse_other_sites(route: str, system: Any) -> None:
    from aifactory_train.advice.routes import leads_to
    from aifactory_train.sites.access import access_file

    routes = access_file().routes
    if not leads_to(routes[route], system):
        ways = [key for key, known in routes.items() if leads_to(known, system)]
        raise UserError(
            f"{routes[route].name} gives no hours on {system.name}", where="--route", fix=f"one of {', '.join(ways)}"
        )


def _nodes(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError("a number of nodes from 1, or 'auto'", where=f"--nodes {text}")
    return int(text)
