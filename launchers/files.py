"""The files of a submission: what lies in ``submission/`` beside the script, and the manifest that holds their
digests.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.launchers import backends
from aifactory_train.launchers.container import edf
from aifactory_train.launchers.rendering import render
from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.shape import JobShape
from aifactory_train.launchers.submission import File, Submission, nul_joined
from aifactory_train.sites.profiles import System

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

PROGRAMS = Path(__file__).resolve().parent / "programs"


def add_files(sub: Submission, recipe: Recipe | None, context: dict[str, Any]) -> None:
    """Everything that lies in ``submission/`` beside the script, for the run or for each task of its array."""
    from aifactory_train.config.loading import load_recipe, to_tree
    from aifactory_train.core import yaml_text

    shape, request = sub.shape, sub.request
    rank = render("rank.sh.j2", context)
    node = render("node.sh.j2", context) if shape.style == "torchrun" else None
    folders: list[tuple[str, Recipe | None]] = [("", recipe)]
    if request.array:
        tasks = array_tasks(request)
        folders += [
            (f"{i:03d}/", load_recipe(request.recipe, [*request.overrides, *task])) for i, task in enumerate(tasks)
        ]
    base = f"{sub.run_dir}"
    for prefix, tree in folders:
        here = f"{prefix}submission/"
        run = f"{base}/{prefix}".rstrip("/")
        if tree is not None:
            text = "# The recipe with your overrides applied: what the ranks read.\n" + yaml_text.dump(to_tree(tree))
            sub.files.append(File(f"{here}recipe.yaml", text.encode()))
        sub.files.append(File(f"{here}arguments", nul_joined(arguments(sub, run))))
        sub.files.append(File(f"{here}environment", nul_joined([f"{k}={v}" for k, v in request.env])))
        sub.files.append(File(f"{here}rank.sh", rank.encode(), 0o755))
        if node is not None:
            sub.files.append(File(f"{here}node.sh", node.encode(), 0o755))
        for program in ("attempt.py", "preflight.py", "interface.py"):
            sub.files.append(File(f"{here}{program}", (PROGRAMS / program).read_bytes(), 0o755))
        sub.files.append(File(f"{here}policy.json", _json(policy(sub))))
    container = context.get("container")
    if container and container["runtime"] == "cscs-ce" and not container["image"].endswith(".toml"):
        sub.files.append(File("submission/environment.toml", edf(container).encode()))
    sub.files.append(File(f"submission/{backends.get(shape.backend).script_file}", b"", 0o755))
    sub.files.append(File("submission/manifest.json", b""))
    if sub.plan is not None:
        sub.files.append(File("plan.json", _json(sub.plan)))


def arguments(sub: Submission, run: str) -> list[str]:
    """Arguments of the rank's Python: the program, the resolved recipe, the run folder. Overrides are inside the
    recipe.
    """
    if sub.request.accept is not None:
        return ["-m", "aifactory_train", "accept", "--out", f"{run}/acceptance", "--run-dir", run, *sub.request.accept]
    program = sub.request.program or ("-m", "aifactory_train", "train")
    profile = ["--profile", sub.request.profile] if sub.request.profile is not None else []
    return [*program, f"{run}/submission/recipe.yaml", "--run-dir", run, "--resume", "auto", *profile]


def array_tasks(request: LaunchRequest) -> list[list[str]]:
    """Overrides of each task: the product of all ``--array key=v1,v2``."""
    tasks: list[list[str]] = [[]]
    for key, values in request.array:
        tasks = [[*task, f"{key}={value}"] for task in tasks for value in values]
    return tasks


def policy(sub: Submission) -> dict[str, Any]:
    """What the job may do by itself between attempts."""
    request, system = sub.request, sub.system
    how = request.resubmit or resubmit_of(system, sub.shape)
    if request.accept is not None:
        how = "none"  # a machine that fails is looked at, not tried again
    return {
        "resubmit": how,
        "unattended": system.policy.unattended_submission != "human-needed",
        "links": request.chain,
        "exclude": [*system.user.exclude_nodes, *request.exclude],
        "restarts": vars(request.restarts),
    }


def resubmit_of(system: System, shape: JobShape) -> str:
    """How a run goes on after its time limit: the site's way, as far as the scheduler can."""
    backend = backends.get(shape.backend)
    if not backend.chain:
        return "none"
    if backend.requeue and system.policy.resubmit == "requeue" and system.policy.requeue != "forbidden":
        return "requeue"
    return "chain"


def finish(sub: Submission) -> list[File]:
    """The files with script and manifest filled in; the manifest holds digests of all others."""
    script_name = f"submission/{backends.get(sub.shape.backend).script_file}"
    done = []
    for file in sub.files:
        if file.path == script_name:
            file = File(file.path, sub.script.encode(), file.mode)
        if file.path != "submission/manifest.json":
            done.append(file)
    manifest = {
        "version": __version__,
        "name": sub.name,
        "recipe": sub.request.recipe,
        "overrides": list(sub.request.overrides),
        "site": sub.system.id,
        "profile_expires": str(sub.system.expires),
        "backend": sub.shape.backend,
        "style": sub.shape.style,
        "nodes": sub.shape.nodes,
        "gpus_per_node": sub.shape.gpus_per_node,
        "ranks": sub.shape.ranks,
        "time_s": sub.shape.time_s,
        "gpu_hours_most": round(sub.shape.gpu_hours, 3),
        "environment_names": [name for name, _ in sub.request.env],
        "array": [" ".join(t) for t in array_tasks(sub.request)] if sub.request.array else None,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sha256": {file.path: hashlib.sha256(file.content).hexdigest() for file in done},
    }
    return [*done, File("submission/manifest.json", _json(manifest))]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()
