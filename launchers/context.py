"""What the templates need, as names and shell text: one group of names a function."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.core.errors import UserError
from aifactory_train.launchers import backends
from aifactory_train.launchers import request as rq
from aifactory_train.launchers.container import (
    cache_folder,
    container_context,
    container_of,
    mounts_of,
    python_of,
    say_what_imports_cost,
)
from aifactory_train.launchers.environment import environment_lines, gloo_pattern
from aifactory_train.launchers.shape import JobShape
from aifactory_train.launchers.submission import Line, Submission, quoted
from aifactory_train.sites.profiles import System
from aifactory_train.sites.schema import Container

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Seconds after torchrun's SIGTERM at which it sends SIGKILL to the rank program; the trainer goes before that.
TERM_GRACE_S = 25
PREFLIGHT_S = 180
#: A node-local path of a profile as it may stand between double quotes: plain characters and names of variables,
#: ``$SLURM_JOB_ID``.
LOCAL_PATH = re.compile(r"/(?:[A-Za-z0-9._/-]|\$[A-Z][A-Z0-9_]*)*")


def context_of(sub: Submission, recipe: Recipe | None) -> dict[str, Any]:
    """Every name that a template may use. Lines that carry a reason are registered with the submission on the way."""
    container = None
    if backends.get(sub.shape.backend).software == "site":
        container = container_of(sub.request, sub.system)
    python = python_of(sub, container)
    say_what_imports_cost(sub, container, python)
    mounts = mounts_of(sub, recipe, container, python) if container is not None else []
    return {
        **_job(sub),
        "more_groups": _more_groups(sub, recipe),
        **_machine(sub),
        "environment": environment_lines(sub, recipe, cache_folder(sub.system, sub.shape)),
        **_software(sub, container, mounts, python),
        **_scheduler(sub, container, mounts),
    }


def _job(sub: Submission) -> dict[str, Any]:
    """The job as it was asked for: its size, its limits, what is run and how it is watched."""
    request, system, shape = sub.request, sub.system, sub.shape
    login = system.launch.login_shell
    return {
        "shebang": sub.line(
            "#!/bin/bash -l" if login else "#!/bin/bash",
            "modules are set up by login shells only here" if login else "the shell of the script",
            "launch.login_shell" if login else None,
        ).text,
        "banner": f"{sub.name} at {system.id}: written by aifactory-train {__version__}; `aifactory launch ... "
        f"--explain` gives the reason for every line",
        "run_dir": str(sub.run_dir),
        "array": bool(request.array),
        "time_s": shape.time_s,
        "stop_margin": 5 if shape.time_s < 900 else 20,
        "world": shape.ranks,
        "nodes": shape.nodes,
        "gpus_per_node": shape.gpus_per_node,
        "ranks_per_node": shape.ranks_per_node,
        "hang_s": request.hang_s,
        "preflight": _preflight(sub),
        "preflight_s": PREFLIGHT_S,
        "program": "node.sh" if shape.style == "torchrun" else "rank.sh",
        "ranks_from": shape.style,
        "term_grace": TERM_GRACE_S,
    }


def _machine(sub: Submission) -> dict[str, Any]:
    """The machine's facts that scripts rest on."""
    system, shape = sub.system, sub.shape
    backend = backends.get(shape.backend)
    return {
        "system": system.name,
        "unset": _unset(system),
        "signal": system.policy.signal,
        "node_local": _node_local(system) if backend.batch else None,
        "numa_binding": system.launch.torchrun_numa_binding
        if backend.software == "site" and shape.style == "torchrun" and sub.request.accept is None
        else None,
        "amd": system.gpu.vendor == "amd",
        "unified": bool(system.gpu.unified_memory),
        "gloo": gloo_pattern(system) if backend.batch else None,
        "transport": system.interconnect.transport if shape.nodes > 1 else None,
        "address_function": address_function(system, shape),
    }


def _software(sub: Submission, container: Container | None, mounts: list[str], python: str) -> dict[str, Any]:
    """Modules, container and Python of the ranks."""
    system = sub.system
    modules = []
    if backends.get(sub.shape.backend).software == "site":
        modules += system.user.modules if system.user.modules is not None else system.software.modules
    if container is not None and container.module:
        modules.append(container.module)
    lines = _module_lines(sub, modules)
    inside = container_context(sub, container, mounts) if container is not None else None
    return {
        "module_use": list(system.software.use) if modules else [],
        "modules": modules,
        "module_lines": lines,
        "container": inside,
        "inside": inside["prefix"] if inside is not None else "",
        "python": python,
        "helper": python if container is None and "/" in python else "python3",
    }


def _scheduler(sub: Submission, container: Container | None, mounts: list[str]) -> dict[str, Any]:
    """What the scheduler reads, and what it tells a script."""
    backend = backends.get(sub.shape.backend)
    return {
        "backend": backend.name,
        "directives": backend.directives(sub),
        "step_options": backend.step_options(sub, container, mounts),
        "starter": backend.starter(sub),
        "job_id": backend.job_id,
        "array_index": backend.array_index,
        "node_list": backend.node_list,
        "node_rank": backend.node_rank,
        "successor": backend.successor,
        "scrubbed": backend.scrubbed,
    }


def _unset(system: System) -> list[str]:
    return [name for name in system.environment.avoid if rq.ENV_NAME.fullmatch(name)]


def _node_local(system: System) -> str:
    """Shell text of the node-local folder: the site's variable, else its path (in which the node's variables stay),
    else /tmp.
    """
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
    out.extend(
        sub.line(f"module use {quoted(folder)}", "where the site keeps these modules", "software.use")
        for folder in (system.software.use if modules else [])
    )
    out.extend(
        sub.line(
            f"module load {quoted(name)} || die {quoted(f'module {name} is not there')}",
            "from your site file (user.modules)" if own else "software of the site, in its documented order",
            None if own else "software.modules",
        )
        for name in modules
    )
    return out


def _preflight(sub: Submission) -> bool:
    if sub.request.preflight == "on":
        return True
    if sub.request.preflight == "off":
        return False
    return backends.get(sub.shape.backend).preflight and sub.shape.nodes > 1


def _more_groups(sub: Submission, recipe: Recipe | None) -> int:
    """Ranks that share a copy of the model, for an engine that forms further groups of ranks on the devices; 0: it
    forms none, so that the pre-flight need not try.
    """
    from aifactory_train.parallel.traits import traits_of

    if recipe is None or not traits_of(recipe.parallel.engine).more_groups:
        return 0
    return recipe.parallel.copy_ranks or sub.shape.ranks_per_node


def address_function(system: System, shape: JobShape) -> str:
    """The shell function that prints the address under which other nodes reach this one."""
    head = system.launch.head_address
    backend = backends.get(shape.backend)
    if not backend.batch:
        return "address_of_this_node() { echo 127.0.0.1; }"
    assignment = body = ""
    if head.strategy == "nodeaddr":
        body = backend.node_address
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
    return (
        f'address_of_this_node() {{\n  local name\n  name={assignment} || return 1\n  [ -n "$name" ] || return '
        f"1\n  {last}\n}}"
    )


def _plain(suffix: str | None) -> str:
    text = suffix or ""
    if not all(c.isalnum() or c in ".-" for c in text):
        raise UserError(f"'{text}' is no suffix of a host name", where="launch.head_address.suffix")
    return text
