"""``aifactory export``: adapter or weights of a checkpoint, merged weights of an adapter, a GGUF file, behind the
logits gate.
"""

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
    parser.add_argument(
        "--check",
        choices=("vllm", "vllm-static"),
        help="write nothing below export/: will vLLM serve what lies there? vllm also loads it (RUN/vllm.json)",
    )
    parser.add_argument(
        "--python", metavar="PATH", help="--check vllm: the interpreter of an environment that has vLLM"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of logits with the trained model")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core import output
    from aifactory_train.core.errors import UserError
    from aifactory_train.run.folder import open_run

    if args.check:
        return _check(args)
    if args.python:
        raise UserError("is for --check vllm", where="--python")
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
    from aifactory_train.report.pack import refresh_artefacts

    if args.format == "gguf":
        from aifactory_train.exporting.gguf import export_gguf

        outcome = export_gguf(folder, args.type or "f16", step=args.step, verify=verify)
    else:
        from aifactory_train.exporting.writer import export_run

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
        f"{verdict['file']}: read back as it was written (relative difference {verdict['file_difference']:.1e}); "
        f"against the trained "
        f"model: {figures}, same greedy token at {verdict['greedy_agreement']:.1%} of the places"
    )


def _check(args: argparse.Namespace) -> int:
    from aifactory_train.core import output
    from aifactory_train.core.errors import EXIT_FAILED, UserError
    from aifactory_train.exporting import vllm_check
    from aifactory_train.run.folder import open_run

    for name in ("merge", "step", "type", "no_verify"):
        if getattr(args, name):
            raise UserError(
                "does not go with --check", where=f"--{name.replace('_', '-')}", fix="export first, then check"
            )
    folder, load = open_run(args.run_name), args.check == "vllm"
    recipe, trouble = folder.load_config(), None
    dtype = {"fp32": "float32", "bf16": "bfloat16", None: "auto"}[args.dtype]
    try:
        found = vllm_check.check(folder, recipe, load=load, python=args.python, dtype=dtype)
    except UserError as error:
        if error.where != "--check vllm":
            raise
        # no vLLM here: what its configuration tells is said all the same
        found, trouble = vllm_check.check(folder, recipe, load=False, python=None, dtype=dtype), error
    if args.json:
        output.print_json({"run": str(folder.path), **found})
    else:
        _print_findings(found)
    if trouble is not None:
        raise trouble
    kinds = found["kinds"].values()
    servable = [k for k in kinds if all(f["ok"] is not False for f in k["static"])]
    return 0 if servable else EXIT_FAILED


def _print_findings(found: dict[str, Any]) -> None:
    for kind, entry in found["kinds"].items():
        print(f"{kind}, by what {found['read_from']} says:")
        for finding in entry["static"]:
            mark = {True: "yes", False: "NO", None: "?"}[finding["ok"]]
            print(f"  {mark:>3}  {finding['about']}: {finding['said']}")
        load = entry["load"]
        if load is not None:
            print(
                f"  served by vLLM {load['vllm']} on {load['device']} in {load['dtype']}: {load['same_tokens']} of "
                f"{load['tokens']} "
                f"greedy tokens are transformers', log-probabilities within {load['logprob_difference']:.1e} nats"
            )
