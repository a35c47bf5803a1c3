"""Faults of what is asked before and after a job: ``centres/``, ``access.yaml`` and ``known-faults.yaml``."""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites import known_faults
from aifactory_train.sites.access import AccessFile, Part
from aifactory_train.sites.catalogue import shared_sources
from aifactory_train.sites.centres import read_centre, with_centre
from aifactory_train.sites.check.faults import Fault, at
from aifactory_train.sites.check.profile import dated
from aifactory_train.sites.paths import leaves
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.services import SECTIONS
from aifactory_train.sites.system import System


def check_services(room: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """All faults of these files, where the room has them."""
    owners: dict[str, str] = {}
    for path in sorted((room / "centres").glob("*.yaml")):
        yield from _readable(path, lambda path=path: list(check_centre(path, systems, owners, today)))
    faults_file = room / "known-faults.yaml"
    if faults_file.is_file():
        yield from _readable(faults_file, lambda: list(check_known_faults(faults_file, systems, today)))
    if (room / "access.yaml").is_file():
        yield from _readable(room / "access.yaml", lambda: list(check_access(room, systems, today)))


def _readable(path: Path, find: Any) -> Iterator[Fault]:
    try:
        yield from find()
    except UserError as error:
        yield Fault("schema", error.where or path.name, error.what, error.fix)
    except (ValidationError, ValueError, TypeError, KeyError, AttributeError) as error:
        yield Fault("schema", path.name, " ".join(str(error).split())[:300])


def check_centre(
    path: Path, systems: dict[str, System], owners: dict[str, str], today: datetime.date
) -> Iterator[Fault]:
    """Faults of one centre; ``owners`` collects who names which system."""
    centre = read_centre(path)
    for name, source in centre.sources.items():
        yield from dated(name, source, path, today)
    said = [*centre.sections.items(), *(pair for sections in centre.of.values() for pair in sections.items())]
    stated = {p for key, section in said for p, _ in leaves(section, key)}
    for i, fact in enumerate(centre.facts):
        if fact.source not in centre.sources and fact.source not in shared_sources():
            yield Fault("unknown-source", at(path, "facts", i), f"the source '{fact.source}' is not defined")
        for dotted in fact.at:
            if not any(f"{p}.".startswith(f"{dotted}.") for p in stated):
                yield Fault("centre", at(path, "facts", i), f"facts names '{dotted}', which holds no value")
    for name in centre.systems:
        where = at(path, "systems")
        other = owners.setdefault(name, path.name)
        if other != path.name:
            yield Fault("centre", where, f"{name} is also named by {other}")
        if name not in systems or not systems[name].usable:
            yield Fault("centre", where, f"{name} is no usable system{did_you_mean(name, systems)}")
            continue
        profile = path.parent.parent / "systems" / f"{name}.yaml"
        yield from unanswered(with_centre(read_yaml(profile), centre), at(path, "sections"))


def unanswered(raw: dict[str, Any], where: Any) -> Iterator[Fault]:
    """Questions that the sections of a merged raw profile leave open."""
    for key, section in SECTIONS.items():
        left = section.model_validate(raw.get(key) or {}).unanswered()
        if left:
            what = f"{raw.get('id')}: {key} says nothing of {', '.join(left)}"
            yield Fault("unanswered", where, what, "state it with a source, or name it under unknown with whom to ask")


def check_known_faults(path: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """Faults of ``known-faults.yaml``, and defaults of profiles that it contradicts."""
    entries = known_faults.read(path)
    ids = [entry.id for entry in entries]
    for i, entry in enumerate(entries):
        where = at(path, "faults", i)
        yield from dated(entry.id, entry.source, path, today)
        if ids.index(entry.id) != i:
            yield Fault("known-fault", where, f"'{entry.id}' is there twice")
        for name in entry.where.systems:
            if not fnmatch.filter(systems, name):
                yield Fault("known-fault", where, f"{entry.id}: no profile '{name}'{did_you_mean(name, systems)}")
        if entry.expires < today:
            what = f"{entry.id} expired on {entry.expires}"
            yield Fault("known-fault", where, what, "read its source again and set a new date, or take it out")
    for system in systems.values():
        for fault, default, when in known_faults.contradictions(system, entries) if system.usable else ():
            yield Fault(
                "contradiction",
                f"{system.id}.yaml",
                f"{default} of {system.id} ({when or 'undated'}) is at fault by {fault.source.title} ({fault.dated}): "
                f"{fault.what}",
                fault.remedy,
            )


def check_access(room: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """Faults of ``access.yaml``: every member is there, and what is named exists."""
    path = room / "access.yaml"
    file = AccessFile.model_validate(read_yaml(path))
    for name, source in file.sources.items():
        yield from dated(name, source, path, today)
    named: list[tuple[str, tuple[Any, ...]]] = [(file.ask.source, ("ask",))]
    named += [(route.source, ("routes", key)) for key, route in file.routes.items()]
    named += [(m.source, ("members", key)) for key, m in file.members.items() if m.source is not None]
    named += [(remark.source, ("common", i)) for i, remark in enumerate(file.common)]
    parts: list[tuple[Part, tuple[Any, ...]]] = [(file.eurohpc, ("eurohpc",)), (file.states, ("states",))]
    parts += [(part, ("shares", i)) for i, part in enumerate(file.shares)]
    named += [(part.source, keys) for part, keys in parts]
    for origin, keys in named:
        if origin not in file.sources:
            yield Fault("unknown-source", at(path, *keys), f"the source '{origin}' is not defined")
    lists: list[tuple[list[str], tuple[Any, ...]]] = [
        (part.systems + ([part.system] if part.system else []), keys) for part, keys in parts
    ]
    lists += [(route.systems, ("routes", key)) for key, route in file.routes.items()]
    for names, keys in lists:
        for name in sorted(set(names) - set(systems)):
            yield Fault("access", at(path, *keys), f"no profile '{name}'{did_you_mean(name, systems)}")
    operators = {system.operator for system in systems.values()}
    for key, route in file.routes.items():
        if (route.on == "own") != (route.operator is not None) or (route.operator or "") not in operators | {""}:
            what = f"{key}: 'on: own' names the operator of a profile, and nothing else does"
            yield Fault("access", at(path, "routes", key), what, f"one of {', '.join(sorted(operators))}")
    members = {m["id"] for m in read_yaml(room / "factories.yaml").get("members", [])}
    for name in sorted(members - set(file.members)):
        yield Fault(
            "access", at(path, "members"), f"{name} is left out", "its contact or unknown: true, and its routes"
        )
    for name, entry in file.members.items():
        where = at(path, "members", name)
        if name not in members:
            yield Fault("access", where, f"'{name}' is no member{did_you_mean(name, members)}")
        for wanted in entry.routes:
            if wanted not in file.routes:
                yield Fault("access", where, f"{name}: no route '{wanted}'{did_you_mean(wanted, file.routes)}")
