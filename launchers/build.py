"""The pipeline: request + site (+ recipe, plan) → :class:`Submission` with all its files. Pure but for reading the clock's date
and the environment of the launching shell; nothing is written and nothing is asked of a scheduler.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.core.errors import UserError
from aifactory_train.launchers import request as rq
from aifactory_train.launchers.environment import SCRUBBED, environment_lines, gloo_pattern
from aifactory_train.launchers.request import Refusal, Request
from aifactory_train.launchers.shape import Shape, shape_of
from aifactory_train.launchers.submission import File, Line, Submission, nul_joined, quoted
from aifactory_train.sites import slurm_time
from aifactory_train.sites.profiles import System
from aifactory_train.sites.schema import Container

if TYPE_CHECKING:
    import jinja2

    from aifactory_train.config.schema import Recipe

ROOM = Path(__file__).resolve().parent
PROGRAMS = ROOM / "programs"
#: Seconds after torchrun's SIGTERM at which it sends SIGKILL to the rank program; the trainer goes before that.
TERM_GRACE_S = 25
PREFLIGHT_S = 180
#: Where images have software of their own: a Python named there is the image's, and the host's folder must not cover it.
IMAGE_ROOTS = ("/usr/", "/opt/")
#: What the file of an image, or of its description, ends in; another path is a folder.
IMAGE_SUFFIXES = (".sif", ".sqsh", ".img", ".toml")
#: A node-local path of a profile as it may stand between double quotes: plain characters and names of variables, ``$SLURM_JOB_ID``.
LOCAL_PATH = re.compile(r"/(?:[A-Za-z0-9._/-]|\$[A-Z][A-Z0-9_]*)*")


@functools.lru_cache(maxsize=1)
def templates() -> jinja2.Environment:
    """The templates of this room; an undefined name is an error, and ``q`` is the only way in for outside text."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOM / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    made.globals["q"] = quoted
    return made


def build(
    request: Request, system: System, recipe: Recipe, *, plan: dict[str, Any] | None = None, files: bool = True
) -> Submission:
    """The whole submission; without ``files`` only its script, which is all that is looked at in a dry run.

    Raises :class:`Refusal` for text that may not enter a script and for impossible combinations.
    """
    request = request.checked()
    shape = shape_of(request, system)
    name = run_name(request, recipe)
    run_dir = run_folder(request, system, name)
    sub = Submission(request, system, shape, name, run_dir, plan=plan)
    context = _context(sub, recipe)
    if shape.backend == "kubernetes":
        from aifactory_train.launchers.backends.kubernetes import manifest

        _files(sub, recipe, context)
        sub.files.append(File("submission/job.sh", _render("plain.sh.j2", context).encode(), 0o755))
        sub.script = manifest(sub)
    else:
        template = "slurm.sh.j2" if shape.backend == "slurm" else "plain.sh.j2"
        sub.script = _render(template, context)
        if files:
            _files(sub, recipe, context)
    return sub


# ---- names and folders


def run_name(request: Request, recipe: Recipe) -> str:
    if request.name is not None:
        return rq.run_name(request.name)
    if request.run_dir is not None:
        last = Path(request.run_dir).name
        if rq.NAME.fullmatch(last):
            return last
    base = recipe.id.replace("/", "-")[:48]
    return rq.run_name(base, "recipe id")


def run_folder(request: Request, system: System, name: str) -> Path:
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


# ---- what the templates need


