"""``aifactory export``: adapter or weights of a checkpoint, merged weights of an adapter, a GGUF file, behind the logits gate."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run below runs/, or its folder")
    parser.add_argument("--merge", action="store_true", help="write weights with the adapter merged in (export/merged)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="type of whole or merged weights (default: the recipe's)"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="export the checkpoint of this step (default: what the run ended with)"
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "gguf"),
        default="safetensors",
        help="gguf: one file of the merged model for llama.cpp, Ollama and LM Studio (export/gguf-TYPE)",
    )
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="of a GGUF file: f32, f16 (default), bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 (a number: bits per weight)",
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of logits with the trained model")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train import output
    from aifactory_train.errors import UserError
    from aifactory_train.runs import open_run

    for name in ("merge", "dtype") if args.format == "gguf" else ("type",):
        if getattr(args, name):
            fix = "a GGUF file is always of the merged model, and --type is its type"
            raise UserError(
                f"does not go with --format {args.format}",
                where=f"--{name}",
                fix=fix if args.format == "gguf" else "--format gguf --type TYPE; safetensors have --dtype",
            )
    folder = open_run(args.run_name)
    verify = False if args.no_verify else None
    from aifactory_train.record.pack import refresh_artefacts

    if args.format == "gguf":
        from aifactory_train.gguf_export import export_gguf

        outcome = export_gguf(folder, args.type or "f16", step=args.step, verify=verify)
    else:
        from aifactory_train.export import export_run

        outcome = export_run(folder, merge=args.merge, dtype=args.dtype, verify=verify, step=args.step)
    refresh_artefacts(folder, outcome)  # the record and the signed manifest speak of what lies in export/
    if args.json:
        output.print_json({"run": str(folder.path), **outcome})
        return 0
    for kind, path in outcome["paths"].items():
        print(f"{kind}: {path}")
        print(f"  {_said(kind, outcome['gate'].get(kind))}")
    return 0


def _said(kind: str, verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "not compared with the trained model (--no-verify or export.verify)"
    figures = (
        f"relative difference {verdict['difference']:.1e}, top-1 agreement {verdict['top1_agreement']:.4f}, mean KL "
        f"{verdict['mean_kl']:.1e} nats over {verdict['places']} places ({verdict['limit']})"
    )
    if "file" not in verdict:
        return f"same as the trained model: {figures}"
    return (
        f"{verdict['file']}: read back as it was written (relative difference {verdict['file_difference']:.1e}); against the trained "
        f"model: {figures}, same greedy token at {verdict['greedy_agreement']:.1%} of the places"
    )
