"""``aifactory export``: adapter or weights of a checkpoint, merged weights of an adapter, behind the logits gate."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run below runs/, or its folder")
    parser.add_argument("--merge", action="store_true", help="write weights with the adapter merged in (export/merged)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="type of whole or merged weights (default: the recipe's)"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="export the checkpoint of this step (default: what the run ended with)"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of logits with the trained model")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train import output
    from aifactory_train.export import export_run
    from aifactory_train.record.pack import refresh_artefacts
    from aifactory_train.runs import open_run

    folder = open_run(args.run_name)
    verify = False if args.no_verify else None
    outcome = export_run(folder, merge=args.merge, dtype=args.dtype, verify=verify, step=args.step)
    refresh_artefacts(folder, outcome)  # the record and the signed manifest speak of what lies in export/
    if args.json:
        output.print_json({"run": str(folder.path), **outcome})
        return 0
    for kind, path in outcome["paths"].items():
        print(f"{kind}: {path}")
        verdict = outcome["gate"].get(kind)
        if verdict is None:
            print("  not compared with the trained model (--no-verify or export.verify)")
        else:
            print(
                f"  same as the trained model: relative difference {verdict['difference']:.1e}, top-1 agreement "
                f"{verdict['top1_agreement']:.4f}, mean KL {verdict['mean_kl']:.1e} nats over {verdict['places']} places "
                f"({verdict['limit']})"
            )
    return 0