def _context(sub: Submission, recipe: Recipe) -> dict[str, Any]:
    request, system, shape = sub.request, sub.system, sub.shape
    container = container_of(request, system) if shape.backend not in ("local", "mpi", "kubernetes") else None
    node_local = _node_local(system) if shape.backend not in ("local", "mpi") else None
    modules = list(system.user.modules if system.user.modules is not None else system.software.modules)
    if container is not None and container.module:
        modules.append(container.module)
    remote = shape.backend in ("slurm", "pbspro", "torque")
    preflight = _preflight(sub)
    signal = system.policy.signal
    login = system.launch.login_shell
    cache = _cache(system, shape)
    python = python_of(sub, container)
    hang = request.hang_s
    mounts = mounts_of(sub, recipe, container, python) if container is not None else []
    context: dict[str, Any] = {
        "shebang": sub.line(
            "#!/bin/bash -l" if login else "#!/bin/bash",
            "modules are set up by login shells only here" if login else "the shell of the script",
            "launch.login_shell" if login else None,
        ).text,
        "banner": f"{sub.name} at {system.id}: written by aifactory-train {__version__}; `aifactory launch ... --explain` gives the reason for every line",
        "system": system.name,
        "backend": shape.backend,
        "run_dir": str(sub.run_dir),
        "array": bool(request.array),
        "scrubbed": SCRUBBED,
        "environment": environment_lines(sub, recipe, cache),
        "unset": _unset(system),
        "time_s": shape.time_s,
        "stop_margin": 5 if shape.time_s < 900 else 20,
        "world": shape.ranks,
        "nodes": shape.nodes,
        "gpus_per_node": shape.gpus_per_node,
        "ranks_per_node": shape.ranks_per_node,
        "signal": signal,
        "hang_s": hang,
        "preflight": preflight,
        "preflight_s": PREFLIGHT_S,
        "program": "node.sh" if shape.style == "torchrun" else "rank.sh",
        "ranks_from": {"torchrun": "torchrun", "srun": "srun", "mpi": "mpi"}[shape.style],
        "node_local": node_local,
        "node_rank": '"${SLURM_NODEID}"'
        if shape.backend == "slurm"
        else ('"${JOB_COMPLETION_INDEX:-0}"' if shape.backend == "kubernetes" else "0"),
        "numa_binding": system.launch.torchrun_numa_binding if remote and shape.style == "torchrun" else None,
        "amd": system.gpu.vendor == "amd",
        "unified": bool(system.gpu.unified_memory),
        "gloo": gloo_pattern(system) if shape.backend not in ("local", "mpi") else None,
        "transport": system.interconnect.transport if shape.nodes > 1 else None,
        "term_grace": TERM_GRACE_S,
        "address_function": address_function(system, shape),
        "module_use": list(system.software.use) if remote and modules else [],
        "modules": modules if remote else [],
        "module_lines": _module_lines(sub, modules) if remote else [],
        "container": _container_context(sub, container, mounts) if container is not None else None,
        "inside": "",
        "python": python,
        "helper": python if container is None and not _python_elsewhere(python) else "python3",
        "starter": [],
        "srun_options": [],
        "directives": [],
    }
    if container is not None:
        context["inside"] = context["container"]["prefix"]
    if shape.backend == "slurm":
        from aifactory_train.launchers.backends.slurm import directives, srun_options

        context["directives"] = directives(sub)
        context["srun_options"] = srun_options(sub, container, mounts)
    elif shape.backend == "pbspro":
        from aifactory_train.launchers.backends.pbspro import directives, starter

        context["directives"] = directives(sub)
        context["starter"] = starter(sub)
    elif shape.backend == "torque":
        from aifactory_train.launchers.backends.torque import directives

        context["directives"] = directives(sub)
    elif shape.backend == "mpi":
        from aifactory_train.launchers.backends.mpi import starter

        context["starter"] = starter(sub)
    return context


def _render(name: str, context: dict[str, Any]) -> str:
    text = templates().get_template(name).render(**context)
    # Template branches leave blank lines; at most one in a row is for readers.
    out: list[str] = []
    for line in text.split("\n"):
        if line.strip() or (out and out[-1].strip()):
            out.append(line.rstrip())
    return "\n".join(out).rstrip("\n") + "\n"


def _cache(system: System, shape: Shape) -> str:
    from aifactory_train.config.loading import cache_dir

    if os.environ.get("AIFACTORY_CACHE") or shape.backend in ("local", "mpi") or not system.user.work_dir:
        return str(cache_dir())
    return f"{system.user.work_dir}/aifactory-cache"


def _unset(system: System) -> list[str]:
    return [name for name in system.environment.avoid if rq.ENV_NAME.fullmatch(name)]


def _node_local(system: System) -> str:
    """Shell text of the node-local folder: the site's variable, else its path (in which the node's variables stay), else /tmp."""
    for fs in system.filesystems:
        if fs.role == "node-local" and fs.on_compute:
            if fs.variable and rq.ENV_NAME.fullmatch(fs.variable.lstrip("$")):
                return f'"${{{fs.variable.lstrip("$")}:-/tmp}}"'
            if fs.path and "$" not in fs.path and "{" not in fs.path:
                return quoted(fs.path)
            if fs.path and LOCAL_PATH.fullmatch(fs.path):
                return f'"{fs.path}"'
    return "/tmp"


