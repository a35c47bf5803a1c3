"""``aifactory report``: what a run did, as a table, a page, a live page, or its record as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run below runs/, or its folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--json", action="store_true", help="the record with a summary, one line of JSON on standard output"
    )
    how.add_argument("--html", action="store_true", help="write report.html again and print its path")
    how.add_argument("--serve", action="store_true", help="follow the run in a browser (this machine only)")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="with --serve (0: any free one)")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.files import reading
    from aifactory_train.record.files import load_record
    from aifactory_train.run.folder import open_run

    folder = open_run(args.run_name)
    if args.serve:
        return _serve(folder, args.port)
    if args.html:
        from aifactory_train.report import write_report

        print(write_report(folder, load_record(folder.path)))
        return 0
    with reading(folder.path, "a file of this run is damaged", "aifactory verify RUN"):
        return _show(folder, as_json=args.json)


def _show(folder: Any, *, as_json: bool) -> int:
    from aifactory_train.core import output
    from aifactory_train.core.figures import measured
    from aifactory_train.core.files import read_json
    from aifactory_train.evaluation.verdict import Verdict
    from aifactory_train.record.files import RECORD

    report = collect(folder)
    if as_json:
        # The record, with what is only in the run's other files beside it.
        record = read_json(folder.path / RECORD, dict) if (folder.path / RECORD).is_file() else {}
        output.print_json({**report, **record})
        return 0
    training = report["training"]
    rows = [
        ["recipe", report["recipe"]],
        ["base model", f"{report['model']['base']} ({report['model']['licence']})"],
        ["trained", report["adapter"]],
        *[["data", f"{d['source']} ({d['licence']})"] for d in report["data"]],
        ["state", f"{report['state']} after step {report['step']}"],
        ["checkpoints", ", ".join(map(str, report["checkpoints"])) or "none"],
    ]
    if training["steps"]:
        rows += [
            ["loss", f"{training['first_loss']:.4f} at first, {training['last_loss']:.4f} at last"],
            ["tokens", f"{training['tokens']:,}, {training['supervised_tokens']:,} of them supervised"],
            [
                "speed",
                f"{training['median_tokens_per_s']:,.0f} tokens/s (median step), {training['seconds']:,.0f} s of steps",
            ],
        ]
    rows += [[f"export: {kind}", path] for kind, path in report["exports"].items()]
    verdict = Verdict.read(report)
    rows += [["verdict", verdict.sentence], ["next", verdict.next]] if verdict else []
    output.table(str(report["run"]), ["", ""], rows)
    before, after = report["before"] or {}, report["after"] or {}
    figures = [
        [name.replace("_", " "), measured(before.get(name)), measured(after.get(name))]
        for name in ("bits_per_byte", "perplexity", "loss", "exact_match", "token_f1")
        if before.get(name) is not None or after.get(name) is not None
    ]
    if figures:
        output.table("held-out rows", ["", "before", "after"], figures, right=(1, 2))
    return 0


def _serve(folder, port: int) -> int:
    """Serve the live page until interrupted."""
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import note
    from aifactory_train.report.serve import make_server

    try:
        server = make_server(folder, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used: {getattr(error, 'strerror', None) or 'ports are 0 to 65535'}",
            where="--port",
            fix="--port 0 takes a free one",
        ) from None
    note(f"{server.address} follows {folder.path}; who has this address can read the report; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        note("stopped")
    finally:
        server.server_close()
    return 0


def collect(folder) -> dict[str, Any]:
    """What the run wrote about itself, from ``run.yaml``, ``metrics.jsonl``, ``eval.json`` and ``export/``."""
    from aifactory_train.core.files import read_json

    recipe = folder.load_config()
    state = folder.state()
    results = read_json(folder.eval_file, dict) if folder.eval_file.is_file() else {}
    adapter = recipe.adapter
    records = training_records(folder)
    below = folder.export.iterdir() if folder.export.is_dir() else ()
    exports = {p.name: str(p) for p in sorted(below) if p.is_dir() and not p.name.startswith(".")}
    return {
        "run": str(folder.path),
        "recipe": recipe.id,
        "state": state.get("state"),
        "step": state.get("step", 0),
        "model": {"base": recipe.model.base, "revision": recipe.model.revision, "licence": recipe.model.licence},
        "adapter": "all weights"
        if adapter.kind == "none"
        else f"{adapter.kind} rank {adapter.rank} alpha {adapter.alpha:g}",
        "data": [{"source": s.source, "licence": s.licence} for s in recipe.data.train],
        "checkpoints": folder.complete_checkpoints(),
        "training": {
            "steps": len(records),
            "first_loss": records[0]["loss"] if records else None,
            "last_loss": records[-1]["loss"] if records else None,
            "tokens": sum(r["tokens"] for r in records),
            "supervised_tokens": sum(r["supervised_tokens"] for r in records),
            "seconds": round(sum(r["seconds"] for r in records), 3),
            "median_tokens_per_s": statistics.median(r["tokens_per_s"] for r in records) if records else None,
        },
        "before": results.get("before"),
        "after": results.get("after"),
        "verdict": results.get("verdict"),
        "exports": exports,
        "gate": {
            kind: read_json(folder.export / kind / "verification.json")
            for kind in exports
            if (folder.export / kind / "verification.json").is_file()
        },
    }


def training_records(folder) -> list[dict[str, Any]]:
    """The steps in ``metrics.jsonl``; a last line that was cut off when a run was killed is left out, any other fault
    named.
    """
    from aifactory_train.core.errors import UserError

    if not folder.metrics_file.is_file():
        return []
    lines = folder.metrics_file.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise UserError("is not JSON", where=f"{folder.metrics_file}:{number}") from None
        if not isinstance(record, dict):
            raise UserError("is no JSON object", where=f"{folder.metrics_file}:{number}")
        if record.get("kind", "train") == "train":
            records.append(record)
    return records
