"""``aifactory fetch``: model and data of a recipe into the cache. The only command that uses the network."""

from __future__ import annotations

import argparse

from aifactory_train.sources import licences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe id (health/phenotype-terms) or path of a .yaml file")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="change one value"
    )
    parser.add_argument("--force", action="store_true", help="fetch again what the cache already holds")
    parser.add_argument("--only", choices=["model", "data"], help="fetch one of the two")
    parser.add_argument("--json", action="store_true", help="print the manifest as one line of JSON")
    licences.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.output import note, print_json, table
    from aifactory_train.sources import fetch, parse

    recipe = load_recipe(args.recipe, licences.overrides(args))
    licences.gate(recipe)
    manifest = fetch(recipe, force=args.force, say=note, model=args.only != "data", data=args.only != "model")
    if args.json:
        print_json(manifest)
        return 0
    rows = []
    by_recipe = {parse(s.source).text: s.licence for s in [*recipe.data.train, *(recipe.data.eval or [])]}
    by_recipe[parse(recipe.model.base).text] = recipe.model.licence
    for kind, item in [("model", manifest["model"]), *(("data", entry) for entry in manifest["data"])]:
        if item is None:
            continue
        size = sum(f["bytes"] for f in item["files"]) / 1e6
        stated = by_recipe.get(item["source"], "unknown")
        licence = "not stated" if stated == "unknown" else f"{stated} (the recipe)"
        if item["licence"]:
            licence = f"{item['licence']} ({item['licence_read_from']})"
        rows.append([kind, item["source"], item["resolved"], f"{size:,.1f} MB", licence])
    table(f"fetched for {recipe.id}", ["", "source", "resolved", "size", "licence (read from)"], rows, right=(3,))
    note(f"cache: {manifest['cache']}")
    return 0
