"""``aifactory teach``: one pass of a larger model over a recipe's rows; ``methods.distill`` reads what it stores."""

from __future__ import annotations

import argparse
from pathlib import Path

from aifactory_train.commands.arguments import add_overrides
from aifactory_train.sources import licences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe id (health/phenotype-terms) or path of a .yaml file")
    parser.add_argument(
        "--teacher", metavar="ID", help="Hugging Face id or model folder (default: methods.distill.teacher)"
    )
    add_overrides(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where it goes (default: methods.distill.stored, else the cache)"
    )
    parser.add_argument(
        "--share",
        metavar="I/N",
        help="only the I-th of N shares of what is missing, for N processes at once (default: all of it)",
    )
    parser.add_argument("--json", action="store_true", help="print what is stored as one line of JSON")
    licences.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import note, print_json, table

    share = _share(args.share)
    named = [f"methods.distill.teacher={args.teacher}"] if args.teacher is not None else []
    recipe = load_recipe(args.recipe, [*licences.overrides(args), *named])
    if recipe.methods.distill is None:
        raise UserError("the recipe names no teacher", where=args.recipe, fix="--teacher ID")
    licences.gate(recipe)
    from aifactory_train.core import compat
    from aifactory_train.evaluation.teaching import teach

    found = teach(recipe, folder=args.out, share=share, device=compat.device_type(), say=note)
    if args.json:
        print_json({"recipe": recipe.id, **found})
        return 0
    rows = [
        [
            name,
            f"{one['documents']:,}",
            f"{one['missing']:,}",
            f"{one['targets']:,}",
            "" if one["mass"] is None else f"{one['mass']:.2%}",
            "" if one["loss"] is None else f"{one['loss']:.4g}",
        ]
        for name, one in found["sets"].items()
    ]
    title = f"{found['teacher']}: the {found['top_k']} likeliest tokens of each target"
    columns = ["set", "documents", "missing", "targets", "mass kept", "teacher's own loss"]
    table(title, columns, rows, right=(1, 2, 3, 4, 5))
    note(
        f"{found['computed_documents']:,} documents computed in {found['seconds']:,.1f} s; "
        f"{found['bytes'] / 2**20:,.1f} MiB in {found['stored']} ({found['bytes_per_target']} bytes a target)"
    )
    if args.teacher is not None or args.out is not None:
        settings = [f"methods.distill.teacher={recipe.methods.distill.teacher}"]
        settings += [f"methods.distill.stored={args.out}"] if args.out is not None else []
        note(f"next: aifactory train {args.recipe} " + " ".join(f"--set {setting}" for setting in settings))
    return 0


def _share(text: str | None) -> tuple[int, int]:
    """``I/N`` as numbers; ``(1, 1)`` without it."""
    from aifactory_train.core.errors import UserError

    if text is None:
        return 1, 1
    one, _, of = text.partition("/")
    if not (one.isdecimal() and of.isdecimal() and 1 <= int(one) <= int(of)):
        raise UserError(f"'{text}' is no share", where="--share", fix="I/N, from 1/N to N/N, e.g. 2/8")
    return int(one), int(of)
