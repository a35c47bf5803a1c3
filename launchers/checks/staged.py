"""Rules on what must be there before: model, data, space, the commands that submit."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.launchers.checks.rules import (
    Context,
    Finding,
    batch_rule,
    lies_in,
    not_checked,
    recipe_rule,
    refuse,
    rule,
)


@recipe_rule
def model_staged(c: Context) -> Iterator[Finding]:
    """The base model lies where compute nodes can read it."""
    if c.batch and not c.here:
        yield not_checked(
            f"the model {c.recipe.model.base} in the cache at {c.system.name}", fix="aifactory fetch on a login node"
        )
        return
    from aifactory_train.sources import resolve_model

    yield from _readable(c, partial(resolve_model, c.recipe.model), f"the model {c.recipe.model.base} is", "model.base")


@recipe_rule
def data_staged(c: Context) -> Iterator[Finding]:
    """The data lie where compute nodes can read them."""
    sources = [*c.recipe.data.train, *(c.recipe.data.eval or [])]
    if c.batch and not c.here:
        yield not_checked(
            f"{len(sources)} data source(s) in the cache at {c.system.name}", fix="aifactory fetch on a login node"
        )
        return
    from aifactory_train.sources import resolve_data

    for source in sources:
        yield from _readable(c, partial(resolve_data, source), f"the data {source.source} are", "data")


def _readable(c: Context, resolve: Callable[[], Path], subject: str, where: str) -> Iterator[Finding]:
    try:
        path = resolve()
    except UserError as error:
        yield refuse(f"{subject} not there: {error.what}", fix=f"aifactory fetch {c.request.recipe}", where=where)
        return
    under, never = c.system.launch.output_must_be_under, c.system.launch.output_must_not_be_under
    text = os.path.abspath(path)
    if c.batch and ((under and not lies_in(text, under)) or lies_in(text, never)):
        yield refuse(
            f"{text} is not visible on compute nodes of {c.system.name}",
            c.fact("launch.output_must_be_under"),
            "set AIFACTORY_CACHE to a folder that compute nodes see and fetch again",
            where,
        )
    elif not os.access(path, os.R_OK):
        yield refuse(f"{text} cannot be read", fix="check its permissions", where=where)


@rule
def scratch_space(c: Context) -> Iterator[Finding]:
    """There is room for the run."""
    if c.batch and not c.here:
        yield not_checked(f"free space for the run at {c.system.name}")
        return
    folder = c.sub.run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield refuse(f"{folder} cannot be written", fix="choose another --run-dir", where="--run-dir")
        return
    needed = 0.0 if c.request.accept is not None else _checkpoints(c)
    free = shutil.disk_usage(folder).free / 2**30
    if free < max(1.0, needed):
        yield refuse(
            f"{free:.1f} GiB are free at {folder}, the run needs {max(1.0, needed):.1f}",
            fix="choose another --run-dir, or a smaller checkpoint.keep",
            where="--run-dir",
        )


def _checkpoints(c: Context) -> float:
    """GiB of the checkpoints that a run keeps at most."""
    memory = (c.sub.plan or {}).get("memory_gib") or {}
    # What a checkpoint holds of one rank: trained parameters and optimizer state; the planner's figures are per rank.
    state = (
        float(memory.get("parameters") or 0) + float(memory.get("optimizer") or 0)
        if c.recipe.adapter.kind == "none"
        else float(memory.get("adapters") or 0) * 3
    )
    return state * c.shape.ranks * (c.recipe.checkpoint.keep + 1)


@batch_rule
def scheduler_here(c: Context) -> Iterator[Finding]:
    """The scheduler's commands are here when something is to be submitted."""
    if not c.submitting:
        return
    gone = c.backend.missing_programs()
    if gone:
        yield refuse(
            f"no {', '.join(gone)} on this machine ({platform.node()})",
            fix="submit from a login node of the site; --dry-run prints the script anywhere",
            where="PATH",
        )


@rule
def mpirun_here(c: Context) -> Iterator[Finding]:
    """mpirun is here for backend mpi."""
    missing = c.backend.missing_starter() if c.submitting else None
    if missing is not None:
        what, fix = missing
        yield refuse(what, fix=fix, where="PATH")
