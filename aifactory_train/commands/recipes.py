"""``aifactory recipes``: what can be trained, by sector; one recipe with everything resolved. Imports no torch."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from aifactory_train.commands.arguments import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="show this recipe (id or path of a .yaml file); 'new' makes one")
    parser.add_argument("--sector", help="only recipes of this sector")
    parser.add_argument("--site", help="only recipes of the sectors that this factory, antenna or system focuses on")
    add_overrides(parser, "with RECIPE: change one value")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.loading import load_recipe, to_tree
    from aifactory_train.core import yaml_text
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import note, print_json, table

    if args.recipe:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.json:
            print_json({**summary(recipe), "recipe": to_tree(recipe)})
            return 0
        print(yaml_text.dump(to_tree(recipe), width=110), end="")
        return 0
    if args.overrides:
        raise UserError("--set needs a recipe to change", where="--set")
    rows = chosen(listed(), args.sector, args.site)
    if args.json:
        print_json(rows)
        return 0
    table(
        None,
        ["recipe", "task", "metric", "runs here", "data licence"],
        [
            [
                r["id"],
                r["task"],
                r["metric"].replace("_", " "),
                "yes" if r["embedded"] else "bring data",
                ", ".join(r["licences"]["data"]),
            ]
            for r in rows
        ],
    )
    note("aifactory recipes RECIPE shows one; aifactory fetch RECIPE, then aifactory train RECIPE")
    return 0


def listed() -> list[dict[str, Any]]:
    """One row a recipe, see :func:`summary`. The files are read without validation, which the tests and every other
    command do.
    """
    from aifactory_train.config.loading import RECIPES_DIR, recipe_ids
    from aifactory_train.core import yaml_text

    rows = []
    for name in recipe_ids():
        tree = yaml_text.read(RECIPES_DIR / f"{name}.yaml").value
        about, model, data = tree["about"], tree["model"], tree["data"]
        sources = [*_list(data["train"]), *_list(data.get("eval") or [])]
        rows.append(
            _row(
                tree.get("id", name),
                (about["sector"], about["task"], about["metric"]),
                [(s["source"], s.get("licence", "unknown")) for s in sources],
                (model["base"], model.get("licence", "unknown")),
                [(o["base"], o["parameters"], o["licence"]) for o in model.get("options") or []],
            )
        )
    return rows


def summary(recipe: Any) -> dict[str, Any]:
    """One row of the list: ``{id, sector, task, metric, embedded, licences, bases, sites}``.

    ``embedded``: model and data come from packages, so the recipe runs without a hub account. ``sites``: ids of the
    factories and antennas that name the sector as a focus.
    """
    return _row(
        recipe.id,
        (recipe.about.sector, recipe.about.task, recipe.about.metric),
        [(s.source, s.licence) for s in [*recipe.data.train, *(recipe.data.eval or [])]],
        (recipe.model.base, recipe.model.licence),
        [(o.base, o.parameters, o.licence) for o in recipe.model.options],
    )


def _row(
    name: str,
    about: tuple[str, str, str],
    sources: list[tuple[str, str]],
    base: tuple[str, str],
    options: list[tuple[str, str, str]],
) -> dict[str, Any]:
    sector, task, metric = about
    packages = ("pypi:", "npm:")
    return {
        "id": name,
        "sector": sector,
        "task": task,
        "metric": metric,
        "embedded": all(s.startswith(packages) for s, _ in sources) and base[0].startswith(packages),
        "licences": {"model": base[1], "data": sorted({licence for _, licence in sources})},
        "bases": [
            {"base": base[0], "licence": base[1]},
            *({"base": b, "parameters": p, "licence": li} for b, p, li in options),
        ],
        "sites": focus_sites(sector),
    }


def _list(value: Any) -> list[dict[str, Any]]:
    """Sources as a list of mappings, whatever form the file has."""
    values = value if isinstance(value, list) else [value]
    return [{"source": v} if isinstance(v, str) else v for v in values]


def chosen(rows: list[dict[str, Any]], sector: str | None, site: str | None) -> list[dict[str, Any]]:
    """The rows of one sector, and of the sectors that a site focuses on. An unknown name is a :class:`UserError`."""
    from aifactory_train.core.errors import UserError, did_you_mean

    if sector:
        sectors = sorted({row["sector"] for row in rows})
        if sector not in sectors:
            raise UserError(
                f"no recipe of sector '{sector}'{did_you_mean(sector, sectors)}",
                where="--sector",
                fix=f"sectors: {', '.join(sectors)}",
            )
        rows = [row for row in rows if row["sector"] == sector]
    if site:
        focus = _focus_of(site)
        rows = [row for row in rows if row["sector"] in focus] if focus else rows
    return rows


def _focus_of(site: str) -> set[str]:
    """Sectors of a member, or of the members that offer a system. Empty where the programme names no sectors (all
    fit).
    """
    from aifactory_train.core.errors import UserError, did_you_mean
    from aifactory_train.core.output import note
    from aifactory_train.sites import members

    every = members()
    named = [m for m in every if m["id"] == site] or [m for m in every if site in m["systems"]]
    if not named:
        known = sorted({m["id"] for m in every} | {s for m in every for s in m["systems"]})
        raise UserError(
            f"no factory, antenna or system '{site}'{did_you_mean(site, known)}",
            where="--site",
            fix="'aifactory sites' lists them",
        )
    focus = {s for m in named for s in m["sectors"]}
    if not focus:
        note(f"{site}: the programme names no sectors, so every recipe is shown")
    return focus


@functools.lru_cache(maxsize=1)
def _members() -> list[tuple[str, frozenset[str]]]:
    try:
        from aifactory_train.sites import members
    except ImportError:
        return []  # a reduced installation without the table of sites
    return [(str(m["id"]), frozenset(m["sectors"])) for m in members()]


def focus_sites(sector: str) -> list[str]:
    """Ids of the factories and antennas whose focus sectors hold ``sector``."""
    return [name for name, sectors in _members() if sector in sectors]
