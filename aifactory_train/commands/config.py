"""``aifactory config``: the JSON Schema of recipes for editors, and the resolved tree of one recipe."""

from __future__ import annotations

import argparse

from aifactory_train.commands.arguments import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sub = parser.add_subparsers(dest="what", required=True, metavar="schema|show")
    schema = sub.add_parser("schema", help="JSON Schema of a recipe", allow_abbrev=False)
    schema.add_argument("--write", action="store_true", help="regenerate recipe.schema.json beside the recipes")
    schema.add_argument("--json", action="store_true", help="on one line")
    show = sub.add_parser("show", help="a recipe with every default filled in", allow_abbrev=False)
    show.add_argument("recipe", metavar="RECIPE", help="id of a recipe, or a YAML file")
    add_overrides(show)
    show.add_argument("--json", action="store_true", help="one line of JSON instead of YAML")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.loading import RECIPES_DIR, json_schema, load_recipe, to_tree
    from aifactory_train.core import output, yaml_text
    from aifactory_train.core.files import write_atomic

    if args.what == "show":
        tree = to_tree(load_recipe(args.recipe, args.overrides))
        if args.json:
            output.print_json(tree)
        else:
            print(yaml_text.dump(tree), end="")
        return 0
    if args.write:
        path = RECIPES_DIR / "recipe.schema.json"
        write_atomic(path, schema_text())
        output.note(f"written: {path}")
    elif args.json:
        output.print_json(json_schema())
    else:
        print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """The content of ``recipes/recipe.schema.json``."""
    import json

    from aifactory_train.config.loading import json_schema

    return json.dumps(json_schema(), ensure_ascii=False, indent=1) + "\n"