def _module_lines(sub: Submission, modules: list[str]) -> list[Line]:
    system = sub.system
    out = []
    own = system.user.modules is not None
    if system.software.purge and modules:
        out.append(sub.line("module purge || true", "a clean module environment", "software.purge"))
    for folder in system.software.use if modules else []:
        out.append(sub.line(f"module use {quoted(folder)}", "where the site keeps these modules", "software.use"))
    for name in modules:
        out.append(
            sub.line(
                f"module load {quoted(name)} || die {quoted(f'module {name} is not there')}",
                "from your site file (user.modules)" if own else "software of the site, in its documented order",
                None if own else "software.modules",
            )
        )
    return out


def _python_elsewhere(python: str) -> bool:
    return "/" not in python


def _preflight(sub: Submission) -> bool:
    if sub.request.preflight == "on":
        return True
    if sub.request.preflight == "off":
        return False
    return sub.shape.backend in ("slurm", "pbspro") and sub.shape.nodes > 1


def container_of(request: Request, system: System) -> Container | None:
    """The container that ranks run in: yours, else the profile's first with an image; none where you name a venv."""
    own = request.container or system.user.container_image
    if own is not None:
        base = system.software.containers[0] if system.software.containers else Container(runtime="apptainer")
        return base.model_copy(
            update={
                "image": rq.image(own, "--container"),
                "pattern": "*.sif",  # the profile's pattern is for the site's own folder of images
                "binds": [*base.binds, *system.user.container_binds],
            }
        )
    if request.venv or system.user.venv or system.software.provides_torch:
        return None
    for container in system.software.containers:
        if container.image:
            return container.model_copy(update={"binds": [*container.binds, *system.user.container_binds]})
    return None


def python_of(sub: Submission, container: Container | None) -> str:
    """The interpreter of the ranks; where nothing names one, the environment that ``aifactory env`` builds."""
    request, system, shape = sub.request, sub.system, sub.shape
    venv = request.venv or system.user.venv
    if venv:
        return str(rq.path(venv, "--venv") / "bin" / "python")
    if container is not None:
        sub.notes.append(
            f"Python of the ranks: {env_folder(system)}/bin/python inside the container, which `aifactory env --site {system.id}` builds"
        )
        return f"{env_folder(system)}/bin/python"
    if shape.backend == "kubernetes":
        return "python3"  # the pod's image is the environment
    if shape.backend in ("local", "mpi") or system.id in ("local", "lab", "generic-slurm") or _at(system):
        return sys.executable
    if system.software.provides_torch:
        return "python3"
    sub.notes.append(
        f"Python of the ranks: {env_folder(system)}/bin/python, which `aifactory env --site {system.id}` builds; --venv or user.venv names another"
    )
    return f"{env_folder(system)}/bin/python"


def env_folder(system: System) -> str:
    """Where ``aifactory env`` builds the environment of a site: below your work folder, else below ``~/aifactory``."""
    root = system.user.work_dir or str(Path.home() / "aifactory")
    return str(rq.path(f"{root}/env-{system.id}", "user.work_dir"))


@functools.lru_cache(maxsize=4)
def _at_id(system_id: str) -> bool:
    from aifactory_train.sites import identify

    return identify() == system_id


def _at(system: System) -> bool:
    return _at_id(system.id)


def uenv_of(request: Request, system: System) -> str | None:
    """The uenv that the job's directives name (CSCS: a plug-in of Slurm mounts it), or None."""
    for flag in (*request.extra_flags, *system.request.flags):
        if flag.startswith("--uenv="):
            return flag.partition("=")[2]
    return None


def mounts_of(sub: Submission, recipe: Recipe, container: Container, python: str) -> list[str]:
    """Every folder of the host that the ranks use inside the container, ``PATH`` or ``SOURCE:TARGET``, whatever the runtime.

    Run folder, the environment that the ranks' Python lies in, your work folder, the cache, and local data of the recipe. A
    folder below another of the list is left out: it is there already.
    """
    from aifactory_train.config.loading import to_tree
    from aifactory_train.config.source_spec import parse

    folders = [str(sub.run_dir)]
    environment = str(Path(python).parent.parent)
    if python.startswith("/") and not any(f"{environment}/".startswith(root) for root in IMAGE_ROOTS):
        folders.append(environment)
    if sub.system.user.work_dir:
        folders.append(os.path.abspath(sub.system.user.work_dir))
    folders.append(_cache(sub.system, sub.shape))
    if os.environ.get("HF_HOME"):
        folders.append(os.environ["HF_HOME"])
    for source in (recipe.model.base, *[d.source for d in (*recipe.data.train, *(recipe.data.eval or []))]):
        spec = parse(source)
        # A relative path is looked for where the job is submitted: nothing to mount where that is not here.
        if spec.kind == "local" and (spec.name.startswith("/") or os.path.exists(spec.name)):
            folders.append(_folder_of(spec.name))
    folders += [_folder_of(text) for text in _strings(to_tree(recipe)) if text.startswith("/") and os.path.exists(text)]
    folders += [_folder_of(v) for _, values in sub.request.array for v in values if v.startswith("/")]
    kept: list[str] = []
    for folder in sorted(dict.fromkeys(folders), key=lambda f: len(Path(f).parts)):
        if rq.PATH_FORBIDDEN.search(folder) or folder == "/":
            sub.notes.append(f"{folder} is not mounted into the container: mounts cannot name it; use a plain path")
        elif not any(folder == k or folder.startswith(k.rstrip("/") + "/") for k in kept):
            kept.append(folder)
    return [*kept, *[b for b in container.binds if b and b not in kept]]


