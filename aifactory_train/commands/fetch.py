"""``aifactory fetch``: model and data of a recipe into the cache. The only command that uses the network."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from aifactory_train.commands.arguments import add_overrides
from aifactory_train.core.errors import UserError
from aifactory_train.sources import licences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe id (health/phenotype-terms) or path of a .yaml file")
    add_overrides(parser)
    parser.add_argument("--force", action="store_true", help="fetch again what the cache already holds")
    parser.add_argument("--only", choices=["model", "data"], help="fetch one of the two")
    parser.add_argument(
        "--site", metavar="SYSTEM", help="into the cache that jobs of this site read, on a login node there"
    )
    parser.add_argument("--site-file", metavar="FILE", help="your own values for the site (account, project, cache)")
    parser.add_argument(
        "--shared", action="store_true", help="with --site: into the one cache that all members of your project read"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as one line of JSON")
    licences.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.site is None:
        for flag, given in (("--shared", args.shared), ("--site-file", args.site_file)):
            if given:
                raise UserError("goes with --site", where=flag, fix="--site SYSTEM, or leave it out")
        return _fetch(args)
    with _cache_of_the_site(args):
        return _fetch(args)


@contextlib.contextmanager
def _cache_of_the_site(args: argparse.Namespace) -> Iterator[None]:
    """The caches of a site for what runs inside; what is shared is made for the project's group."""
    from aifactory_train import sites
    from aifactory_train.core.output import note
    from aifactory_train.launchers.caches import HUGGING_FACE, OURS, cache_root, make_shared

    system = sites.load(args.site, overlay=args.site_file) if args.site_file else sites.load(args.site)
    root = cache_root(system, shared=args.shared)
    if root is None:
        raise UserError(
            f"where jobs at {system.name} look for models and data is not said",
            where="--site",
            fix="--shared, or user.work_dir or user.cache in your site file",
        )
    shared = args.shared or system.user.cache == "shared"
    if shared:
        make_shared(root, system)
    before = {name: os.environ.get(name) for name in ("AIFACTORY_CACHE", "HF_HOME")}
    mask = os.umask(0o007) if shared else None
    os.environ.update({"AIFACTORY_CACHE": f"{root}/{OURS}", "HF_HOME": f"{root}/{HUGGING_FACE}"})
    try:
        yield
    finally:
        if mask is not None:
            os.umask(mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if args.shared and system.user.cache != "shared":
        note(f"jobs read it with 'user: {{cache: shared}}' in ~/.config/aifactory/sites/{system.id}.yaml")


def _fetch(args: argparse.Namespace) -> int:
    from aifactory_train.config.distill_block import teacher_recipe
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.output import note, print_json, table
    from aifactory_train.sources import fetch, parse
    from aifactory_train.sources.fetching import fetch_model

    recipe = load_recipe(args.recipe, licences.overrides(args))
    licences.gate(recipe)
    manifest = fetch(recipe, force=args.force, say=note, model=args.only != "data", data=args.only != "model")
    teachers = []
    if recipe.methods.distill is not None and args.only != "data":
        teachers = [fetch_model(teacher_recipe(recipe).model, force=args.force, say=note)]
        manifest = {**manifest, "teacher": teachers[0]}
    if args.json:
        print_json(manifest)
        return 0
    rows = []
    by_recipe = {parse(s.source).text: s.licence for s in [*recipe.data.train, *(recipe.data.eval or [])]}
    by_recipe[parse(recipe.model.base).text] = recipe.model.licence
    if recipe.methods.distill is not None:
        by_recipe[parse(recipe.methods.distill.teacher).text] = recipe.methods.distill.licence
    items = [("model", manifest["model"]), *(("teacher", entry) for entry in teachers)]
    for kind, item in [*items, *(("data", entry) for entry in manifest["data"])]:
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
