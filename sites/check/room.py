"""The whole folder: every profile, the GPU catalogue, shared sources, readiness, the members, the built index."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites import fleet, index
from aifactory_train.sites.catalogue import GPUS, ROOM, gpu_catalogue, merge_catalogue
from aifactory_train.sites.check.faults import CheckReport, Fault, at
from aifactory_train.sites.check.profile import check_system, dated
from aifactory_train.sites.check.rules import gpu_faults
from aifactory_train.sites.check.services import check_services
from aifactory_train.sites.hardware import Gpu
from aifactory_train.sites.index import READINESS_WORDS
from aifactory_train.sites.reading import line_of, read_yaml
from aifactory_train.sites.schema import FactEntry, Source
from aifactory_train.sites.system import System

#: Profiles that belong to no member.
NOT_OWNED = ("generic-slurm",)


def check_room(room: Path | None = None, today: datetime.date | None = None) -> CheckReport:
    """All faults of a folder with ``factories.yaml`` and ``systems/`` (default: the shipped one)."""
    today = today or datetime.date.today()
    room = room or ROOM
    report = CheckReport(faults=[])
    systems: dict[str, System] = {}
    names: dict[str, str] = {}
    for path in sorted((room / "systems").glob("*.yaml")):
        system = check_system(path, report, today)
        if system is None:
            continue
        for name in (system.id, system.name, *system.aliases):
            other = names.setdefault(name.lower(), path.name)
            if other != path.name:
                report.faults.append(Fault("duplicate-name", at(path, "id"), f"'{name}' is also used by {other}"))
        systems[path.stem] = system
    report.faults.extend(guarded(room / "gpus.yaml", lambda path: check_catalogue(path, today)))
    report.faults.extend(guarded(room / "sources.yaml", lambda path: check_sources(path, today)))
    report.faults.extend(guarded(room / "readiness.yaml", lambda path: check_readiness(path, systems, today)))
    report.faults.extend(guarded(room / "factories.yaml", lambda path: check_members(path, systems, today)))
    report.faults.extend(check_services(room, systems, today))
    if room == ROOM:
        report.faults.extend(index_fresh())
    return report


def guarded(path: Path, rule: Callable[[Path], Iterator[Fault]]) -> list[Fault]:
    """The faults that ``rule`` finds; a file of another shape than the rule expects is one fault, not a crash."""
    try:
        return list(rule(path))
    except UserError as error:
        return [Fault("schema", error.where or path.name, error.what, error.fix)]
    except (ValidationError, TypeError, KeyError, AttributeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Fault("schema", path.name, f"not of the shape that its first lines describe: {first}")]


def check_catalogue(path: Path, today: datetime.date) -> Iterator[Fault]:
    """Faults of ``gpus.yaml``."""
    try:
        raw = read_yaml(path)
        skus = gpu_catalogue() if path == GPUS else merge_catalogue(raw)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    sources = raw.get("sources", {})
    for name, entry in sources.items():
        yield from dated(name, Source(**entry), path, today)
    for sku, entry in skus.items():
        try:
            gpu = Gpu(sku=sku, **entry)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            name = "arch" if "arch" in fault["loc"] else "schema"
            yield Fault(name, at(path, "gpus", sku), f"{'.'.join(str(k) for k in fault['loc'])}: {fault['msg']}")
            continue
        yield from gpu_faults(gpu, at(path, "gpus", sku))
    for i, item in enumerate(raw.get("facts", [])):
        fact = FactEntry(**item)
        if fact.source not in sources:
            yield Fault("unknown-source", at(path, "facts", i), f"the source '{fact.source}' is not defined")
        for dotted in fact.at:
            sku, _, field = dotted.partition(".")
            if sku not in skus or (field and field.split(".")[0] not in skus[sku]):
                yield Fault("unused-fact", at(path, "facts", i), f"facts names '{dotted}', which holds no value")


def check_sources(path: Path, today: datetime.date) -> Iterator[Fault]:
    """Faults of ``sources.yaml``."""
    try:
        raw = read_yaml(path)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    for name, entry in raw.items():
        try:
            source = Source(**entry)
        except (ValidationError, TypeError) as error:
            yield Fault("schema", f"{path.name}: {name}", str(error).splitlines()[0])
            continue
        for fault in dated(name, source, path, today):
            yield Fault(fault.name, f"{path.name}:{line_of(path, (name,))}", fault.what, fault.fix)


def check_readiness(path: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """Faults of ``readiness.yaml``."""
    if not path.is_file():
        return
    try:
        raw = read_yaml(path)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    for name, entry in ((raw or {}).get("systems") or {}).items():
        where = at(path, "systems", name)
        if name not in systems:
            yield Fault("readiness", where, f"no profile '{name}'{did_you_mean(name, systems)}")
        entry = entry if isinstance(entry, dict) else {}
        if entry.get("level") not in READINESS_WORDS:
            yield Fault(
                "readiness",
                where,
                f"{name}: '{entry.get('level')}' is no level",
                f"one of {', '.join(READINESS_WORDS)}",
            )
        elif entry["level"] == "twin" and name in systems and systems[name].scheduler.kind != "slurm":
            yield Fault(
                "readiness", where, f"{name}: a twin is a slurmctld, its scheduler is {systems[name].scheduler.kind}"
            )
        if not entry.get("evidence") or not entry.get("date"):
            yield Fault(
                "readiness",
                where,
                f"{name}: a date and evidence are needed",
                "date: 2026-11-22, evidence: what was run",
            )
        elif str(entry["date"]) > today.isoformat():
            yield Fault("readiness", where, f"{name}: dated {entry['date']}, today is {today}")


_MEMBER_KEYS = {
    "id",
    "name",
    "kind",
    "country",
    "host",
    "wave",
    "sectors",
    "sectors_reason",
    "focus",
    "links",
    "systems",
    "announced",
    "unsuitable",
    "reason",
}


def check_members(path: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """Faults of ``factories.yaml``, given the systems by file name."""
    try:
        raw = read_yaml(path)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    for name, entry in raw.get("sources", {}).items():
        yield from dated(name, Source(**entry), path, today)
    for key, fact in raw.get("facts", {}).items():
        if fact.get("source") not in raw.get("sources", {}):
            yield Fault("unknown-source", at(path, "facts", key), f"the source '{fact.get('source')}' is not defined")
    for needed in ("sectors", "host", "wave", "links"):
        if needed not in raw.get("facts", {}):
            yield Fault("no-source", path.name, f"{needed} of the members has no source", "add it to facts:")
    members = raw.get("members", [])
    kinds = [m.get("kind") for m in members]
    if (kinds.count("factory"), kinds.count("antenna"), len(members)) != (19, 13, 32):
        yield Fault(
            "members",
            path.name,
            f"{kinds.count('factory')} factories and {kinds.count('antenna')} antennas, not 19 and 13",
        )
    by_id = {m.get("id"): m for m in members}
    if len(by_id) != len(members):
        yield Fault("duplicate-name", path.name, "two members have the same id")
    owned: set[str] = set()
    for i, m in enumerate(members):
        where = at(path, "members", i)
        for key in set(m) - _MEMBER_KEYS:
            yield Fault("schema", where, f"unknown key '{key}'{did_you_mean(key, _MEMBER_KEYS)}")
        for key in ("id", "name", "kind", "country", "host", "wave", "sectors", "systems"):
            if key not in m:
                yield Fault("schema", where, f"the key '{key}' is missing")
        if m.get("country") not in raw.get("countries", {}):
            yield Fault("country", where, f"{m.get('id')}: '{m.get('country')}' is not in countries")
        for sector in m.get("sectors") or []:
            if sector not in raw.get("sector_names", {}):
                yield Fault(
                    "sector",
                    where,
                    f"{m.get('id')}: unknown sector '{sector}'{did_you_mean(sector, raw.get('sector_names', {}))}",
                )
        if not m.get("sectors") and not m.get("sectors_reason"):
            yield Fault("sector", where, f"{m.get('id')} has no sectors and no sectors_reason")
        for link in m.get("links") or []:
            if link not in by_id or by_id[link].get("kind") != "factory":
                yield Fault(
                    "link", where, f"{m.get('id')} links to '{link}'{did_you_mean(link, by_id)}, which is no factory"
                )
        if m.get("kind") == "antenna" and not m.get("links"):
            yield Fault("link", where, f"the antenna {m.get('id')} names no factory")
        for key, status in (("systems", "usable"), ("announced", "announced"), ("unsuitable", "unsuitable")):
            for system in m.get(key) or []:
                owned.add(system)
                if system not in systems:
                    yield Fault("link", where, f"{m.get('id')}: no profile '{system}'{did_you_mean(system, systems)}")
                elif systems[system].status != status:
                    yield Fault(
                        "link", where, f"{m.get('id')}: {system} is {systems[system].status}, listed under {key}"
                    )
        if not m.get("systems") and not m.get("reason"):
            yield Fault("no-reason", where, f"{m.get('id')} has no usable system and gives no reason")
    for system in systems:
        if system not in owned and system not in NOT_OWNED:
            yield Fault(
                "orphan", f"{system}.yaml", f"{system} belongs to no factory or antenna", "list it in factories.yaml"
            )


def index_fresh() -> Iterator[Fault]:
    """A fault for each of ``index.json`` and ``fleet.json`` that is missing or was built from other files."""
    for path, built_from in ((index.INDEX, index.digest), (fleet.FLEET, fleet.digest)):
        what = "is not there"
        if path.is_file():
            same = json.loads(path.read_text(encoding="utf-8")).get("digest") == built_from()
            what = "" if same else "was built from other files"
        if what:
            yield Fault("index", path.name, what, "aifactory sites check --write-index")