def _folder_of(name: str) -> str:
    """The folder to mount for a local path: itself, or the one that a file lies in."""
    path = Path(os.path.abspath(name))
    file = path.is_file() or (path.suffix != "" and not path.is_dir())
    return str(path.parent if file else path)


def _strings(tree: Any) -> Iterator[str]:
    """Every text in a tree of mappings and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _strings(value)


def _mount(bind: str) -> str:
    """A bind as ``SOURCE:TARGET``."""
    return bind if ":" in bind else f"{bind}:{bind}"


def _container_context(sub: Submission, container: Container, binds: list[str]) -> dict[str, Any]:
    """Image and the command prefix that enters it (empty for runtimes that srun itself drives)."""
    image = container.image or ""
    prefix = ""
    if container.runtime in ("singularity", "apptainer"):
        words = [
            container.runtime,
            "exec",
            *([container.gpu_flag] if container.gpu_flag else []),
            *container.exec_flags,
        ]
        words += [f"--bind={b}" for b in binds]
        prefix = " ".join(quoted(w) for w in words) + ' "$AIFACTORY_IMAGE" '
    elif container.runtime == "sarus":
        words = [
            "sarus",
            "run",
            *container.exec_flags,
            *["--mount=type=bind,source={},destination={}".format(*_mount(b).split(":")[:2]) for b in binds],
        ]
        prefix = " ".join(quoted(w) for w in words) + ' "$AIFACTORY_IMAGE" '
    elif container.runtime == "docker":
        raise Refusal(
            "container-runtime",
            "docker cannot be started inside a batch job",
            where="software.containers",
            fix="convert the image for apptainer, or name a venv with --venv",
        )
    own = bool(sub.request.container or sub.system.user.container_image)
    sub.line(f"image={quoted(image)}", "the image that holds torch", None if own else "software.containers")
    if container.runtime == "cscs-ce" and image.endswith(".toml"):
        sub.notes.append(f"{image} is taken as it is: its mounts must cover {', '.join(binds)}")
    return {
        "image": image,
        # A registry's reference is no path of this machine: the runtime finds it.
        "file": image.startswith(("/", ".", "~")) or image.endswith(IMAGE_SUFFIXES),
        "directory": not image.endswith(IMAGE_SUFFIXES),
        "pattern": container.pattern,
        "own": own,
        "prefix": prefix,
        "runtime": container.runtime,
        "mounts": [_mount(b) for b in binds],
    }


def address_function(system: System, shape: Shape) -> str:
    """The shell function that prints the address under which other nodes reach this one."""
    head = system.launch.head_address
    if shape.backend in ("local", "mpi"):
        return "address_of_this_node() { echo 127.0.0.1; }"
    assignment = body = ""
    if shape.backend != "slurm" and head.strategy == "nodeaddr":
        body = "hostname -f 2>/dev/null || hostname"
    elif head.strategy == "nodeaddr":
        body = "scontrol show node \"$SLURMD_NODENAME\" --oneliner | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p'"
    elif head.strategy == "hostname":
        body = "hostname -s"
    elif head.strategy == "fqdn":
        body = "hostname -f"
    elif head.strategy == "suffix":
        assignment = f"$({'hostname -s' if head.strip_domain else 'hostname'}){_plain(head.suffix)}"
    elif head.strategy == "interface":
        body = f"ip -o -4 addr show dev {quoted(head.interface)} | awk '{{ split($4, a, \"/\"); print a[1]; exit }}'"
    else:
        raise UserError(
            "the head-address strategy 'command' is not carried out: profiles hold no code",
            where=f"{system.id}: launch.head_address.strategy",
            fix="use hostname, fqdn, nodeaddr, suffix or interface",
        )
    assignment = assignment or f"$({body})"
    lookup = "ahostsv4" if head.family == "inet" else "ahostsv6" if head.family == "inet6" else "ahosts"
    last = (
        f"getent {lookup} \"$name\" | awk 'NR == 1 {{ print $1 }}'"
        if head.resolve or head.family
        else 'getent ahosts "$name" > /dev/null && echo "$name"'
    )
    return f'address_of_this_node() {{\n  local name\n  name={assignment} || return 1\n  [ -n "$name" ] || return 1\n  {last}\n}}'


def _plain(suffix: str | None) -> str:
    text = suffix or ""
    if not all(c.isalnum() or c in ".-" for c in text):
        raise UserError(f"'{text}' is no suffix of a host name", where="launch.head_address.suffix")
    return text


# ---- files


def _files(sub: Submission, recipe: Recipe, context: dict[str, Any]) -> None:
    """Everything that lies in ``submission/`` beside the script, for the run or for each task of its array."""
    import yaml

    from aifactory_train.config.loading import load_recipe, to_tree

    shape, request = sub.shape, sub.request
    rank = _render("rank.sh.j2", context)
    node = _render("node.sh.j2", context) if shape.style == "torchrun" else None
    folders = [("", recipe)]
    if request.array:
        tasks = array_tasks(request)
        folders += [
            (f"{i:03d}/", load_recipe(request.recipe, [*request.overrides, *task])) for i, task in enumerate(tasks)
        ]
    base = f"{sub.run_dir}"
    for prefix, tree in folders:
        here = f"{prefix}submission/"
        run = f"{base}/{prefix}".rstrip("/")
        text = "# The recipe with your overrides applied: what the ranks read.\n" + yaml.safe_dump(
            to_tree(tree), sort_keys=False, allow_unicode=True
        )
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
        sub.files.append(File("submission/environment.toml", _edf(container).encode()))
    sub.files.append(File("submission/" + ("job.yaml" if shape.backend == "kubernetes" else "job.sh"), b"", 0o755))
    sub.files.append(File("submission/manifest.json", b""))
    if sub.plan is not None:
        sub.files.append(File("plan.json", _json(sub.plan)))


def arguments(sub: Submission, run: str) -> list[str]:
    """Arguments of the rank's Python: the program, the resolved recipe, the run folder. Overrides are inside the recipe."""
    program = sub.request.program or ("-m", "aifactory_train", "train")
    return [*program, f"{run}/submission/recipe.yaml", "--run-dir", run, "--resume", "auto"]


