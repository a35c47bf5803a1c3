"""``aifactory eval``: score any rows with a trained run, and write its answers as JSONL; or tasks of
lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run below runs/, or its folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help="rows in any form that training reads")
    what.add_argument(
        "--harness",
        metavar="TASK[,TASK]",
        help="tasks of lm-evaluation-harness whose data are in the local cache; 'own' is the recipe's held-out rows",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="predictions (default: RUN/predictions.jsonl)")
    parser.add_argument("--rows", type=int, metavar="N", help="only N rows, evenly spaced")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the recipe's)")
    parser.add_argument("--no-generate", action="store_true", help="likelihood only, no answers")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core import output
    from aifactory_train.core.files import write_atomic
    from aifactory_train.run.folder import open_run

    folder = open_run(args.run_name)
    if args.harness is not None:
        return _harness(folder, args)
    recipe = scoring_recipe(folder.load_config(), args)
    summary, predictions = score(folder, recipe, generate=not args.no_generate)
    target = args.out or folder.path / "predictions.jsonl"
    write_atomic(target, "".join(json.dumps(p, ensure_ascii=False, allow_nan=False) + "\n" for p in predictions))
    if args.json:
        output.print_json({"run": str(folder.path), "data": args.data, **summary, "predictions": str(target)})
        return 0
    rows = []
    from aifactory_train.metrics import ANSWER_METRICS

    for name in ("bits_per_byte", "perplexity", *ANSWER_METRICS):
        if summary.get(name) is not None:
            low_high = summary["ci"].get(name)
            shown = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else ""
            rows.append([name.replace("_", " "), f"{summary[name]:.4g}", shown])
    output.table(f"{summary['rows']} rows of {args.data}", ["", "value", "95 % interval"], rows, right=(1,))
    print(f"predictions: {target}")
    return 0


def _harness(folder, args: argparse.Namespace) -> int:
    from aifactory_train.core import output
    from aifactory_train.core.errors import UserError
    from aifactory_train.evaluation import harness

    for name in ("out", "max_new_tokens", "no_generate"):
        if getattr(args, name):
            raise UserError("does not go with --harness", where=f"--{name.replace('_', '-')}")
    names = list(dict.fromkeys(n.strip() for n in args.harness.split(",") if n.strip()))
    if not names or (args.rows is not None and args.rows < 1):
        raise UserError(
            "names no task" if not names else "must be at least 1", where="--rows" if names else "--harness"
        )
    harness.offline()
    from aifactory_train.core import compat

    found = harness.run_harness(folder, folder.load_config(), names, rows=args.rows, device=compat.device_type())
    if args.json:
        output.print_json({"run": str(folder.path), **found})
        return 0
    rows = [
        [task, name, f"{value:.4g}", str(found["rows"].get(task, ""))]
        for task, figures in found["tasks"].items()
        for name, value in figures.items()
    ]
    title = f"lm-evaluation-harness {found['versions']['lm_eval']}"
    output.table(title, ["task", "metric", "value", "rows"], rows, right=(2, 3))
    print(f"results and answers: {folder.path / 'harness'}")
    return 0


def scoring_recipe(recipe, args: argparse.Namespace):
    """The run's recipe with ``--data`` as its only rows; nothing is left out, repeated rows count as often as they
    stand.
    """
    from aifactory_train.config.data_blocks import DataSource
    from aifactory_train.core.errors import UserError

    for name, value in (("--rows", args.rows), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            raise UserError("must be at least 1", where=name)
    scored = recipe.model_copy(deep=True)
    trained = recipe.data.train[0]
    own = {} if trained.converter else {"columns": trained.columns}
    scored.data.train = [DataSource(source=args.data, licence="unknown", **own)]
    scored.data.eval = [DataSource(source=args.data, licence="unknown", **own)]
    scored.methods.preference = None  # any rows are scored as they are
    scored.data.overlap, scored.data.deduplicate = "allow", False
    scored.data.eval_rows = args.rows or 2**31 - 1
    scored.eval.metrics = list(dict.fromkeys([*scored.eval.metrics, "exact_match", "token_f1"]))
    scored.eval.max_new_tokens = args.max_new_tokens or recipe.eval.max_new_tokens
    return scored


def score(folder, recipe, *, generate: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures over all rows, one prediction per document) of the run's model on the recipe's evaluation rows."""
    from aifactory_train import metrics
    from aifactory_train.core import compat
    from aifactory_train.data import prepare
    from aifactory_train.evaluation.answers import answers, chat_template, question, stop_ids
    from aifactory_train.evaluation.evaluate import add_answers, answer_statistics
    from aifactory_train.evaluation.likelihood import held_out
    from aifactory_train.model import position_check
    from aifactory_train.model.base import base_folder
    from aifactory_train.model.trained import load_trained

    device = compat.device_type()
    position_check.settle(recipe, position_check.check(recipe, base_folder(recipe), device=device))
    model, tokenizer, _ = load_trained(folder, device)
    prepared = prepare(recipe, tokenizer)
    info, dataset = prepared.tokenizer_info, next(iter(prepared.evals.values()))
    scored = held_out(
        model,
        dataset,
        max_rows=recipe.data.eval_rows,
        batching=recipe.data.batching,
        pad_id=info["pad_id"],
        device=device,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
    )
    template = chat_template(tokenizer, recipe)
    asked = {}
    if generate:
        for index in scored.documents.tolist():
            found = question(dataset, index, tokenizer, template)
            if found is not None:
                asked[index] = found
    texts = answers(
        model,
        tokenizer,
        list(asked.values()),
        max_new_tokens=recipe.eval.max_new_tokens,
        stop_ids=stop_ids(info),
        pad_id=info["pad_id"],
        device=device,
    )
    replies = dict(zip(asked, texts, strict=True))
    predictions = []
    given: list[str] = []
    expected: list[str] = []
    for k, index in enumerate(scored.documents.tolist()):
        row = dataset.row(index)
        bits = metrics.bits_per_byte(float(scored.text_nll[k]), int(scored.text_bytes[k]))
        prediction: dict[str, Any] = {
            "id": dataset.row_id(index),
            "loss": float(scored.nll[k] / scored.tokens[k]),
            "tokens": int(scored.tokens[k]),
            "bits_per_byte": None if bits is None or not math.isfinite(bits) else bits,
        }
        if index in replies:
            q, answer = asked[index], replies[index]
            prediction.update(prompt=q.prompt, expected=q.expected, answer=answer)
            if "text" not in row:
                prediction["exact_match"] = metrics.exact_match(answer, q.expected)
                prediction["token_f1"] = metrics.token_f1(answer, q.expected)
                given.append(answer)
                expected.append(q.expected)
        predictions.append(prediction)
    summary = scored.figures()
    summary["answered_rows"] = 0
    add_answers(summary, answer_statistics(given, expected, recipe), None)
    return summary, predictions
