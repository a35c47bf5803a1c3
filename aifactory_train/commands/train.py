"""``aifactory train``: the training process itself, one per rank."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from aifactory_train.commands.arguments import add_overrides
from aifactory_train.core.errors import UserError
from aifactory_train.run.profiled_steps import steps_asked
from aifactory_train.sources import licences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="id of a recipe, a recipe file, or the run.yaml of a run")
    add_overrides(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run-dir", type=Path, metavar="DIR", help="the run folder (default: runs/RECIPE-TIME)")
    where.add_argument("--name", help="the run folder is runs/NAME")
    parser.add_argument(
        "--resume",
        metavar="auto|STEP|never",
        help="a folder that holds a stopped run: go on from its newest or a given checkpoint, or start over",
    )
    parser.add_argument(
        "--stop-at",
        type=float,
        metavar="EPOCH_SECONDS",
        help="end of the allocation: save and stop in time (default: AIFACTORY_STOP_AT or SLURM_JOB_END_TIME)",
    )
    parser.add_argument("--attempt", type=int, metavar="N", help="number of this attempt (launchers set it)")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="record where the time of these steps goes into profile/ of the run folder: a number of them, or A-B",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no tables")
    licences.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.run.folder import default_run_dir

    try:
        recipe = load_recipe(args.recipe, licences.overrides(args))
        licences.gate(recipe)
        folder = args.run_dir or (default_run_dir(recipe, args.name) if args.name else None)
        from aifactory_train.training.start import train

        if args.profile is not None:
            steps_asked(args.profile)
        return train(
            recipe,
            folder,
            resume=args.resume,
            quiet=args.quiet,
            attempt=args.attempt,
            stop_at=args.stop_at,
            profile=args.profile,
        )
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            raise
        return error.exit_code  # every rank meets the same fault; rank 0 prints it once for all
