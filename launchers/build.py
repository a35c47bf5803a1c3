"""The pipeline: request + site (+ recipe, plan) → :class:`Submission` with all its files. Pure but for reading the
clock's date and the environment of the launching shell; nothing is written and nothing is asked of a scheduler.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.launchers import backends
from aifactory_train.launchers import request as rq
from aifactory_train.launchers.context import context_of
from aifactory_train.launchers.files import add_files
from aifactory_train.launchers.rendering import render
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.shape import JobShape
from aifactory_train.launchers.shaping import shape_of
from aifactory_train.launchers.submission import File, Submission
from aifactory_train.sites.profiles import System

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

SHELL_SCRIPT = "job.sh"


def build(
    request: LaunchRequest,
    system: System,
    recipe: Recipe | None,
    *,
    shape: JobShape | None = None,
    plan: dict[str, Any] | None = None,
    files: bool = True,
) -> Submission:
    """The whole submission; without ``files`` only its script, which is all that is looked at in a dry run.

    ``recipe`` is None where the request is for an acceptance.
    ``shape`` is that of :func:`shape_of`, where it is known already. Raises :class:`Refusal` for text that may not
    enter a script and for impossible combinations.
    """
    request = request.checked()
    shape = shape or shape_of(request, system)
    backend = backends.get(shape.backend)
    name = run_name(request, recipe)
    sub = Submission(request, system, shape, name, run_folder(request, system, name), plan=plan)
    context = context_of(sub, recipe)
    script = render(backend.template, context)
    carried = backend.script_file != SHELL_SCRIPT  # what the scheduler gets holds script and files
    if files or carried:
        add_files(sub, recipe, context)
    if carried:
        sub.files.append(File(f"submission/{SHELL_SCRIPT}", script.encode(), 0o755))
    sub.script = backend.document(sub, script)
    return sub


# ---- names and folders


def run_name(request: LaunchRequest, recipe: Recipe | None) -> str:
    if request.name is not None:
        return rq.run_name(request.name)
    if request.run_dir is not None:
        last = Path(request.run_dir).name
        if rq.NAME.fullmatch(last):
            return last
    if recipe is None:
        return f"acceptance-{request.site}" if rq.NAME.fullmatch(f"acceptance-{request.site}") else "acceptance"
    base = recipe.id.replace("/", "-")[:48]
    return rq.run_name(base, "recipe id")


def run_folder(request: LaunchRequest, system: System, name: str) -> Path:
    """``--run-dir``; else ``runs/NAME`` below your work folder at a site, or below the current folder."""
    if request.run_dir is not None:
        return Path(os.path.abspath(rq.path(request.run_dir, "--run-dir")))
    root = Path(os.path.abspath(rq.path(system.user.work_dir, "user.work_dir"))) if system.user.work_dir else Path.cwd()
    stem = root / "runs" / name
    if request.name is not None or request.resume:
        found = stem
    else:
        found = stem
        number = 2
        while found.exists():
            found = stem.with_name(f"{stem.name}-{number}")
            number += 1
    return rq.path(found, "run folder")
