"""``aifactory predict``: labels and calibrated probabilities of texts, or their vectors, from a run with a head."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.run.folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run below runs/, or its folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help="rows with a text (or a question), in any form training reads")
    what.add_argument("--text", metavar="TEXT", help="one text")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="with --data (default: RUN/predictions.jsonl, or embeddings.jsonl)"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.head_block import embeds
    from aifactory_train.core import output
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.files import write_atomic
    from aifactory_train.evaluation.predicting import texts_of
    from aifactory_train.run.folder import open_run

    folder = open_run(args.run_name)
    recipe = folder.load_config()
    vectors = embeds(recipe)
    if args.text is not None:
        if args.out is not None:
            raise UserError("is for --data", where="--out")
        if not args.text.strip():
            raise UserError(f"is empty: there is nothing to {'embed' if vectors else 'classify'}", where="--text")
        (found,) = _answers(folder, recipe, [("text", args.text)])
        if args.json:
            output.print_json({"run": str(folder.path), **found})
        else:
            print(json.dumps(found["embedding"]) if vectors else _said(found))
        return 0
    answers = _answers(folder, recipe, texts_of(Path(args.data), recipe))
    what = "embeddings" if vectors else "predictions"
    target = args.out or folder.path / f"{what}.jsonl"
    write_atomic(target, "".join(json.dumps(a, ensure_ascii=False, allow_nan=False) + "\n" for a in answers))
    if args.json:
        of_all = {"dimensions": len(answers[0]["embedding"])} if vectors else {"labels": _counts(answers)}
        shown = {"run": str(folder.path), "data": args.data, "rows": len(answers)}
        output.print_json({**shown, **of_all, what: str(target)})
        return 0
    print(f"{len(answers)} rows of {args.data}\n{what}: {target}")
    return 0


def _answers(folder: RunFolder, recipe: Recipe, rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Of each text its vector (``{"id", "embedding", "truncated"}``) or its labels, by what the run trained."""
    from aifactory_train.config.head_block import embeds
    from aifactory_train.core import compat
    from aifactory_train.evaluation.embedding_texts import Embedder
    from aifactory_train.evaluation.predicting import Predictor

    if embeds(recipe):
        return Embedder(folder, compat.device_type()).embed(rows)
    return Predictor(folder, compat.device_type()).predict(rows)


def _counts(answers: list[dict[str, Any]]) -> dict[str, int]:
    """How many texts were given each label, in the order in which labels first came."""
    counts: dict[str, int] = {}
    for label in (label for answer in answers for label in answer["labels"]):
        counts[label] = counts.get(label, 0) + 1
    return counts


def _said(found: dict[str, Any]) -> str:
    labels = ", ".join(found["labels"]) or "no label"
    best = sorted(found["probabilities"].items(), key=lambda item: -item[1])[:5]
    return f"{labels}\n" + "\n".join(f"  {p:.3f}  {name}" for name, p in best)
