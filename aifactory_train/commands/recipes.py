"""``aifactory recipes``: what can be trained, by sector; one recipe with everything resolved. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="show this recipe (id or path of a .yaml file)")
    parser.add_argument("--sector", help="only recipes of this sector")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="with RECIPE: change one value"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config import load_recipe, recipe_ids, to_tree
    from aifactory_train.errors import UserError, did_you_mean
    from aifactory_train.output import note, print_json, table

    if args.recipe:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.json:
            print_json({**summary(recipe), "recipe": to_tree(recipe)})
            return 0
        import yaml

        print(yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True, width=110), end="")
        return 0
    if args.overrides:
        raise UserError("--set needs a recipe to change", where="--set")
    rows = [summary(load_recipe(name)) for name in recipe_ids()]
    if args.sector:
        sectors = sorted({row["sector"] for row in rows})
        if args.sector not in sectors:
            raise UserError(
                f"no recipe of sector '{args.sector}'{did_you_mean(args.sector, sectors)}",
                where="--sector",
                fix=f"sectors: {', '.join(sectors)}",
            )
        rows = [row for row in rows if row["sector"] == args.sector]
    if args.json:
        print_json(rows)
        return 0
    table(
        None,
        ["recipe", "sector", "task", "metric", "runs here", "base models"],
        [
            [
                r["id"],
                r["sector"],
                r["task"],
                r["metric"],
                "yes" if r["embedded"] else "bring data",
                ", ".join(b["base"].partition("#")[0] for b in r["bases"]),
            ]
            for r in rows
        ],
    )
    note("aifactory fetch RECIPE, then aifactory train RECIPE")
    return 0


def summary(recipe: Any) -> dict[str, Any]:
    """One row of the list: ``{id, sector, task, metric, embedded, licences, bases, sites}``.

    ``embedded``: model and data come from packages, so the recipe runs without a hub account. ``sites``: ids of the factories
    and antennas that name the sector as a focus.
    """
    sources = [*recipe.data.train, *(recipe.data.eval or [])]
    return {
        "id": recipe.id,
        "sector": recipe.about.sector,
        "task": recipe.about.task,
        "metric": recipe.about.metric,
        "embedded": all(s.source.startswith(("pypi:", "npm:")) for s in sources)
        and recipe.model.base.startswith(("pypi:", "npm:")),
        "licences": {"model": recipe.model.licence, "data": sorted({s.licence for s in sources})},
        "bases": [
            {"base": recipe.model.base, "licence": recipe.model.licence},
            *({"base": o.base, "parameters": o.parameters, "licence": o.licence} for o in recipe.model.options),
        ],
        "sites": focus_sites(recipe.about.sector),
    }


def focus_sites(sector: str) -> list[str]:
    """Ids of the factories and antennas whose focus sectors hold ``sector``."""
    try:
        from aifactory_train.sites import members
    except ImportError:
        return []  # a reduced installation without the table of sites
    return [str(m["id"]) for m in members() if sector in m["sectors"]]
