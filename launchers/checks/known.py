"""Faults that are known of what the job runs with: told before it is submitted, with remedy and source."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator

from aifactory_train.launchers.checks.rules import Context, Finding, rule, warn
from aifactory_train.launchers.container import container_of, python_of
from aifactory_train.sites import known_faults


@rule
def known_fault(c: Context) -> Iterator[Finding]:
    """Nothing that the job runs with has a fault that is known."""
    for fault in known_faults.applicable(situation(c)):
        place = f"{fault.source.title}, {fault.dated}" + (f", {fault.source.url}" if fault.source.url else "")
        old = f"; the entry expired on {fault.expires}" if fault.expired else ""
        yield warn(f"{fault.effect}: {fault.what} ({fault.id}{old})", place, fault.remedy)


def situation(c: Context) -> known_faults.Situation:
    """What is known of the job. The packages are those of this Python, where the ranks run in it."""
    site = c.backend.software == "site"
    container = container_of(c.request, c.system) if site else None
    here = c.backend.software == "here" or (container is None and _python(c) == sys.executable)
    engine = c.recipe.parallel.engine if c.request.accept is None else None  # an acceptance has no recipe
    return known_faults.Situation(
        system=c.system,
        image=container.image if container is not None else None,
        packages=known_faults.installed() if here else {},
        variables=dict(_variables(c)),
        engine=(c.sub.plan or {}).get("engine", engine) if engine == "auto" else engine,
        flags=(*c.request.extra_flags, *known_faults.flags_of(c.system)),
        nodes=c.shape.nodes,
    )


def _python(c: Context) -> str:
    notes = list(c.sub.notes)
    try:
        return python_of(c.sub, None)
    finally:
        c.sub.notes[:] = notes


def _variables(c: Context) -> Iterator[tuple[str, str]]:
    """What the script exports, and what the user adds."""
    for line in c.sub.lines:
        found = re.match(r"export ([A-Za-z_]\w*)=(.*)$", line)
        if found:
            words = shlex.split(found[2])
            yield found[1], words[0] if words else ""
    yield from c.variables
