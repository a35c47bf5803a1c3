"""``aifactory recipes new ID --data PATH``: a short annotated recipe for a user's own rows, with a report on them.

The rows are read as the training will read them; what was guessed (columns, task, labels, split) is said, and each
guess can be set by an option. Nothing is overwritten. Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.recipe_draft.guesses import (
    ROLES,
    Draft,
    canonical_rows,
    choose_split,
    metrics_of,
    read,
    understand,
)
from aifactory_train.recipe_draft.text import recipe_text

if TYPE_CHECKING:
    from aifactory_train.config.schema import ModelConfig, Recipe
    from aifactory_train.data.cells import Unused
    from aifactory_train.data.documents import Notes

_DEFAULT_BASE = "health/phenotype-terms"  # the recipe whose base model runs on a laptop

_ID = re.compile(r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a short annotated recipe for your own rows, and a report on them."
    parser.add_argument("id", nargs="?", help="id of the new recipe, e.g. acme/tickets; written to ID.yaml here")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="CSV, Excel, JSON Lines, Parquet, SQLite, a mailbox, or a folder of text, Markdown, HTML, PDF, Word, ...",
    )
    parser.add_argument("--eval", dest="held", metavar="PATH", help="rows that are held out; default: a part of --data")
    parser.add_argument("--sector", help="sector as the factories name it, e.g. health (default: general)")
    parser.add_argument("--base", metavar="RECIPE|MODEL", help="base model, or the recipe whose base model is taken")
    parser.add_argument(
        "--task", choices=["chat", "qa", "text", "preference", "feedback"], help="default: from the columns"
    )
    parser.add_argument("--licence", metavar="L", help="licence of the rows: own, or an SPDX id")
    parser.add_argument(
        "--map", action="append", default=[], metavar="COLUMN=ROLE", help="e.g. question=prompt; repeatable"
    )
    parser.add_argument("--group-by", metavar="COLUMN", help="rows of one value are never divided")
    parser.add_argument("--time", metavar="COLUMN", help="the newest rows are held out")
    parser.add_argument("--out", metavar="FILE", help="where the recipe is written (default: ID.yaml)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


@dataclass
class Made:
    """A recipe that was written for somebody's rows, and what was found in them. ``following``: the commands that come
    next."""

    recipe: Recipe
    out: Path
    report_file: Path
    data: Path
    draft: Draft
    rows: int
    more: bool
    facts: dict[str, Any]
    unused: Unused
    notes: Notes
    following: list[str]


def run(args: argparse.Namespace) -> int:
    made = make(args)
    if args.json:
        _print_json(args, made)
    else:
        _print(args, made)
    return 0


def make(args: argparse.Namespace) -> Made:
    """Read the rows, understand them, write recipe and report. Raises :class:`UserError` for what cannot be read or
    understood, and where one of the two files exists already."""
    from aifactory_train.config.loading import RECIPES_DIR, load_recipe
    from aifactory_train.core.files import write_atomic
    from aifactory_train.data import report as own
    from aifactory_train.data.cells import Unused
    from aifactory_train.data.documents import Notes

    out = _place(args)
    data = _local(args.data, "--data")
    sector = _sector(args.sector)
    columns = _mapping(args.map)
    notes = Notes()
    raw, more = read(data, notes)
    unused = Unused()
    draft, rows = understand(raw, columns, args.task, unused)
    held_rows: list[dict[str, Any]] | None = None
    if args.held:
        held_raw, _ = read(_local(args.held, "--eval"), notes)
        held_rows = canonical_rows(held_raw, draft.form, draft.columns)
    choose_split(draft, raw, rows, args)
    if draft.split:
        unused.columns.pop(draft.split[1], None)
    base, licence_missing = _base(args.base, sector)
    texts = [own.text_of(r) for r in rows]
    licence = args.licence or "unknown"
    facts = own.describe(
        texts, [own.text_of(r) for r in held_rows] if held_rows is not None else None, licences=[(args.data, licence)]
    )
    facts["rows_looked_at"] = len(rows)
    facts["unused"] = unused.as_dict()
    if notes.any():
        facts["files"] = notes.as_dict()
    answers = [r["messages"][-1]["content"] for r in rows if "messages" in r]
    draft.metrics = metrics_of(draft, answers)
    shown = {**facts, "characters": _longest(rows)} if draft.preference else facts
    text = recipe_text(args, out, data, sector, draft, base, licence_missing, shown, texts, answers, RECIPES_DIR)
    report_file = out.with_name(f"{out.stem}.report.json")
    if report_file.exists():
        raise UserError("exists already, and nothing is overwritten", where=str(report_file), fix="--out another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x", encoding="utf-8") as file:
        file.write(text)
    try:
        recipe = load_recipe(str(out))
    except UserError:
        out.unlink()
        raise
    write_atomic(report_file, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    following = _next(recipe.model, out)
    return Made(recipe, out, report_file, data, draft, len(rows), more, facts, unused, notes, following)


def _print_json(args: argparse.Namespace, made: Made) -> None:
    from aifactory_train.core.output import print_json

    draft = made.draft
    print_json(
        {
            "id": made.recipe.id,
            "recipe": str(made.out),
            "report_file": str(made.report_file),
            "task": draft.task,
            "format": draft.form,
            "columns": draft.columns,
            "labels": draft.labels,
            "split": {draft.split[0]: draft.split[1]} if draft.split else None,
            "method": draft.preference,
            "metrics": draft.metrics,
            "licence": args.licence or "MISSING",
            "assumed": draft.assumed,
            "remarks": remarks(made),
            "next": made.following,
            "report": made.facts,
        }
    )


def _print(args: argparse.Namespace, made: Made) -> None:
    from aifactory_train.core.output import note, table
    from aifactory_train.data import report as own

    table(
        f"{made.data}: {made.rows:,} rows{' (of more)' if made.more else ''}",
        ["", "found"],
        [list(x) for x in own.lines_of(made.facts)],
    )
    for line in remarks(made):
        note(line)
    if not args.licence:
        note(
            "licence of the rows: MISSING; whose are they? --licence own, or the SPDX id (data.train.licence in the "
            "recipe)"
        )
    if made.facts["personal_data"]["counts"]:
        note("personal data found: read docs/sensitive-data.md before training (privacy.profile)")
    note(f"recipe: {made.out}\nreport: {made.report_file}\nnext:")
    for command in made.following:
        note(f"  {command}")


def remarks(made: Made) -> list[str]:
    """What was assumed, and everything that is not used or was left out, by name and count."""
    lines = [f"assumed: {line}" for line in made.draft.assumed]
    for kind, what in (("columns", "column"), ("turn_keys", "key of a turn")):
        for name, count in made.facts["unused"][kind].items():
            lines.append(f"not used: {what} '{name}' ({count:,} {'rows' if kind == 'columns' else 'turns'})")
    lines += [f"{count:,} x {remark}" for remark, count in sorted(made.unused.remarks.items())]
    return lines + _of_files(made.notes)


def _longest(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Percentiles of characters as in the report, of the longer answer of each row with its question: that is a
    document.
    """
    from aifactory_train.data.report import text_of

    sides = [[{"messages": row["messages"]}, {"messages": row.get("rejected", [])}] for row in rows]
    lengths = sorted(max(len(text_of(side)) for side in both) for both in sides)
    return {f"p{q}": lengths[min(len(lengths) - 1, len(lengths) * q // 100)] for q in (50, 99)}


def _place(args: argparse.Namespace) -> Path:
    from aifactory_train.config.loading import recipe_ids

    if not args.id:
        raise UserError(
            "the new recipe needs an id", where="ID", fix="aifactory recipes new acme/tickets --data tickets.csv"
        )
    if not _ID.match(args.id):
        raise UserError(
            f"'{args.id}' is no recipe id",
            where="ID",
            fix="small letters, digits, '.', '_', '-' and '/', e.g. acme/tickets",
        )
    if args.id in recipe_ids():
        raise UserError(f"there is a recipe '{args.id}' already", where="ID", fix="choose another id")
    if args.group_by and args.time:
        raise UserError("rows are split by a group or by time, not both", where="--time", fix="give one of them")
    out = Path(args.out) if args.out else Path(f"{args.id}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError("a recipe file ends in .yaml", where="--out")
    if out.exists():
        raise UserError(
            "exists already, and nothing is overwritten", where=str(out), fix="choose another id, or --out FILE"
        )
    return out


def _local(text: str | None, option: str) -> Path:
    if not text:
        raise UserError("no rows were named", where=option, fix="--data FILE_OR_FOLDER")
    path = Path(text).expanduser()
    if not path.exists():
        raise UserError(
            f"no such file or folder: {text}",
            where=option,
            fix="rows lie here; a data set of the hub goes into data.train",
        )
    return path


def _sector(name: str | None) -> str:
    from aifactory_train.config.loading import recipe_ids
    from aifactory_train.sites import members

    if name is None:
        return "general"
    known = {"general", *(s for m in members() for s in m["sectors"]), *(i.partition("/")[0] for i in recipe_ids())}
    if name not in known:
        raise UserError(
            f"unknown sector '{name}'{did_you_mean(name, known)}",
            where="--sector",
            fix=f"sectors: {', '.join(sorted(known))}",
        )
    return name


def _mapping(given: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for text in given:
        column, separator, role = text.rpartition("=")
        if not separator or not column:
            raise UserError(
                "a mapping has the form COLUMN=ROLE", where=f"--map {text}", fix="e.g. --map question=prompt"
            )
        if role not in ROLES:
            raise UserError(
                f"'{role}' is no role of a column{did_you_mean(role, ROLES)}",
                where=f"--map {text}",
                fix=f"roles: {', '.join(ROLES)}",
            )
        if role in columns.values():
            raise UserError(f"two columns are mapped to '{role}'", where=f"--map {text}", fix="give each role once")
        columns[column] = role
    return columns


def _base(asked: str | None, sector: str) -> tuple[ModelConfig, bool]:
    """The base model, and whether its licence is not known."""
    from aifactory_train import sources
    from aifactory_train.config.loading import load_recipe, recipe_ids
    from aifactory_train.config.schema import ModelConfig
    from aifactory_train.sources import licences

    ids = recipe_ids()
    if asked is None:
        asked = next((i for i in ids if i.startswith(f"{sector}/")), _DEFAULT_BASE)
    if asked in ids or asked.endswith((".yaml", ".yml")):
        model = load_recipe(asked).model
        return ModelConfig.model_validate({**model.model_dump(), "start_from": None}), model.licence == "unknown"
    spec = sources.parse(asked)
    if spec.kind == "local":
        path = Path(asked).expanduser()
        if not path.exists():
            raise UserError(
                f"'{asked}' is neither a recipe nor a model{did_you_mean(asked, ids)}",
                where="--base",
                fix="a recipe id, a Hugging Face id (org/name), or a model folder",
            )
        return ModelConfig(base=str(path.resolve())), True
    entry = licences.known()["sources"].get(asked.partition("#")[0])
    licence = entry["licence"] if entry else "unknown"
    return ModelConfig(base=asked, licence=licence), licence == "unknown"


def _next(model: ModelConfig, out: Path) -> list[str]:
    """The two commands that come next."""
    import shlex

    from aifactory_train import sources

    name = shlex.quote(str(out))
    train = f"aifactory train {name} --name {shlex.quote(out.stem)}"
    try:
        sources.resolve_model(model)
    except UserError:
        return [f"aifactory fetch {name}", train]
    return [f"aifactory prepare {name} --report", train]


def _of_files(notes: Notes) -> list[str]:
    lines = [f"left out: {file}: {why}" for file, why in notes.left_out[:10]]
    if len(notes.left_out) > 10:
        lines.append(f"left out: {len(notes.left_out) - 10} more, all named in the report")
    if notes.other_splits:
        others = ", ".join(f"{name} ({len(files)} file(s))" for name, files in sorted(notes.other_splits.items()))
        lines.append(f"of the folder only the split '{notes.split}' is read; not read: {others} (data.train.N.split)")
    lines += [f"not read: {file}: it is about the data" for file in notes.about]
    lines += [f"{count:,} x {what}" for what, count in sorted(notes.beside.items())]
    if notes.pages_without_text:
        lines.append(
            f"{notes.pages_without_text:,} PDF page(s) have no text: they are pictures, and an OCR program "
            f"(ocrmypdf) adds it"
        )
    return lines + [f"not read: {count} file(s) of kind {suffix}" for suffix, count in sorted(notes.not_read.items())]
