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
    from aifactory_train.core import compat, output
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.files import write_atomic
    from aifactory_train.evaluation.predicting import Predictor, texts_of
    from aifactory_train.run.folder import open_run

    folder = open_run(args.run_name)
    recipe = folder.load_config()
    if embeds(recipe):
        return _vectors(args, folder, recipe)
    if args.text is not None:
        if args.out is not None:
            raise UserError("is for --data", where="--out")
        if not args.text.strip():
            raise UserError("is empty: there is nothing to classify", where="--text")
        (found,) = Predictor(folder, compat.device_type()).predict([("text", args.text)])
        if args.json:
            output.print_json({"run": str(folder.path), **found})
        else:
            print(_said(found))
        return 0
    rows = texts_of(Path(args.data), recipe)
    predictions = Predictor(folder, compat.device_type()).predict(rows)
    target = args.out or folder.path / "predictions.jsonl"
    write_atomic(target, "".join(json.dumps(p, ensure_ascii=False, allow_nan=False) + "\n" for p in predictions))
    if args.json:
        counts: dict[str, int] = {}
        for label in (label for p in predictions for label in p["labels"]):
            counts[label] = counts.get(label, 0) + 1
        shown = {"run": str(folder.path), "data": args.data, "rows": len(predictions), "labels": counts}
        output.print_json({**shown, "predictions": str(target)})
        return 0
    print(f"{len(predictions)} rows of {args.data}\npredictions: {target}")
    return 0


def _vectors(args: argparse.Namespace, folder: RunFolder, recipe: Recipe) -> int:
    """The vectors of an embedding model: a line ``{"id", "embedding", "truncated"}`` a text."""
    from aifactory_train.core import compat, output
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.files import write_atomic
    from aifactory_train.evaluation.embedding_texts import Embedder
    from aifactory_train.evaluation.predicting import texts_of

    if args.text is not None:
        if args.out is not None:
            raise UserError("is for --data", where="--out")
        if not args.text.strip():
            raise UserError("is empty: there is nothing to embed", where="--text")
        (found,) = Embedder(folder, compat.device_type()).embed([("text", args.text)])
        if args.json:
            output.print_json({"run": str(folder.path), **found})
        else:
            print(json.dumps(found["embedding"]))
        return 0
    rows = texts_of(Path(args.data), recipe)
    found_all = Embedder(folder, compat.device_type()).embed(rows)
    target = args.out or folder.path / "embeddings.jsonl"
    write_atomic(target, "".join(json.dumps(p, ensure_ascii=False, allow_nan=False) + "\n" for p in found_all))
    if args.json:
        shown = {"run": str(folder.path), "data": args.data, "rows": len(found_all)}
        output.print_json({**shown, "dimensions": len(found_all[0]["embedding"]), "embeddings": str(target)})
        return 0
    print(f"{len(found_all)} rows of {args.data}\nembeddings: {target}")
    return 0


def _said(found: dict[str, Any]) -> str:
    labels = ", ".join(found["labels"]) or "no label"
    best = sorted(found["probabilities"].items(), key=lambda item: -item[1])[:5]
    return f"{labels}\n" + "\n".join(f"  {p:.3f}  {name}" for name, p in best)
