"""``aifactory prepare``: validate, tokenise, mask and cache the data; ``--inspect`` shows what is supervised."""

from __future__ import annotations

import argparse

from aifactory_train.commands.arguments import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe id (health/phenotype-terms) or path of a .yaml file")
    add_overrides(parser)
    parser.add_argument("--inspect", type=int, default=0, metavar="N", help="show the tokens of N documents")
    parser.add_argument(
        "--from", dest="which", default="train", metavar="SET", help="set to inspect: train, or the name of an eval set"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="the whole report on the rows (languages, repetition, leakage, personal data), however many there are",
    )
    parser.add_argument("--cache-dir", help="where the token cache goes (default: $AIFACTORY_CACHE/prepared)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.errors import UserError, did_you_mean
    from aifactory_train.core.output import note, print_json
    from aifactory_train.data import load_tokenizer, prepare
    from aifactory_train.data.inspect import inspect_document, report_tables
    from aifactory_train.data.pipeline import look_at
    from aifactory_train.data.report import print_own

    if args.inspect < 0:
        raise UserError("the number of documents cannot be negative", where="--inspect")
    recipe = load_recipe(args.recipe, args.overrides)
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer, cache_dir=args.cache_dir, progress=_progress())
    if args.report:
        look_at(recipe, tokenizer, prepared)
    sets = {"train": prepared.train, **prepared.evals}
    if args.which not in sets:
        raise UserError(
            f"no set '{args.which}'{did_you_mean(args.which, sets)}", where="--from", fix=f"sets: {', '.join(sets)}"
        )
    if args.json:
        print_json(
            {
                **prepared.report,
                "tokenizer": prepared.tokenizer_info,
                "cache": str(prepared.folder),
                "reused": prepared.reused,
                "inspected": [
                    inspect_document(sets[args.which], i, tokenizer, prepared.tokenizer_info, as_json=True)
                    for i in range(min(args.inspect, len(sets[args.which])))
                ],
            }
        )
        return 0
    report_tables(prepared)
    if args.report:
        print_own(prepared.report["own"])
    for warning in prepared.report["warnings"]:
        note(f"warning: {warning}")
    for i in range(min(args.inspect, len(sets[args.which]))):
        inspect_document(sets[args.which], i, tokenizer, prepared.tokenizer_info)
    note(f"cache: {prepared.folder}" + (" (was there already)" if prepared.reused else ""))
    return 0


def _progress():
    """A line on standard error every two seconds of work, only at a terminal."""
    import sys
    import time

    if not sys.stderr.isatty():
        return None
    last = time.monotonic()

    def show(rows: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 2:
            last = now
            print(f"\r{rows:,} rows, {tokens:,} tokens", end="", file=sys.stderr, flush=True)

    return show
