"""``aifactory where``: all sites ranked for a recipe. Needs no GPU, no torch, no network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aifactory_train.commands.arguments import add_overrides, add_size
from aifactory_train.core.errors import UserError

EPILOG = """\
  aifactory where health/phenotype-terms --country FI --sme
  aifactory where my.yaml --country IE --deadline 3d --budget 500 --tokens 2e8
  aifactory where my.yaml --sensitive --json

Order and columns: docs/where.md. Whatever is left out of what you tell rules nothing out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="id such as health/phenotype-terms, or a YAML file")
    parser.add_argument("--country", metavar="FI|finland", help="where you are established")
    parser.add_argument("--sme", action="store_true", help="you are a small or medium company, or a start-up")
    parser.add_argument(
        "--deadline", metavar="TIME", help="hours or a time such as 3d in which the run has to finish, once it starts"
    )
    parser.add_argument("--budget", metavar="GPU_H", type=float, help="GPU-hours that may be spent")
    parser.add_argument(
        "--sensitive",
        action="store_true",
        help="the data are personal data of special categories; also where the recipe's privacy.profile is not open",
    )
    add_size(parser)
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with a map of the 32")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.output import note, print_json

    answer = build(args)
    if args.html:
        from aifactory_train.advice.page import write_page

        write_page(answer, args.html)
        note(f"written: {args.html}")
    if args.json:
        print_json(answer)
    else:
        from aifactory_train.advice.show import show

        show(answer)
    return 0


def build(args: argparse.Namespace) -> dict[str, Any]:
    """The answer as plain values: ``{recipe, base, asked, size, sites}``."""
    from aifactory_train.advice.routes import Applicant, country_code
    from aifactory_train.advice.sizing import Demand
    from aifactory_train.advice.where import Wishes, rank
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.planning import keys_set

    for name in ("budget", "tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError("must be a positive number", where=f"--{name}")
    deadline = None if args.deadline is None else hours_of(args.deadline)
    recipe = load_recipe(args.recipe, list(args.overrides))
    job = Demand.of(recipe, args.tokens, args.model_config, keys_set(args.overrides))
    if (deadline or args.budget) and job.size.tokens is None and recipe.train.max_steps is None:
        raise UserError(
            "a deadline or a budget needs to know how much there is to train on",
            where="--tokens",
            fix="run 'aifactory prepare' first, give --tokens, or set train.max_steps",
        )
    sensitive = args.sensitive or recipe.privacy.profile != "open"
    country = country_code(args.country) if args.country else None
    wishes = Wishes(Applicant(country, "sme" if args.sme else None), deadline, args.budget, sensitive)
    return {
        "recipe": recipe.id,
        "base": job.shape.name,
        "asked": {
            "country": country,
            "sme": args.sme,
            "deadline_hours": deadline,
            "budget_gpu_hours": args.budget,
            "sensitive": sensitive,
        },
        "size": {"tokens_per_epoch": job.size.tokens, "source": job.size.source},
        "settings": list(args.overrides),
        "tokens": args.tokens,
        "sites": rank(job, wishes),
    }


def hours_of(text: str) -> float:
    """Hours from ``72``, ``1.5`` (hours), ``3d``, ``36h`` or ``2-00:00:00``; refuses others."""
    from aifactory_train.sites import parse_duration

    try:
        hours = float(text)
    except ValueError:
        try:
            return parse_duration(text) / 3600
        except ValueError as error:
            raise UserError(str(error), where=f"--deadline {text}", fix="3d, 36h, or hours such as 72") from None
    if not 0 < hours < float("inf"):
        raise UserError("must be a positive number of hours", where=f"--deadline {text}", fix="3d, 36h, or 72")
    return hours
