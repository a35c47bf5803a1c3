"""``aifactory plan``: memory, strategy, speed and cost of a recipe at a site, with reasons. Needs no GPU, no torch, no
network.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from aifactory_train.commands.arguments import add_overrides, add_size
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="id such as health/phenotype-terms, or a YAML file")
    parser.add_argument("--site", metavar="S", required=True, help="system to plan for ('aifactory sites' lists them)")
    parser.add_argument("--site-file", metavar="FILE", type=Path, help="overlay with corrections and your own values")
    parser.add_argument("--nodes", metavar="N", default="1", help="number of nodes, or 'auto' (default 1)")
    parser.add_argument("--gpus-per-node", metavar="N", type=int, help="default: all of a node")
    parser.add_argument("--partition", metavar="P", help="default: your overlay's, else the site's")
    parser.add_argument("--qos", metavar="Q", help="default: your overlay's, else the partition's")
    parser.add_argument(
        "--deadline", metavar="H", type=float, help="with --nodes auto: hours in which the run has to finish"
    )
    parser.add_argument("--budget", metavar="GPU_H", type=float, help="with --nodes auto: GPU-hours that may be spent")
    parser.add_argument(
        "--site-budget",
        metavar="N",
        type=float,
        help="the same in the unit that the site bills in ('aifactory sites S')",
    )
    add_size(parser)
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="the plan as one line of JSON")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with the memory stack and the scaling curve"
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="run one step on the meta device and count FLOPs, bytes, launches, memory, collectives (needs torch, or "
        "an audit of the same plan in the cache)",
    )
    parser.add_argument(
        "--verify-sharding",
        action="store_true",
        help="build the sharded model with a fake world and compare (needs torch)",
    )


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core.output import note, print_json

    plan, job = build(args)
    if args.audit:
        from aifactory_train.audit import kept

        plan["audit"] = kept.of_plan(job, load_recipe(args.recipe, list(args.overrides)))
    if args.verify_sharding:
        from aifactory_train.planning.verify_sharding import compare

        plan["verified_sharding"] = compare(job)
    if args.html:
        from aifactory_train.planning.page import write_page

        write_page(plan, args.html)
        note(f"written: {args.html}")
    if args.json:
        print_json(plan)
    else:
        from aifactory_train.planning.show import show

        show(plan)
        if args.audit:
            kept.show(plan["audit"])
    return 0


def build(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The plan of the parsed arguments as plain values, and its chosen job."""
    from aifactory_train import sites
    from aifactory_train.planning import keys_set, plan_for
    from aifactory_train.sites.billing import gpu_hours_of

    overrides = list(args.overrides)
    recipe = load_recipe(args.recipe, overrides)
    system = sites.load(args.site, overlay=args.site_file or None)
    nodes = _nodes(args.nodes)
    for name in ("deadline", "budget", "site_budget", "tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError("must be a positive number", where=f"--{name.replace('_', '-')}")
    if nodes is not None and (args.deadline or args.budget or args.site_budget):
        raise UserError(
            "a deadline or a budget chooses the number of nodes", where="--nodes", fix="use --nodes auto with it"
        )
    partition = args.partition or system.user.partition
    qos = args.qos or (system.user.qos if system.user.qos in system.qos else None)
    budgets = [args.budget] if args.budget else []
    if args.site_budget:
        job = {"gpus_per_node": args.gpus_per_node, "partition": partition or system.default_partition, "qos": qos}
        budgets.append(gpu_hours_of(system, args.site_budget, **job))
    return plan_for(
        recipe,
        system,
        nodes,
        gpus_per_node=args.gpus_per_node,
        partition=partition,
        qos=qos,
        deadline_hours=args.deadline,
        budget_gpu_hours=min(budgets, default=None),
        tokens=args.tokens,
        model_config=args.model_config,
        given=keys_set(overrides),
    )


def _nodes(text: str) -> int | None:
    if text == "auto":
        return None
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise UserError("a number of nodes from 1, or 'auto'", where=f"--nodes {text}")
    return int(text)