def array_tasks(request: Request) -> list[list[str]]:
    """Overrides of each task: the product of all ``--array key=v1,v2``."""
    tasks: list[list[str]] = [[]]
    for key, values in request.array:
        tasks = [[*task, f"{key}={value}"] for task in tasks for value in values]
    return tasks


def policy(sub: Submission) -> dict[str, Any]:
    """What the job may do by itself between attempts."""
    request, system = sub.request, sub.system
    how = request.resubmit or resubmit_of(system, sub.shape)
    return {
        "resubmit": how,
        "unattended": system.policy.unattended_submission != "human-needed",
        "links": request.chain,
        "exclude": [*system.user.exclude_nodes, *request.exclude],
        "restarts": vars(request.restarts),
    }


def resubmit_of(system: System, shape: Shape) -> str:
    if shape.backend in ("local", "mpi", "kubernetes"):
        return "none"
    if system.policy.resubmit == "requeue" and system.policy.requeue != "forbidden" and shape.backend == "slurm":
        return "requeue"
    return "chain"


def finish(sub: Submission) -> list[File]:
    """The files with script and manifest filled in; the manifest holds digests of all others."""
    script_name = "submission/job.yaml" if sub.shape.backend == "kubernetes" else "submission/job.sh"
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


def _edf(container: dict[str, Any]) -> str:
    """The environment definition file of the CSCS Container Engine. Nothing of the host is inside but what it mounts."""
    mounts = ", ".join(json.dumps(m, ensure_ascii=False) for m in container["mounts"])
    return (
        f"image = {json.dumps(container['image'])}\nmounts = [{mounts}]\nwritable = true\n\n"
        '[annotations]\ncom.hooks.aws_ofi_nccl.enabled = "true"\ncom.hooks.aws_ofi_nccl.variant = "cuda-dl"\n'
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()


def walltime(shape: Shape) -> str:
    return slurm_time(shape.time_s)
